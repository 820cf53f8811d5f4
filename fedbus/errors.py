"""Every error fedbus raises, in one tree that says who is at fault.

    FedbusError
    ├── UsageError            whoever called us: exit code 2
    │   ├── ConfigError         a setting that cannot work
    │   └── AppError            APP cannot be found, or is not a fedbus.App
    ├── BrokerError           the broker, or the road to it
    │   ├── BrokerUnreachable   refused, timed out, unknown host
    │   ├── BrokerDenied        wrong password, wrong vhost, missing right
    │   ├── BrokerClosed        the connection or channel ended under us
    │   │   └── TurnedOut           because our rights were taken from us
    │   ├── QueueMissing        nothing of that name to consume
    │   ├── QueueBusy           another connection holds the name
    │   ├── QueueMismatch       it exists with other settings
    │   ├── Unroutable          a mandatory message that no queue takes
    │   ├── PublishUnconfirmed  refused by the broker, or no word of it in time
    │   └── NodeError           a private node that cannot start or stop
    │       └── BrokerMissing     RabbitMQ is not installed
    ├── PeerError             the other side of the wire
    │   ├── DecodeError         bytes that are not one of our messages
    │   └── UpdateRefused       an update that must not be folded
    ├── AggregateRefused      updates of which no model can be made
    ├── ClientCodeError       the user's fit, evaluate or evaluate_fn
    └── RunFailed             a run that ended without doing its work

Each message is one line that says what to do. Foreign exceptions are mapped once, where the library is called.
"""

import traceback
from pathlib import Path


class FedbusError(Exception):
    """Base of all errors that fedbus raises on purpose."""


class UsageError(FedbusError):
    """The caller asked for something that cannot be done as asked."""


class ConfigError(UsageError):
    """A setting that cannot work."""


class AppError(UsageError):
    """APP cannot be found, cannot be imported or is not a `fedbus.App`."""


class BrokerError(FedbusError):
    """The broker, or the road to it, is at fault."""


class BrokerUnreachable(BrokerError):
    """Nothing answers at the broker's address."""


class BrokerDenied(BrokerError):
    """The broker answers and says no: password, vhost or right."""


class BrokerClosed(BrokerError):
    """The connection or channel ended while it was in use."""


class TurnedOut(BrokerClosed):
    """The broker ended the connection because its user was deleted, or by its operator's hand."""


class QueueMissing(BrokerError):
    """There is no queue or exchange of that name."""


class QueueBusy(BrokerError):
    """Another connection holds a name that only one may hold."""


class QueueMismatch(BrokerError):
    """A queue or exchange of that name exists with other settings."""


class Unroutable(BrokerError):
    """A mandatory message came back because no queue takes it."""


class PublishUnconfirmed(BrokerError):
    """The broker refused the message, or said nothing of it in time (then its fate is unknown)."""


class NodeError(BrokerError):
    """A private RabbitMQ node could not be started or stopped."""


class BrokerMissing(NodeError):
    """RabbitMQ is not installed on this machine."""


class PeerError(FedbusError):
    """The other side of the wire sent what it must not send."""


class DecodeError(PeerError):
    """Bytes that are not a well-formed fedbus message."""


class UpdateRefused(PeerError):
    """An update that must not be folded; the message is the reason given to its sender."""


class AggregateRefused(FedbusError):
    """No next model can be made of a round's updates: the model stays, and the run goes on."""


class ClientCodeError(FedbusError):
    """The user's own code raised, or returned what it must not return."""


class RunFailed(FedbusError):
    """The run ended without doing its work."""


def one_line(text: str, most_chars: int = 500) -> str:
    """`text` as it may stand in a log or on a screen: no line breaks, no control characters, not too long."""
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in flat[:most_chars])


def place_of(exc: BaseException) -> str:
    """ " (own.py:12)": where in somebody's own code it was raised, or the innermost line there is; "" when unknown."""
    ours = str(Path(__file__).parent)
    frames = traceback.extract_tb(exc.__traceback__)
    # The user's own line, where the error was raised by a check of ours.
    theirs = [frame for frame in frames if not frame.filename.startswith((ours, "<"))] or frames
    return f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""


def leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to report of several failures at once: the broker's end comes first, it explains the others."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        exc = pending.pop(0)
        if isinstance(exc, BaseExceptionGroup):
            pending += exc.exceptions
        else:
            leaves.append(exc)
    return next((exc for exc in leaves if isinstance(exc, BrokerError)), leaves[0])
