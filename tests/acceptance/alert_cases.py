"""What each alert must fire for, and what none may: minute by minute, in promtool's notation."""

from __future__ import annotations

SERVED = {'fedbus_build_info{role="server"}': "1x600"}

QUIET = {
    **SERVED,
    "fedbus_round_last_closed_timestamp_seconds": "0+60x600",
    "fedbus_round_timeout_seconds": "600x600",
    "fedbus_round_seconds_sum": "0+60x600",
    "fedbus_round_seconds_count": "0+1x600",
    'fedbus_rounds_closed_total{reason="min_fit_clients"}': "0+1x600",
    'fedbus_rounds_closed_total{reason="timeout"}': "0x600",
    'fedbus_updates_total{outcome="folded"}': "0+10x600",
    'fedbus_updates_total{outcome="refused"}': "0x200 1x400",
    'fedbus_updates_total{outcome="failed"}': "0+1x600",
    'fedbus_messages_rejected_total{queue="q",user="u"}': "3x600",
    "fedbus_broker_connected": "1x600",
    "fedbus_broker_blocked": "0x600",
    'fedbus_queue_messages{queue="fedbus.control"}': "5000-5x600",
    'fedbus_queue_messages{queue="fedbus.dead"}': "0x600",
    'fedbus_member_losses_total{cause="left"}': "0+10x600",
    'fedbus_member_losses_total{cause="lease"}': "0x100 1x500",
    'fedbus_members{state="idle"}': "50x600",
    "fedbus_broker_reconnects_total": "0x100 1x500",
    "fedbus_event_loop_lag_seconds_sum": "0+0.1x600",
    "fedbus_event_loop_lag_seconds_count": "0+120x600",
    "fedbus_event_loop_silence_seconds": "0.4x600",
    'process_resident_memory_bytes{job="j",instance="i"}': "300000000+100000x600",
    'fedbus_build_info{job="j",instance="i"}': "1x600",
    "fedbus_client_member": "1x600",
    'fedbus_queue_messages{queue="fedbus.work"}': "40x600",
    'fedbus_queue_consumers{queue="fedbus.work"}': "3x600",
    "fedbus_client_refusals_total": "0x100 1x500",
    "rabbitmq_process_resident_memory_bytes": "50x600",
    "rabbitmq_resident_memory_limit_bytes": "100x600",
    "rabbitmq_disk_space_available_bytes": "1000x600",
    "rabbitmq_disk_space_available_limit_bytes": "100x600",
}
"""A federation whose life is not perfect, and nobody's business at night."""

CASES: list[tuple[str, str, dict[str, str]]] = [
    ("FedbusNoServer", "5m", {'fedbus_build_info{role="client"}': "1x10"}),
    (
        "FedbusNoRoundClosed",
        "30m",
        {**SERVED, "fedbus_round_last_closed_timestamp_seconds": "0x60", "fedbus_round_timeout_seconds": "600x60"},
    ),
    (
        "FedbusNoRoundClosed",
        "15m",
        {
            **SERVED,
            "fedbus_round_last_closed_timestamp_seconds": "0x60",
            "fedbus_round_timeout_seconds": "86400x60",
            "fedbus_round_seconds_sum": "30x60",
            "fedbus_round_seconds_count": "10x60",
        },
    ),
    (
        "FedbusRoundsTimeOut",
        "30m",
        {
            **SERVED,
            'fedbus_rounds_closed_total{reason="timeout"}': "0+3x60",
            'fedbus_rounds_closed_total{reason="min_fit_clients"}': "0+2x60",
        },
    ),
    ("FedbusUpdatesRefused", "5m", {**SERVED, 'fedbus_updates_total{outcome="refused"}': "0 0 5x20"}),
    (
        "FedbusTasksFail",
        "40m",
        {
            **SERVED,
            'fedbus_updates_total{outcome="failed"}': "0+1x60",
            'fedbus_updates_total{outcome="folded"}': "0+2x60",
        },
    ),
    ("FedbusMessagesRejected", "10m", {**SERVED, 'fedbus_messages_rejected_total{user="u"}': "0+1x30"}),
    ("FedbusMessagesRejected", "8m", {**SERVED, 'fedbus_messages_rejected_total{user="u"}': "_x5 10x20"}),
    ("FedbusBrokerLost", "3m", {**SERVED, "fedbus_broker_connected": "0x10"}),
    ("FedbusBrokerBlocked", "3m", {**SERVED, "fedbus_broker_blocked": "1x10"}),
    ("FedbusQueueGrowing", "25m", {**SERVED, 'fedbus_queue_messages{queue="fedbus.control"}': "1000+100x40"}),
    ("FedbusDeadLetters", "3m", {**SERVED, 'fedbus_queue_messages{queue="fedbus.dead"}': "1x10"}),
    (
        "FedbusClientsLost",
        "5m",
        {**SERVED, 'fedbus_member_losses_total{cause="lease"}': "0 0 8x20", 'fedbus_members{state="idle"}': "20x20"},
    ),
    ("FedbusReconnectStorm", "12m", {**SERVED, "fedbus_broker_reconnects_total": "0+1x20"}),
    (
        "FedbusEventLoopLag",
        "8m",
        {
            **SERVED,
            "fedbus_event_loop_lag_seconds_sum": "0+60x20",
            "fedbus_event_loop_lag_seconds_count": "0+120x20",
        },
    ),
    ("FedbusEventLoopLag", "3m", {**SERVED, "fedbus_event_loop_silence_seconds": "60+60x10"}),
    (
        "FedbusMemoryGrowth",
        "540m",
        {
            **SERVED,
            'process_resident_memory_bytes{job="j",instance="i"}': "300000000x420 600000000x180",
            'fedbus_build_info{job="j",instance="i"}': "1x600",
        },
    ),
    ("FedbusClientWaits", "15m", {**SERVED, "fedbus_client_member": "0x30"}),
    (
        "FedbusNoWorkers",
        "8m",
        {
            **SERVED,
            'fedbus_queue_messages{queue="fedbus.work"}': "40x20",
            'fedbus_queue_consumers{queue="fedbus.work"}': "0x20",
        },
    ),
    ("FedbusClientRefused", "5m", {**SERVED, "fedbus_client_refusals_total": "0 0 5x30"}),
    (
        "FedbusBrokerMemoryHigh",
        "10m",
        {
            **SERVED,
            "rabbitmq_process_resident_memory_bytes": "90x20",
            "rabbitmq_resident_memory_limit_bytes": "100x20",
        },
    ),
    (
        "FedbusBrokerDiskLow",
        "10m",
        {
            **SERVED,
            "rabbitmq_disk_space_available_bytes": "150x20",
            "rabbitmq_disk_space_available_limit_bytes": "100x20",
        },
    ),
]
"""The alert that fires, when, and what of."""
