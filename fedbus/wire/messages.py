"""Every message that crosses the broker, as frozen dataclasses.

A field's annotation is also its check at decoding (see `codec`): `Count` is an int from 0 to 2**63 - 1, `Text` a
short string, `Scalars` a flat map to bool, int, float, str or bytes, `Schema` a checked tuple of `TensorSpec`.
`payload` is raw bytes behind the rest, up to one part, and never copied by the decoder; whoever sends may give it as
several buffers, which are joined as they are written.

`epoch` counts the servers of a run: each one that goes on where another stopped has the next. Clients obey the
highest that they have heard of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedbus.types import Scalar
from fedbus.wire.arrays import Buffer, Schema

Count: TypeAlias = int
Text: TypeAlias = str
Scalars: TypeAlias = Mapping[str, Scalar]
Payload: TypeAlias = Buffer | Sequence[Buffer]


# ---- client to server, small: the control queue -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Join:
    """A client asks to take part. `session` is new with every process of that client."""

    client_id: Text
    session: Text


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A client is alive and believes to be a member of `run_id`; `fit_task` is what it has in hand, "" for nothing."""

    client_id: Text
    session: Text
    run_id: Text
    fit_task: Text


@dataclass(frozen=True, kw_only=True)
class Leave:
    """A client goes and gives its place back."""

    client_id: Text
    session: Text
    run_id: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class TaskFailed:
    """A task that ended without a result, because of the client's own code; `reason` is one line."""

    client_id: Text
    task_id: Text
    run_id: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """The result of an `EvaluateTask`: mean loss over `num_examples` examples."""

    client_id: Text
    task_id: Text
    run_id: Text
    loss: float
    num_examples: int
    metrics: Scalars


@dataclass(frozen=True, kw_only=True)
class UploadRequest:
    """An update of `nbytes` payload bytes is ready, and is too large to be sent unasked."""

    client_id: Text
    task_id: Text
    run_id: Text
    nbytes: Count


@dataclass(frozen=True, kw_only=True)
class Echo:
    """The server's word to itself: once it is back, all that clients said before it has been heard.

    `sent_at` is the sender's own clock, in seconds; `run_id` and `epoch` are its own.
    """

    run_id: Text
    epoch: Count
    sent_at: float


@dataclass(frozen=True, kw_only=True)
class StatusRequest:
    """Somebody with the server's own user asks how the run goes: a `Status` is due to `reply_to`, a routing key."""

    reply_to: Text


# ---- client to server, large: the updates queue -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Update:
    """A client's delta against model `version`, or its initial parameters: head and first part of the transfer.

    `transfer` is new with every upload: a client that died half-way and trained again must not have its parts mixed.
    `schema` tells the tensors, of which `codec` may make others that travel in their place: see `compression.Layout`.
    """

    client_id: Text
    task_id: Text
    run_id: Text
    transfer: Text
    version: Count
    num_examples: int
    metrics: Scalars
    schema: Schema
    part_bytes: Count
    checksum: Count
    payload: Payload
    codec: Text = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `index` (1, 2, ...) of the transfer whose head is an `Update` or a `Model`."""

    transfer: Text
    index: Count
    checksum: Count
    payload: Payload


# ---- server to clients: the model stream ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """A version of the global model: head and first part of the transfer; `schema` and `codec` as in an `Update`."""

    run_id: Text
    epoch: Count
    version: Count
    schema: Schema
    part_bytes: Count
    checksum: Count
    payload: Payload
    codec: Text = ""

    @property
    def transfer(self) -> str:
        """The name that the further parts of this version carry."""
        return f"{self.run_id}/{self.epoch}/{self.version}"


# ---- server to one client: its inbox ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The client is a member of `run_id`, as long as it is heard of within every `lease_s` seconds.

    `session` is that of its join: one for an earlier process of the same name means nothing. `codec` and `model_codec`:
    what updates and models are coded with in this run, "" for nothing; a client that cannot do it has no business here.
    """

    run_id: Text
    session: Text
    epoch: Count
    heartbeat_s: float
    lease_s: float
    codec: Text = ""
    model_codec: Text = ""


@dataclass(frozen=True, kw_only=True)
class ParametersTask:
    """Send the model as your code initialises it: the server has none."""

    task_id: Text
    run_id: Text
    epoch: Count


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """Train model `version`, whose head lies at `offset` in the model stream or behind; of use for `timeout_s` seconds.

    An update of more than `eager_bytes` payload bytes is announced by an `UploadRequest` first. The same task again
    asks for its answer again. `receipt_task_id`, when it is not empty, names an update that is committed in
    `receipt_round`, `receipt_staleness` versions late: what a `Receipt` says, without a message of its own. The update
    comes in `codec`, "" for none. `purpose`: "fit", or "query" for an answer about the data in place of training.
    """

    task_id: Text
    run_id: Text
    epoch: Count
    round: Count
    version: Count
    offset: Count
    timeout_s: float
    eager_bytes: Count
    config: Scalars
    receipt_task_id: Text
    receipt_round: Count
    receipt_staleness: Count
    codec: Text = ""
    purpose: Text = "fit"


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Evaluate model `version`, whose head lies at `offset` in the model stream or behind."""

    task_id: Text
    run_id: Text
    epoch: Count
    round: Count
    version: Count
    offset: Count
    config: Scalars


@dataclass(frozen=True, kw_only=True)
class CancelTask:
    """Stop working on this task: its update would be refused, because of `reason`."""

    task_id: Text
    run_id: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class UploadGrant:
    """The update of this task may be sent now."""

    task_id: Text
    run_id: Text
    epoch: Count


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The server's word that the update is folded and committed in `round`, `staleness` versions late."""

    task_id: Text
    run_id: Text
    round: Count
    staleness: Count


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The update was not and will not be folded, because of `reason`."""

    task_id: Text
    run_id: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """The run is over: finished, or ended early because of `reason`. With `another` clients wait for the next one."""

    run_id: Text
    epoch: Count
    finished: bool
    reason: Text
    another: bool = False


# ---- server to whoever asks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the run goes; `payload` is JSON, see `fedbus.server.status`."""

    run_id: Text
    payload: Payload


ControlMessage: TypeAlias = (
    Join | Heartbeat | Leave | TaskFailed | EvaluateReport | UploadRequest | Echo | StatusRequest
)
ClientMessage: TypeAlias = Join | Heartbeat | Leave | TaskFailed | EvaluateReport | UploadRequest | Update
"""What a client says in its own name."""
Task: TypeAlias = ParametersTask | FitTask | EvaluateTask
InboxMessage: TypeAlias = Welcome | Task | CancelTask | UploadGrant | Receipt | Refusal | RunEnded
Message: TypeAlias = ControlMessage | Update | Part | Model | InboxMessage | Status
