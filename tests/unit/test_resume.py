"""Stories of servers that die and others that go on, over the memory bus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import fedbus.bus.supervised
import fedbus.server.runtime
from fedbus.rounds import commands as c
from fedbus.server.intake import UpdateIntake
from fedbus.server.ledger import Ledger
from fedbus.server.publisher import ModelPublisher
from fedbus.server.runtime import Server
from tests.kit import Counting, Pause, federation

CLIENTS = ("c1", "c2", "c3")


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory all is given again at once."""
    monkeypatch.setattr(fedbus.server.runtime, "_REDELIVERY_PAUSE_S", 0.02)
    monkeypatch.setattr(fedbus.server.runtime, "_NOTES_EVERY_S", 0.0)
    monkeypatch.setattr(fedbus.bus.supervised, "_BUSY_PAUSE_S", 0.01)


async def bits_without_faults(counting: Counting, clients: tuple[str, ...] = CLIENTS, **settings: Any) -> bytes:
    async with federation(Counting(counting.size).app(**settings)) as story:
        await story.run(*clients)
        return story.bits()


# ---- the server dies at any point of a commit ------------------------------------------------------------------------


def only_once(pause: Pause, original: Callable[..., Awaitable[Any]], when: Callable[..., bool]) -> Callable[..., Any]:
    """`original`, but the first call that `when` is true of hangs, and never does anything."""
    hung = False

    async def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal hung
        if not hung and when(*args, **kwargs):
            hung = True
            await pause.here()
        return await original(*args, **kwargs)

    return patched


def only_once_in_thread(pause: Pause, original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    hung = False

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal hung
        if not hung and when(*args, **kwargs):
            hung = True
            pause.in_thread()
            raise OSError("this process is dead")
        return original(*args, **kwargs)

    return patched


Hang: TypeAlias = Callable[[pytest.MonkeyPatch, Pause], None]


def _before_a_fold(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(Server, "_fold", only_once(pause, Server._fold, lambda _, job: job.command.round == 2))


def _before_the_last_fold(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    def when(server: Server, job: Any) -> bool:
        return bool(job.command.round == 2 and len(server._folded) == 2)

    patch.setattr(Server, "_fold", only_once(pause, Server._fold, when))


def _between_checkpoint_and_ledger(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    original = Ledger.commit_round
    patch.setattr(
        Ledger, "commit_round", only_once_in_thread(pause, original, lambda _, record, rows, **rest: record.round == 2)
    )


def _between_ledger_and_ack(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    commits = iter(range(1, 100))
    patch.setattr(UpdateIntake, "settle_all", only_once(pause, UpdateIntake.settle_all, lambda *_: next(commits) == 2))


def _between_ack_and_receipt(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(
        Server, "_send_receipt", only_once(pause, Server._send_receipt, lambda _, command: command.round == 2)
    )


def _between_ledger_and_publication(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    original = Server._settle_checkpoint  # the ledger has the round by then
    patch.setattr(ModelPublisher, "publish", only_once(Pause(), ModelPublisher.publish, lambda _, m, v, __: v == 2))
    patch.setattr(Server, "_settle_checkpoint", only_once(pause, original, lambda server: server._version == 2))


def _between_noting_tasks_and_sending_them(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    def when(_: Server, command: c.Command) -> bool:
        return isinstance(command, c.SendFitTask) and command.round == 2

    patch.setattr(Server, "_carry_out", only_once(pause, Server._carry_out, when))


def _in_the_first_publication(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(Ledger, "commit_model", only_once_in_thread(pause, Ledger.commit_model, lambda *_: True))


HANGS: tuple[Hang, ...] = (
    _before_a_fold,
    _before_the_last_fold,
    _between_checkpoint_and_ledger,
    _between_ledger_and_ack,
    _between_ack_and_receipt,
    _between_ledger_and_publication,
    _between_noting_tasks_and_sending_them,
    _in_the_first_publication,
)


@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("size", [3, 400_000])
async def test_a_server_killed_anywhere_in_a_round_is_resumed_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hang: Hang, size: int
) -> None:
    counting = Counting(size)
    expected = await bits_without_faults(counting)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        pause = Pause()
        hang(monkeypatch, pause)
        story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        await pause.reached()
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
        for client in clients:
            ended = await client
            assert ended is not None
            assert ended.finished
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


async def test_a_server_killed_before_it_kept_the_model_of_a_client_takes_it_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting = Counting()
    app = counting.app(initial_parameters=None, num_clients=1)
    async with federation(app, run_dir=tmp_path) as story:
        pause = Pause()
        _in_the_first_publication(monkeypatch, pause)
        story.start_server()
        story.start_client("c1")
        await pause.reached()
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
        story.check_whole(history, ["c1"], 4)
        assert story.bits() == await bits_without_faults(counting, ("c1",), num_clients=1)
    assert set(counting.asked.values()) == {1}
