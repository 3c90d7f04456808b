"""What OP-TEE asks in the middle of a call, and how the guest's kernel answers.

Source: Linux 6.1 optee/rpc.c, supp.c and smc_abi.c, as the recordings show them: what each RPC's parameters are
stands in `optee.abi.operands`.
"""

import struct
from collections.abc import Sequence
from typing import Final

import trio

from guests.calls import Call, resume
from guests.clock import Clock
from guests.errors import KernelPanicError, OutOfGuestMemoryError
from guests.memory import Buffer, PageAllocator
from guests.notifications import Notifications
from guests.shm import SharedMemory, SharedMemoryTable, list_size, write_page_list
from guests.supplicant_device import MemoryParam, RpcParam, SupplicantDevice, ValueParam
from hv_models.memory import PAGE_SIZE, GuestRam
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    OFFSET_RET,
    PARAM,
    TYPE_MASK,
    Param,
    ParamType,
    message_size,
)
from optee.abi.results import Origin, Result
from optee.abi.rpc import RPC_PARAMS, NotificationOperation, RpcCommand, ShmType
from optee.abi.smc import Function, Registers, RpcReturn, from_pair, to_pair

_ARGUMENT_SIZE: Final = message_size(RPC_PARAMS)
_RETURN_FROM_RPC: Final = int(Function.RETURN_FROM_RPC)
_LOW_WORD: Final = 0xFFFFFFFF
_RESULT: Final = struct.Struct("<2I")
_REPLIES: Final = tuple(
    struct.Struct("<3I" + PARAM.format.removeprefix("<") * count) for count in range(RPC_PARAMS + 1)
)
"""From `ret` to the end of an RPC argument: ret, ret_origin, num_params, parameters."""

_VALUE_INPUT: Final = int(ParamType.VALUE_INPUT)
_VALUES: Final = frozenset(range(ParamType.NONE, ParamType.VALUE_INOUT + 1))
_REGISTERED: Final = int(ParamType.RMEM_INPUT) - 1
_TEMPORARY: Final = int(ParamType.TMEM_INPUT) - 1
_DIRECTIONS: Final = {base + direction: direction for base in (_REGISTERED, _TEMPORARY) for direction in (1, 2, 3)}


