"""TA contexts (instances) and sessions: what OP-TEE knows of a loaded TA and of who uses it.

Source: OP-TEE core behaviour, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from optee.abi.results import TaFlag
from optee.parameters import Params
from optee.set_ups import SetUp
from optee.storage.handles import Handles
from optee.ta_memory import TaMemory
from optee.tee import Tee
from optee.threads import Thread
from optee.wait_queue import Condition, Mutex

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

_SINGLE_AND_ALIVE: Final = int(TaFlag.SINGLE_INSTANCE | TaFlag.INSTANCE_KEEP_ALIVE)
_KEEP_CRASHED: Final = int(TaFlag.INSTANCE_KEEP_CRASHED)


@dataclass(frozen=True, slots=True)
class Client:
    """Who opens a session: the login method and the UUID that goes with it."""

    login: int
    uuid: UUID


class Instance:
    """A TA context: one loaded instance of a TA and what it holds."""

    __slots__ = (
        "busy",
        "created",
        "flags",
        "handles",
        "heap_biggest_failure",
        "heap_failures",
        "heap_peak",
        "heap_used",
        "heap_used_at_failure",
        "idle",
        "initializing",
        "live",
        "memory",
        "opened",
        "panicked",
        "params",
        "references",
        "set_ups",
        "stack_peak",
        "stack_used",
        "ta",
        "tables",
        "uuid",
    )

    def __init__(self, uuid: UUID, mutex: Mutex) -> None:
        self.uuid = uuid
        self.ta: TrustedApplication
        self.flags = 0
        self.references = 1
        self.initializing = True
        self.panicked = False
        self.busy = False
        self.idle = Condition(mutex)
        self.created = False
        """TA_CreateEntryPoint has run, TA_DestroyEntryPoint has not."""
        self.live: set[Session] = set()
        """Sessions that the TA itself knows: it accepted their open and has not seen their close."""
        self.opened: dict[int, Session] = {}
        """Sessions of this TA with other TAs."""
        self.handles = Handles()
        """Persistent objects and enumerators that it has open."""
        self.params: Params = ()
        """Parameters of the call that runs in it."""
        self.memory: TaMemory | None = None
        self.tables = 0
        """Translation tables of the pool that it holds now."""
        self.set_ups: dict[SetUp, None] = {}
        """Keys and operations that it has allocated."""
        self.heap_used = self.heap_peak = 0
        self.heap_failures = self.heap_biggest_failure = self.heap_used_at_failure = 0
        self.stack_used = self.stack_peak = 0

    def free_memory(self) -> None:
        """Give back what it has taken of TA RAM and of the core's heap."""
        for set_up in list(self.set_ups):
            set_up.free()
        if self.memory is not None:
            self.memory.free()
            self.memory = None

    @property
    def keeps_alive(self) -> bool:
        """Stays without sessions."""
        return self.flags & _SINGLE_AND_ALIVE == _SINGLE_AND_ALIVE

    @property
    def keeps_crashed(self) -> bool:
        """Stays after a panic, so that new opens answer TARGET_DEAD."""
        return self.keeps_alive and bool(self.flags & _KEEP_CRASHED)

    def below_stack(self) -> int:
        """Virtual address just below the stack."""
        return self.memory.stack_base - 8 if self.memory is not None else 0


class Session:
    """A client's session with a TA."""

    __slots__ = (
        "cancel_masked",
        "cancelled",
        "client",
        "holder",
        "id",
        "instance",
        "let_go",
        "lock",
        "memory",
        "references",
        "tee",
        "unlinked",
    )

    def __init__(self, number: int, client: Client, thread: Thread, mutex: Mutex, memory: int) -> None:
        self.id = number
        self.memory = memory
        """Where it lies in the core's heap."""
        self.client = client
        self.instance: Instance
        self.tee = Tee(self, thread)
        self.cancelled = False
        self.cancel_masked = True
        self.holder: Thread | None = thread
        """The thread whose call runs in this session; at first the one that opens it."""
        self.references = 2
        """One of the list that the session is in, one of the holder, and one of each that waits to be it."""
        self.unlinked = False
        self.lock = Condition(mutex)
        self.let_go = Condition(mutex)
