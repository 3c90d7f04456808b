"""Yielding calls: messages in argument pages, the call itself with its RPCs, the queue for a secure thread.

Source: Linux 6.1 drivers/tee/optee/call.c and smc_abi.c, as the recordings show them.
"""

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, Protocol

import trio

from guests.memory import PageAllocator
from guests.shm import SharedMemory, list_size, write_page_list
from guests.uninterruptible import Uninterruptible
from guests.vcpus import Vcpus
from hv_models.memory import PAGE_SIZE, GuestRam, Ipa
from optee.abi.message import HEADER, HEADER_SIZE, PARAM, Command, Param, ParamType, message_size
from optee.abi.results import Origin, Result
from optee.abi.rpc import RPC_PARAMS
from optee.abi.smc import Function, Registers, ReturnCode, is_rpc, to_pair

MAX_ARGUMENT_PARAMS: Final = 6
"""Two parameters of OPEN_SESSION and four of the client (Linux' MAX_ARG_PARAM_COUNT)."""

_CODECS: Final = tuple(
    struct.Struct(HEADER.format + PARAM.format.removeprefix("<") * count) for count in range(MAX_ARGUMENT_PARAMS + 1)
)
_NO_HEADER: Final = bytes(HEADER_SIZE)
_RETURN_FROM_RPC: Final = int(Function.RETURN_FROM_RPC)
_OK: Final = int(ReturnCode.OK)
_THREAD_LIMIT: Final = int(ReturnCode.ETHREAD_LIMIT)
_LOW_WORD: Final = 0xFFFFFFFF


class Answer(NamedTuple):
    """A message as it came back. status: a0 of the call (`ReturnCode`); where it is not OK, `ret` and `origin`
    are what Linux makes of that: COMMUNICATION from COMMS.
    """

    ret: int
    origin: int
    session: int
    params: tuple[Param, ...]
    status: int


def _refused(status: int) -> Answer:
    return Answer(Result.COMMUNICATION, Origin.COMMS, 0, (), status)


class CallQueue:
    """Callers that were told ETHREAD_LIMIT, first come first served (Linux' optee_call_queue).

    A caller tries again only after one of this driver's own calls has completed: there is no other sign of a
    thread having become free.
    """

    def __init__(self) -> None:
        self._waiting = trio.lowlevel.ParkingLot()
        self.completed = 0

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return self._waiting.statistics().tasks_waiting

    async def wait(self, completed: int) -> None:
        """Return once more calls have completed than when the refused call was made."""
        if self.completed == completed:
            await self._waiting.park()

    def complete(self) -> None:
        """Note that a call has completed and its thread is free; one waiting caller may try again."""
        self.completed += 1
        if self._waiting:
            self._waiting.unpark()


class ArgumentSlot:
    """A place for one message and, with RPC_ARG, the RPC argument behind it."""

    __slots__ = ("bit", "ipa", "page", "regs")

    def __init__(self, page: "ArgumentPage", bit: int, ipa: int, regs: Registers) -> None:
        self.page = page
        self.bit = bit
        self.ipa = ipa
        self.regs = regs


class ArgumentPage:
    """A page of slots, and which of them are in use."""

    __slots__ = ("shm", "slots", "used")

    def __init__(self, shm: SharedMemory, slot_size: int, count: int, *, rpc_argument: bool) -> None:
        ipa = shm.buffer.pages[0]
        self.shm = shm
        self.used = 0
        self.slots = [
            ArgumentSlot(
                self,
                1 << number,
                ipa + number * slot_size,
                _registered_call(shm, number * slot_size) if rpc_argument else private_call(ipa, False),
            )
            for number in range(count)
        ]


def _registered_call(shm: SharedMemory, offset: int) -> Registers:
    upper, lower = to_pair(shm.cookie)
    return (int(Function.CALL_WITH_REGD_ARG), upper, lower, offset, 0, 0, 0, 0)


def private_call(ipa: int, rpc_argument: bool) -> Registers:
    """Return the registers of a call whose message stands at the start of a page that only the driver knows."""
    function = Function.CALL_WITH_RPC_ARG if rpc_argument else Function.CALL_WITH_ARG
    upper, lower = to_pair(ipa)
    return (int(function), upper, lower, 0, 0, 0, 0, 0)


