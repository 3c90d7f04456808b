"""The mediator itself: a sans-IO state machine. `Mediator` is the front; the other modules are its rooms.

Acquisition order, everywhere: ledger charge, record, mediator page, pin. Release runs the other way, and is
synchronous: whatever a guest does, or when it dies, release cannot be left half done.
"""

from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.ports import GuestMemory, SecureWorld, SharedPage
from mediator.core.steps import Event, Forward, Preempt, Queue, Reply, Step

__all__ = [
    "Event",
    "Forward",
    "GuestMemory",
    "Mediator",
    "Policy",
    "Preempt",
    "Queue",
    "Reply",
    "SecureWorld",
    "SharedPage",
    "Step",
]
