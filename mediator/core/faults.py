"""Three kinds of fault, never mixed (rule R25).

A guest's fault becomes an ABI answer and an event; a fault of the secure world isolates the guest that it
concerns; a fault of the mediator itself stops loudly.
"""

from mediator.core.ledger import OverLimit
from optee.abi.results import Result
from optee.abi.smc import ReturnCode


class GuestFault(Exception):
    """A guest asked for what it cannot have. Never leaves the core."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class CallRefused(GuestFault):
    """The call as a whole is refused: the answer stands in a0 (rule R10). over: the limit that was passed, if any."""

    def __init__(self, code: ReturnCode, why: str | OverLimit) -> None:
        super().__init__(str(why))
        self.code = code
        self.over = why if isinstance(why, OverLimit) else None


class MessageRejected(GuestFault):
    """The message is rejected: a0 is OK, `ret` and origin COMMS are written to the message (rule R10)."""

    def __init__(self, result: Result, why: str | OverLimit) -> None:
        super().__init__(str(why))
        self.result = result
        self.over = why if isinstance(why, OverLimit) else None


class SecureWorldFault(Exception):
    """The secure world broke the contract. Never leaves the core: it isolates one guest."""


class MediatorBug(Exception):
    """An invariant of the mediator failed. Leaves the core: nothing after it can be trusted."""