class ArgumentCache:
    """Argument pages, kept until the driver goes (Linux' optee_shm_arg_cache).

    With RPC_ARG a page is registered and shared by as many messages as fit; without, a page serves one
    message at a time and OP-TEE learns its address from the call.
    """

    def __init__(
        self,
        allocate: Callable[[], SharedMemory],
        register: Callable[[SharedMemory], Awaitable[None]],
        *,
        rpc_argument: bool,
    ) -> None:
        self._allocate = allocate
        self._register = register
        self._rpc_argument = rpc_argument
        self._slot_size = message_size(MAX_ARGUMENT_PARAMS)
        if rpc_argument:
            self._slot_size += message_size(RPC_PARAMS)
        self._slots_per_page = PAGE_SIZE // self._slot_size if rpc_argument else 1
        self._all_used = (1 << self._slots_per_page) - 1
        self._growing = trio.Lock()
        self.pages: list[ArgumentPage] = []

    def get_nowait(self) -> ArgumentSlot | None:
        """Take the first free slot of the newest page that has one; None if all are in use."""
        for page in self.pages:
            used = page.used
            if used != self._all_used:
                bit = (used + 1) & ~used
                page.used = used | bit
                return page.slots[bit.bit_length() - 1]
        return None

    async def grow(self) -> ArgumentSlot:
        """Take a slot, of a new page if there still is none. Raises RegistrationError, OutOfGuestMemoryError."""
        async with self._growing:
            slot = self.get_nowait()
            if slot is not None:
                return slot
            shm = self._allocate()
            if self._rpc_argument:
                await self._register(shm)
            page = ArgumentPage(shm, self._slot_size, self._slots_per_page, rpc_argument=self._rpc_argument)
            self.pages.insert(0, page)
            page.used = 1
            return page.slots[0]

    @staticmethod
    def put(slot: ArgumentSlot) -> None:
        """Give a slot back, when its call has ended."""
        slot.page.used &= ~slot.bit


class Call:
    """What the driver keeps of a call between its SMCs.

    rpc_argument: address of the RPC argument behind the message, 0 without RPC_ARG. ended: OP-TEE has no
    thread at work on it. page_list: pages of the list that the last SHM_ALLOC
    lent.
    """

    __slots__ = ("ended", "page_list", "rpc_argument")

    def __init__(self, rpc_argument: int) -> None:
        self.rpc_argument = rpc_argument
        self.ended = True
        self.page_list: tuple[Ipa, ...] = ()


class RpcServer(Protocol):
    """Who answers what OP-TEE asks in the middle of a call."""

    async def serve(self, call: Call, answer: Registers, regs: Registers) -> Registers:
        """Do what x0..x3 of `answer` ask; return the registers of RETURN_FROM_RPC. `regs`: the SMC before."""
        ...


def resume(answer: Registers, regs: Registers) -> Registers:
    """Return the registers of RETURN_FROM_RPC that tell nothing: a1..a3 as answered, the rest as before."""
    return (_RETURN_FROM_RPC, *answer[1:4], *regs[4:8])