class RpcHandler:
    """Answers RPCs: memory, time, sleep and notifications itself, everything else through the supplicant."""

    def __init__(
        self,
        ram: GuestRam,
        allocator: PageAllocator,
        shms: SharedMemoryTable,
        notifications: Notifications,
        clock: Clock,
        supplicant: SupplicantDevice,
    ) -> None:
        self._ram = ram
        self._allocator = allocator
        self._shms = shms
        self._notifications = notifications
        self._clock = clock
        self._supplicant = supplicant
        self._answers = {
            int(RpcCommand.SHM_ALLOC): self._shm_alloc,
            int(RpcCommand.SHM_FREE): self._shm_free,
            int(RpcCommand.GET_TIME): self._get_time,
            int(RpcCommand.SUSPEND): self._suspend,
            int(RpcCommand.NOTIFICATION): self._notify,
        }
        self.foreign_interrupts = 0
        self.commands = 0

    async def serve(self, call: Call, answer: Registers, regs: Registers) -> Registers:
        """Do what x0..x3 of `answer` ask; return the registers of RETURN_FROM_RPC. `regs`: the SMC before.

        Where `Cancelled` comes out, the RPC is answered all the same. Raises KernelPanicError for a cookie that
        Linux would follow to nowhere.
        """
        function = answer[0] & _LOW_WORD
        if function == RpcReturn.FOREIGN_INTR:
            self.foreign_interrupts += 1
            await trio.lowlevel.cancel_shielded_checkpoint()
        elif function == RpcReturn.CMD:
            self.commands += 1
            await self._command(call, self._argument(call, answer))
        elif function == RpcReturn.ALLOC:
            return self._allocate(answer)
        elif function == RpcReturn.FREE:
            self.free_cookie(from_pair(answer[1], answer[2]))
        return resume(answer, regs)

    def allocate_private(self, size: int) -> SharedMemory:
        """Take adjacent pages that OP-TEE learns by address only. Raises OutOfGuestMemoryError."""
        pages = self._allocator.run(-(-size // PAGE_SIZE)) if size > PAGE_SIZE else self._allocator.pages(1)
        return self._shms.add(Buffer(self._ram, pages, len(pages) * PAGE_SIZE), private=True)

    def free_private(self, shm: SharedMemory) -> None:
        """Give such pages back."""
        self._shms.discard(shm)
        self._allocator.release(shm.buffer.pages)

    def free_cookie(self, cookie: int) -> None:
        """Give back what OP-TEE names by cookie. Raises KernelPanicError for a cookie that names nothing."""
        self.free_private(self._follow(cookie))

    def _follow(self, cookie: int) -> SharedMemory:
        shm = self._shms.get(cookie)
        if shm is None:
            raise KernelPanicError(f"cookie {cookie:#x} is no shared memory of this driver")
        return shm

    def _allocate(self, answer: Registers) -> Registers:
        """RPC ALLOC: a page for RPC arguments, by address and cookie; address 0 where there is no memory."""
        try:
            shm = self.allocate_private(answer[1])
        except OutOfGuestMemoryError:
            return (_RETURN_FROM_RPC, 0, 0, answer[3], 0, 0, 0, 0)
        address, cookie = to_pair(shm.buffer.pages[0]), to_pair(shm.cookie)
        return (_RETURN_FROM_RPC, *address, answer[3], *cookie, 0, 0)

    def _argument(self, call: Call, answer: Registers) -> int:
        """Return the address of the RPC argument."""
        if call.rpc_argument:
            return call.rpc_argument
        return self._follow(from_pair(answer[1], answer[2])).buffer.pages[0]

    async def _command(self, call: Call, at: int) -> None:
        data = self._ram.read(at, _ARGUMENT_SIZE)
        command, *_, count = HEADER.unpack_from(data)
        if count > RPC_PARAMS:
            self._reply(at, Result.BAD_PARAMETERS)
            return
        params = [Param._make(words) for words in PARAM.iter_unpack(data[HEADER_SIZE : message_size(count)])]
        answer = self._answers.get(command)
        if answer is None:
            await self._ask_supplicant(at, command, params)
        else:
            await answer(call, at, params)

    def _reply(self, at: int, ret: int, params: Sequence[Param] = (), origin: int | None = None) -> None:
        """Write `ret`, and what else an answer consists of, into the RPC argument."""
        if origin is None:
            self._ram.write(at + OFFSET_RET, ret.to_bytes(4, "little"))
        elif not params:
            self._ram.write(at + OFFSET_RET, _RESULT.pack(ret, origin))
        else:
            words: list[int] = []
            for param in params:
                words += param
            self._ram.write(at + OFFSET_RET, _REPLIES[len(params)].pack(ret, origin, len(params), *words))

    async def _get_time(self, call: Call, at: int, params: list[Param]) -> None:
        if _kinds(params) != [ParamType.VALUE_OUTPUT]:
            self._reply(at, Result.BAD_PARAMETERS)
            return
        seconds, nanoseconds = self._clock.now()
        self._ram.write(at + HEADER_SIZE, PARAM.pack(params[0].attr, seconds, nanoseconds, params[0].c))
        self._reply(at, Result.SUCCESS)

    async def _suspend(self, call: Call, at: int, params: list[Param]) -> None:
        if _kinds(params) != [ParamType.VALUE_INPUT]:
            self._reply(at, Result.BAD_PARAMETERS)
            return
        try:
            await trio.sleep(params[0].a / 1000)
        finally:
            self._reply(at, Result.SUCCESS)

    async def _notify(self, call: Call, at: int, params: list[Param]) -> None:
        good = _kinds(params) == [ParamType.VALUE_INPUT] and await self._notification(params[0])
        self._reply(at, Result.SUCCESS if good else Result.BAD_PARAMETERS)

    async def _notification(self, param: Param) -> bool:
        if param.a == NotificationOperation.WAIT:
            return await self._notifications.wait(param.b)
        return param.a == NotificationOperation.SEND and self._notifications.send(param.b)

    async def _shm_alloc(self, call: Call, at: int, params: list[Param]) -> None:
        self._allocator.release(call.page_list)
        call.page_list = ()
        result: int = Result.BAD_PARAMETERS
        reply: tuple[Param, ...] = ()
        if len(params) == 1 and params[0].attr == ParamType.VALUE_INPUT:
            kind, size = params[0].a, params[0].b
            try:
                if kind == ShmType.KERNEL:
                    shm = self.allocate_private(size)
                    reply = (Param(ParamType.TMEM_OUTPUT, shm.buffer.pages[0], shm.buffer.size, shm.cookie),)
                    result = Result.SUCCESS
                elif kind == ShmType.APPL:
                    reply = (await self._allocate_in_supplicant(call, at, size),)
                    result = Result.SUCCESS
            except OutOfGuestMemoryError:
                result = Result.OUT_OF_MEMORY
        self._reply(at, result, reply, Origin.COMMS)

    async def _allocate_in_supplicant(self, call: Call, at: int, size: int) -> Param:
        """Have the supplicant share a buffer, and list its pages. Raises OutOfGuestMemoryError."""
        value = ValueParam(ParamType.VALUE_INOUT, int(ShmType.APPL), size, 0)
        try:
            result = await self._supplicant.request(RpcCommand.SHM_ALLOC, [value])
        except trio.Cancelled:
            self._reply(at, Result.OUT_OF_MEMORY, origin=Origin.COMMS)
            raise
        shm = self._supplicant.take(value.c) if result == Result.SUCCESS else None
        if shm is None:
            raise OutOfGuestMemoryError(f"the supplicant gave no memory: {result:#x}")
        try:
            call.page_list = self._allocator.pages(list_size(shm))
        except OutOfGuestMemoryError:
            await self._free_in_supplicant(shm)
            raise
        return write_page_list(self._ram, call.page_list, shm)

    async def _free_in_supplicant(self, shm: SharedMemory) -> None:
        value = ValueParam(ParamType.VALUE_INOUT, int(ShmType.APPL), self._supplicant.put(shm), 0)
        await self._supplicant.request(RpcCommand.SHM_FREE, [value])

    async def _shm_free(self, call: Call, at: int, params: list[Param]) -> None:
        kind = params[0].a if len(params) == 1 and params[0].attr == ParamType.VALUE_INPUT else None
        known = kind in (ShmType.KERNEL, ShmType.APPL)
        # The answer does not depend on the supplicant's, so it may stand there before that one is asked.
        self._reply(at, Result.SUCCESS if known else Result.BAD_PARAMETERS, origin=Origin.COMMS)
        if kind == ShmType.KERNEL:
            self.free_cookie(params[0].b)
        elif kind == ShmType.APPL:
            await self._free_in_supplicant(self._follow(params[0].b))

    async def _ask_supplicant(self, at: int, command: int, params: list[Param]) -> None:
        request = self._to_request(params)
        if request is None:
            self._reply(at, Result.BAD_PARAMETERS, origin=Origin.COMMS)
            return
        try:
            ret = await self._supplicant.request(command, request)
        except trio.Cancelled:
            self._reply(at, Result.COMMUNICATION, origin=Origin.COMMS)
            raise
        replies = tuple([_from_request(param, before) for param, before in zip(request, params, strict=True)])
        self._reply(at, ret, replies, Origin.COMMS)

    def _to_request(self, params: list[Param]) -> list[RpcParam] | None:
        """Turn parameters into what a supplicant sees; None for a type that the kernel does not know."""
        request: list[RpcParam] = []
        for attr, a, b, c in params:
            kind = attr & TYPE_MASK
            if kind in _VALUES:
                request.append(ValueParam(kind, a, b, c))
            elif kind in _DIRECTIONS:
                shm = self._follow(c) if c else None
                if shm is None:
                    a = 0
                elif kind >= _TEMPORARY:
                    a -= shm.buffer.pages[0]
                request.append(MemoryParam(_DIRECTIONS[kind], shm, a, b))
            else:
                return None
        return request


def _kinds(params: list[Param]) -> list[int]:
    return [param.attr & TYPE_MASK for param in params]


def _from_request(param: RpcParam, before: Param) -> Param:
    """Turn a parameter back; memory takes the type of its buffer, so a NULL one becomes TMEM."""
    if isinstance(param, ValueParam):
        return before if param.kind == _VALUE_INPUT else Param(param.kind, param.a, param.b, param.c)
    shm = param.shm
    if shm is None:
        return Param(_TEMPORARY + param.direction, 0, param.size, 0)
    if shm.private:
        return Param(_TEMPORARY + param.direction, shm.buffer.pages[0] + param.offset, param.size, shm.cookie)
    return Param(_REGISTERED + param.direction, param.offset, param.size, shm.cookie)
