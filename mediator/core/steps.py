"""What the core answers: steps for the shell to take, and the events that happened on the way."""

from typing import Any, Final, NamedTuple

Regs = tuple[int, ...]


class Event(NamedTuple):
    """Something worth telling: `name` is one of the constants of this module, `detail` is JSON-able."""

    name: str
    level: str
    vm: int
    detail: dict[str, Any]


# A guest can cause events of level "info" at most (rule R25).
GUEST_CREATED: Final = "guest_created"
GUEST_REFUSED: Final = "guest_refused"
GUEST_DESTROYED: Final = "guest_destroyed"
GUEST_ISOLATED: Final = "guest_isolated"
GUEST_QUARANTINED: Final = "guest_quarantined"
LIMITS_CHANGED: Final = "limits_changed"
POOL_CHANGED: Final = "pool_changed"
CALL_DENIED: Final = "call_denied"
CALL_QUEUED: Final = "call_queued"
CALL_ADMITTED: Final = "call_admitted"
CALL_REFUSED: Final = "call_refused"
CALL_REJECTED: Final = "call_rejected"
PAGES_PINNED: Final = "pages_pinned"
PAGES_UNPINNED: Final = "pages_unpinned"
RPC_UNDELIVERED: Final = "rpc_undelivered"
RPC_REPLY_REPLACED: Final = "rpc_reply_replaced"
SECURE_WORLD_FAULT: Final = "secure_world_fault"


class Step:
    """What the shell has to do next; `events` happened before."""

    __slots__ = ("events",)

    events: tuple[Event, ...]


class Reply(Step):
    """Return to the guest (or to the host, for its own requests) with x0..x7."""

    __slots__ = ("regs",)

    def __init__(self, regs: Regs) -> None:
        self.events = ()
        self.regs = regs

    def __repr__(self) -> str:
        return f"Reply({', '.join(map(hex, self.regs))})"


class Ticket:
    """Names a request that is not answered yet; the shell hands it back, and looks at nothing in it."""

    __slots__ = ()


class Forward(Step):
    """Issue an SMC with x0..x7 to the secure world, then call `Mediator.returned(ticket, answer)`."""

    __slots__ = ("regs", "ticket")

    def __init__(self, regs: Regs, ticket: Ticket) -> None:
        self.events = ()
        self.regs = regs
        self.ticket = ticket

    def __repr__(self) -> str:
        return f"Forward({', '.join(map(hex, self.regs))})"


class Queue(Step):
    """Wait until `until` holds. Without a ticket nothing was done: make the same request again then.

    With a ticket the call has a place in the queue. `Mediator.proceed(ticket)` goes on with it once `Mediator.turns`
    has named it; until then, after the policy's `park` at most, `Mediator.give_back(ticket)` lets its vCPU go.
    """

    __slots__ = ("ticket", "until")

    def __init__(self, until: str, ticket: Ticket | None = None) -> None:
        self.events = ()
        self.until = until
        self.ticket = ticket


class Preempt(Step):
    """A bounded piece of long work is done: let others have a turn, then call `Mediator.proceed(ticket)` (R23)."""

    __slots__ = ("ticket",)

    def __init__(self, ticket: Ticket) -> None:
        self.events = ()
        self.ticket = ticket
