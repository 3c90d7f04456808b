"""The life cycles of guests, calls, buffers and RPC arguments, as tables.

Only `advance` assigns a state. What a table does not name is a bug of the mediator (rule R25), never a
guest's doing: each input of a guest is answered before it could lead to an edge that is not there. The
diagrams of the documentation are drawn from these tables.
"""

from enum import Enum, auto
from typing import Protocol, TypeVar

from mediator.core.faults import MediatorBug


class _Word(Enum):
    """Hashed by identity: tables are looked up several times a call, and Enum hashes its names."""

    __hash__ = object.__hash__


class GuestState(_Word):
    """Where a guest stands in its life (rules R24, R25, R28)."""

    CREATING = auto()
    LIVE = auto()
    PAUSED = auto()
    ISOLATED = auto()
    DYING = auto()
    QUARANTINED = auto()
    GONE = auto()


class GuestEvent(_Word):
    """What moves a guest."""

    CREATED = auto()
    REFUSED = auto()
    PAUSE = auto()
    RESUME = auto()
    ISOLATE = auto()
    DESTROY = auto()
    DESTROYED = auto()
    DESTROY_REFUSED = auto()
    ABANDON = auto()


class CallState(_Word):
    """Where a yielding call stands."""

    TRANSLATING = auto()
    RUNNING = auto()
    SUSPENDED = auto()
    FREEING = auto()
    ENDED = auto()


class CallEvent(_Word):
    """What moves a yielding call."""

    FORWARD = auto()
    REJECT = auto()
    RPC = auto()
    ASK_FREE = auto()
    RESUME = auto()
    COMPLETE = auto()
    ABORT = auto()


class BufferState(_Word):
    """Where a shared buffer stands."""

    PINNED = auto()
    REGISTERING = auto()
    REGISTERED = auto()
    UNREGISTERING = auto()
    RELEASED = auto()


class BufferEvent(_Word):
    """What moves a shared buffer."""

    REGISTER = auto()
    KEEP = auto()
    UNREGISTER = auto()
    UNREGISTER_REFUSED = auto()
    RELEASE = auto()


class ArgumentState(_Word):
    """Where an RPC argument stands."""

    LIVE = auto()
    RELEASED = auto()


class ArgumentEvent(_Word):
    """What moves an RPC argument."""

    RELEASE = auto()


GUEST_TABLE = {
    GuestState.CREATING: {
        GuestEvent.CREATED: GuestState.LIVE,
        GuestEvent.REFUSED: GuestState.GONE,
    },
    GuestState.LIVE: {
        GuestEvent.PAUSE: GuestState.PAUSED,
        GuestEvent.ISOLATE: GuestState.ISOLATED,
        GuestEvent.DESTROY: GuestState.DYING,
    },
    GuestState.PAUSED: {
        GuestEvent.RESUME: GuestState.LIVE,
        GuestEvent.ISOLATE: GuestState.ISOLATED,
        GuestEvent.DESTROY: GuestState.DYING,
    },
    GuestState.ISOLATED: {GuestEvent.DESTROY: GuestState.DYING},
    GuestState.DYING: {
        GuestEvent.DESTROYED: GuestState.GONE,
        GuestEvent.DESTROY_REFUSED: GuestState.QUARANTINED,
    },
    GuestState.QUARANTINED: {
        GuestEvent.DESTROY: GuestState.DYING,
        GuestEvent.ABANDON: GuestState.GONE,
    },
    GuestState.GONE: {},
}

CALL_TABLE = {
    CallState.TRANSLATING: {
        CallEvent.FORWARD: CallState.RUNNING,
        CallEvent.REJECT: CallState.ENDED,
        CallEvent.ABORT: CallState.ENDED,
    },
    CallState.RUNNING: {
        CallEvent.RPC: CallState.SUSPENDED,
        CallEvent.COMPLETE: CallState.ENDED,
        CallEvent.ABORT: CallState.ENDED,
    },
    CallState.SUSPENDED: {
        CallEvent.RESUME: CallState.RUNNING,
        CallEvent.ASK_FREE: CallState.FREEING,
        CallEvent.ABORT: CallState.ENDED,
    },
    CallState.FREEING: {
        CallEvent.RESUME: CallState.RUNNING,
        CallEvent.ABORT: CallState.ENDED,
    },
    CallState.ENDED: {},
}

BUFFER_TABLE = {
    BufferState.PINNED: {
        BufferEvent.REGISTER: BufferState.REGISTERING,
        BufferEvent.KEEP: BufferState.REGISTERED,
        BufferEvent.RELEASE: BufferState.RELEASED,
    },
    BufferState.REGISTERING: {
        BufferEvent.KEEP: BufferState.REGISTERED,
        BufferEvent.RELEASE: BufferState.RELEASED,
    },
    BufferState.REGISTERED: {
        BufferEvent.UNREGISTER: BufferState.UNREGISTERING,
        BufferEvent.RELEASE: BufferState.RELEASED,
    },
    BufferState.UNREGISTERING: {
        BufferEvent.UNREGISTER_REFUSED: BufferState.REGISTERED,
        BufferEvent.RELEASE: BufferState.RELEASED,
    },
    BufferState.RELEASED: {},
}

ARGUMENT_TABLE = {
    ArgumentState.LIVE: {ArgumentEvent.RELEASE: ArgumentState.RELEASED},
    ArgumentState.RELEASED: {},
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class HasState(Protocol[S]):
    """Anything that has a life cycle."""

    state: S


def advance(thing: HasState[S], event: E, table: dict[S, dict[E, S]]) -> None:
    """Move `thing` along one edge of its table.

    Raises:
        MediatorBug: the table has no such edge.

    """
    try:
        thing.state = table[thing.state][event]
    except KeyError:
        raise MediatorBug(f"{type(thing).__name__} in {thing.state.name} has no edge {event.name}") from None