class Caller:
    """Makes yielding calls.

    Cancellation: a call that OP-TEE has begun is always brought to its end, and its answer returned: it is the
    next checkpoint that raises `Cancelled` then. While an RPC waits, `Cancelled` is a signal to the process: that
    wait ends early, the rest of the call is done uninterruptibly. There is no shield on the way of a call without
    RPC: where `Cancelled` comes out of a conduit, the SMC was not executed.
    """

    def __init__(
        self,
        ram: GuestRam,
        allocator: PageAllocator,
        vcpus: Vcpus,
        rpc: RpcServer,
        arguments: ArgumentCache,
        uninterruptible: Uninterruptible,
        *,
        rpc_argument: bool,
    ) -> None:
        self._ram = ram
        self._allocator = allocator
        self._vcpus = vcpus
        self._rpc = rpc
        self._arguments = arguments
        self._uninterruptible = uninterruptible
        self._rpc_argument = rpc_argument
        self.queue = CallQueue()
        self.calls = 0
        self.thread_limits = 0

    async def message(
        self,
        command: int,
        function: int = 0,
        session: int = 0,
        cancel_id: int = 0,
        params: Sequence[tuple[int, int, int, int]] = (),
    ) -> Answer:
        """Send a message of at most six parameters and read it back.

        Raises OutOfGuestMemoryError or RegistrationError where there is no place for the message. A place
        stays taken where the call is lost: OP-TEE may still write there.
        """
        slot = self._arguments.get_nowait() or await self._arguments.grow()
        codec = _CODECS[len(params)]
        words = [word for param in params for word in param]
        data = codec.pack(command, function, session, cancel_id, 0, 0, 0, len(params), *words)
        call = Call(slot.ipa + codec.size if self._rpc_argument else 0)
        try:
            status = await self._exchange(call, slot.ipa, slot.regs, data)
        except trio.Cancelled:
            if call.ended:
                self._arguments.put(slot)
            raise
        self._arguments.put(slot)
        if status != _OK:
            return _refused(status)
        found = codec.unpack(self._ram.read(slot.ipa, codec.size))
        answered = tuple([Param._make(found[at : at + 4]) for at in range(8, len(found), 4)])
        return Answer(found[5], found[6], found[2], answered, _OK)

    async def register(self, shm: SharedMemory) -> Answer:
        """Send REGISTER_SHM, from a page that OP-TEE learns from the call only. Raises OutOfGuestMemoryError."""
        pages = self._allocator.pages(list_size(shm) + 1)
        param = write_page_list(self._ram, pages[:-1], shm)
        return await self._private(Command.REGISTER_SHM, param, pages)

    async def unregister(self, shm: SharedMemory) -> Answer:
        """Send UNREGISTER_SHM in the same way. Raises OutOfGuestMemoryError."""
        param = Param(ParamType.RMEM_INPUT, 0, 0, shm.cookie)
        return await self._private(Command.UNREGISTER_SHM, param, self._allocator.pages(1))

    async def _private(self, command: int, param: Param, pages: tuple[Ipa, ...]) -> Answer:
        """Send a message with one parameter from the last of `pages`; release them when the call has ended.

        The answer has no parameters: what OP-TEE is told in this way it does not change.
        """
        page = pages[-1]
        codec = _CODECS[1]
        data = codec.pack(command, 0, 0, 0, 0, 0, 0, 1, *param)
        call = Call(page + codec.size if self._rpc_argument else 0)
        try:
            status = await self._exchange(call, page, private_call(page, self._rpc_argument), data)
            if status != _OK:
                return _refused(status)
            _, _, session, _, _, ret, origin, _ = HEADER.unpack(self._ram.read(page, HEADER_SIZE))
            return Answer(ret, origin, session, (), _OK)
        finally:
            if call.ended:
                self._allocator.release(pages)

    async def _exchange(self, call: Call, ipa: int, regs: Registers, data: bytes) -> int:
        """Write a message, make its call, and return a0 when that has ended."""
        self._ram.write(ipa, data + _NO_HEADER if self._rpc_argument else data)
        self.calls += 1
        return await self._run(call, regs)

    async def _run(self, call: Call, regs: Registers) -> int:
        """Make the call, answer its RPCs, and return a0 when it has ended."""
        queue = self.queue
        smc = self._vcpus.call
        while True:
            completed = queue.completed
            try:
                answer = await smc(regs)
            except trio.Cancelled:
                if call.ended or self._uninterruptible.dead:
                    raise
                return await self._finish(call, regs)
            a0 = answer[0] & _LOW_WORD
            if a0 == _THREAD_LIMIT:
                self.thread_limits += 1
                await queue.wait(completed)
            elif a0 != _OK and is_rpc(a0):
                call.ended = False
                try:
                    regs = await self._rpc.serve(call, answer, regs)
                except trio.Cancelled:
                    if self._uninterruptible.dead:
                        raise
                    return await self._finish(call, resume(answer, regs))
            else:
                break
        call.ended = True
        if call.page_list:
            self._allocator.release(call.page_list)
        queue.complete()
        return a0

    async def _finish(self, call: Call, regs: Registers) -> int:
        """Go on with a call that OP-TEE has begun, although the caller is cancelled."""
        with self._uninterruptible.scope():
            return await self._run(call, regs)
