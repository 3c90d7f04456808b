"""The live objects of one guest: the guest itself, its calls, its shared buffers, its RPC arguments.

Acquisition order is ledger, record, mediator page, pin; release runs backwards. Release is synchronous, so a
guest that dies at any moment can never leave it half done.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, Final

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Pinned, Reason, Stage2Fault
from mediator.core.flow import Lane, Place
from mediator.core.ledger import Charge, Ledger
from mediator.core.policy import PolicyLimits
from mediator.core.ports import GuestMemory, SharedPage
from mediator.core.states import ArgumentState, BufferState, CallState, GuestState
from mediator.core.steps import Event, Regs, Step, Ticket
from optee.abi.message import Command
from optee.abi.smc import Cookie, Function, ThreadId, VmId

_PINNED: Final = BufferState.PINNED
_TRANSLATING: Final = CallState.TRANSLATING
_NO_IPA: Final = Ipa(0)
_NO_COOKIE: Final = Cookie(0)


class Guest:
    """One VM. `vm` is OP-TEE's client id in a7, never the hardware's VMID."""

    __slots__ = (
        "arguments",
        "buffers",
        "calls",
        "counters",
        "events",
        "in_flight",
        "lane",
        "ledger",
        "limits",
        "memory",
        "next_call",
        "notifications",
        "rpmb",
        "state",
        "suspended",
        "vm",
    )

    def __init__(self, vm: VmId, memory: GuestMemory, ledger: Ledger, limits: PolicyLimits, *, rpmb: bool) -> None:
        self.vm = vm
        self.memory = memory
        self.ledger = ledger
        self.limits = limits
        """As they were asked for; the ledger has what became of them."""
        self.rpmb = rpmb
        """The RPMB device is this guest's: OP-TEE's requests for it are delivered."""
        self.state = GuestState.CREATING
        self.calls: dict[int, Call] = {}
        self.suspended: dict[ThreadId, Call] = {}
        self.buffers: dict[Cookie, Shared] = {}
        self.arguments: dict[Cookie, RpcArgument] = {}
        self.counters = Counters()
        self.events: deque[Event] = deque()
        self.in_flight = 0
        self.next_call = 0
        self.notifications = False
        self.lane = Lane(ledger)
        """Where its calls wait, if there is flow control."""


class Counters:
    """What a guest did, since its creation. refusals: `refused` by resource; last_refusal: the detail of its event."""

    __slots__ = (
        "calls", "denied", "forwarded", "last_refusal", "refusals", "refused", "rejected", "rpcs", "translated"
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls = 0
        self.forwarded = 0
        self.rpcs = 0
        self.denied = 0
        self.refused = 0
        self.refusals: dict[str, int] = {}
        self.last_refusal: dict[str, Any] | None = None
        self.rejected = 0
        self.translated = 0


class Shared:
    """Memory that one message shares with OP-TEE: a buffer that is registered or offered, or its temporary buffers.

    They come and go together. `pages` counts those of each buffer, by cookie; all of them are `pinned`, and `written`
    says that OP-TEE may write some. `lists` are our own page lists, which OP-TEE has for a while, the first `filled` of
    them filled in. `offset` is that of the first byte in the first page of the last buffer.
    """

    __slots__ = ("charge", "filled", "lists", "offset", "pages", "pinned", "state", "written")

    def __init__(self) -> None:
        self.state = _PINNED
        self.charge: Charge | None = None
        self.pages: dict[Cookie, int] = {}
        self.offset = 0
        self.pinned: list[Pinned] = []
        self.written = False
        self.lists: list[SharedPage] = []
        self.filled = 0

    def load(self, memory: GuestMemory, offset: int, size: int) -> bytes:
        """Copy bytes of a registered buffer, `offset` counted from its first page; both were checked."""
        if len(self.pinned) == 1:
            return memory.load(self.pinned[0], offset, size)
        parts = []
        for pinned in self.pinned:
            length = len(pinned.pas) * PAGE_SIZE
            if offset < length and size:
                part = memory.load(pinned, offset, min(size, length - offset))
                parts.append(part)
                size -= len(part)
                offset = length
            offset -= length
        return b"".join(parts)

    def store_fields(self, memory: GuestMemory, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """Write fields of `data`, of a message `base` bytes behind the start of the first page; all was checked."""
        first = 0
        for pinned in self.pinned:
            length = len(pinned.pas) * PAGE_SIZE
            if first <= base and base + len(data) <= first + length:
                memory.store_fields(pinned, base - first, data, fields)
                return
            for field in fields:
                start = base + field.start - first
                part = data[field][max(-start, 0) : max(length - start, 0)]
                if part:
                    memory.store_fields(pinned, max(start, 0), part, (slice(0, len(part)),))
            first += length


class RpcArgument:
    """The page a guest gave for RPC requests, and our own page that OP-TEE sees instead."""

    __slots__ = ("charge", "cookie", "ipa", "page", "pinned", "state")

    def __init__(self, cookie: Cookie, ipa: Ipa, pinned: Pinned, page: SharedPage, charge: Charge) -> None:
        self.cookie = cookie
        self.ipa = ipa
        self.pinned = pinned
        self.page = page
        self.charge = charge
        self.state = ArgumentState.LIVE


class Call(Ticket):
    """A yielding call, from its SMC to its end. It owns the buffers it made (rule R13): `shared`.

    The message has `size` bytes. It lies in the guest page at `ipa`, which is looked up anew for each access (rule
    R14), or else at `place`. `outputs` are the fields of its parameters that the guest gets back, `temporary` the
    offsets of temporary memory references, `written` the cookies of registered buffers that OP-TEE may write.
    `rpc` is the a0 of the RPC that suspended the call, `rpc_words` its a1 and a2 (saved, rule R16). `rpc_offset` is
    where the RPC argument stands behind the message in the shadow, and `rpc_room` how many bytes it has there; 0 if the
    guest gives arguments by RPC ALLOC.
    `cookie` is what UNREGISTER_SHM names. `turn` is its place with flow control, None without.
    """

    __slots__ = (
        "allocated",
        "argument",
        "charge",
        "command",
        "cookie",
        "function",
        "guest",
        "id",
        "ipa",
        "outputs",
        "place",
        "registering",
        "regs",
        "rpc",
        "rpc_offset",
        "rpc_room",
        "rpc_words",
        "shadow",
        "shared",
        "shm_type",
        "size",
        "state",
        "temporary",
        "thread",
        "turn",
        "undelivered",
        "unregistering",
        "work",
        "written",
    )

    def __init__(self, guest: Guest, regs: Regs, function: Function, charge: Charge) -> None:
        guest.next_call += 1
        self.id = guest.next_call
        self.guest = guest
        self.regs = regs
        self.function = function
        self.charge = charge
        self.state = _TRANSLATING
        self.command: Command | None = None
        self.ipa = _NO_IPA
        self.place: BufferPlace | None = None
        self.size = 0
        self.shadow: SharedPage | None = None
        self.outputs: tuple[slice, ...] = ()
        self.temporary: tuple[int, ...] = ()
        self.written: list[Cookie] = []
        self.shared: Shared | None = None
        self.registering: Shared | None = None
        self.unregistering: Shared | None = None
        self.allocated: Shared | None = None
        self.cookie = _NO_COOKIE
        self.thread: ThreadId | None = None
        self.rpc = 0
        self.rpc_words = (0, 0)
        self.rpc_offset = 0
        self.rpc_room = 0
        self.argument: RpcArgument | None = None
        self.shm_type = 0
        self.undelivered = 0
        self.turn: Place | None = None
        self.work: Generator[None, None, Step] | None = None
        guest.calls[self.id] = self

    def write(self, offset: int, data: bytes, fields: Sequence[slice]) -> None:
        """Write fields of `data`, which belongs `offset` bytes behind the message's start. Raises Stage2Fault."""
        if self.place is None:
            self.guest.memory.write_fields(Ipa(self.ipa + offset), data, fields)
        else:
            self.place.write(self.guest.memory, offset, data, fields)

    def read(self, offset: int, size: int) -> bytes:
        """Copy bytes, `offset` counted from the message's start. Raises Stage2Fault."""
        if self.place is None:
            return self.guest.memory.read(Ipa(self.ipa + offset), size)
        return self.place.read(self.guest.memory, offset, size)


class BufferPlace:
    """A message inside a registered buffer (CALL_WITH_REGD_ARG), reached through its pins."""

    __slots__ = ("buffer", "offset")

    def __init__(self, buffer: Shared, offset: int) -> None:
        self.buffer = buffer
        self.offset = offset

    def write(self, memory: GuestMemory, offset: int, data: bytes, fields: Sequence[slice]) -> None:
        """See `Call`. The guest may have unregistered the buffer meanwhile: its pages are its own again."""
        self._check()
        self.buffer.store_fields(memory, self.offset + offset, data, fields)

    def read(self, memory: GuestMemory, offset: int, size: int) -> bytes:
        """See `Call`."""
        self._check()
        return self.buffer.load(memory, self.offset + offset, size)

    def _check(self) -> None:
        if self.buffer.state is BufferState.RELEASED:
            raise Stage2Fault(self.offset, Reason.UNMAPPED)
