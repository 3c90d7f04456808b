"""RPC: what OP-TEE asks of the normal world in the middle of a yielding call.

Source: OP-TEE core behaviour, section 4. An RPC needs an RPC argument: behind the message of
CALL_WITH_RPC_ARG and CALL_WITH_REGD_ARG, else a buffer of 160 bytes got by RPC ALLOC, which is freed at the
end of the call unless the SHM cache is enabled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from hv_models.memory import PAGE_MASK, PAGE_SIZE
from optee.abi.message import HEADER, HEADER_SIZE, NONCONTIG, PARAM, ParamType, message_size
from optee.abi.results import Result
from optee.abi.rpc import RPC_PARAMS, RpcCommand, ShmType
from optee.abi.smc import RpcReturn, from_pair
from optee.errors import TeeError
from optee.steps import Steps
from optee.threads import Thread

if TYPE_CHECKING:
    from optee.normal_world import Window
    from optee.shared_memory import SharedMemory

RPC_ARGUMENT_SIZE: Final = message_size(RPC_PARAMS)

VALUE_INPUT: Final = int(ParamType.VALUE_INPUT)
VALUE_OUTPUT: Final = int(ParamType.VALUE_OUTPUT)
RMEM_INPUT: Final = int(ParamType.RMEM_INPUT)
RMEM_OUTPUT: Final = int(ParamType.RMEM_OUTPUT)
TMEM_INPUT: Final = int(ParamType.TMEM_INPUT)
TMEM_OUTPUT: Final = int(ParamType.TMEM_OUTPUT)

_ALLOC = int(RpcReturn.ALLOC)
_FREE = int(RpcReturn.FREE)
_CMD = int(RpcReturn.CMD)
_SHM_ALLOC = int(RpcCommand.SHM_ALLOC)
_SHM_FREE = int(RpcCommand.SHM_FREE)
_APPL = int(ShmType.APPL)
_ALIGNMENT = 8  # of struct optee_msg_arg and of payload buffers
_PRESET = int(Result.GENERIC)
_BAD_PARAMETERS = int(Result.BAD_PARAMETERS)
_OUT_OF_MEMORY = int(Result.OUT_OF_MEMORY)

_REQUESTS: Final = tuple(
    struct.Struct(HEADER.format + PARAM.format.removeprefix("<") * count) for count in range(RPC_PARAMS + 1)
)
"""A whole RPC argument with so many parameters."""

RpcParam: TypeAlias = tuple[int, ...]
"""Attribute and the three words behind it."""


class Reply(NamedTuple):
    """What the normal world left in the RPC argument."""

    ret: int
    num_params: int
    params: list[RpcParam]


def rpc_command(thread: Thread, command: int, params: Sequence[RpcParam]) -> Steps[Reply]:
    """Send one command; an argument that cannot be had reads as OUT_OF_MEMORY."""
    window = thread.rpc_argument
    if window is None:
        window = yield from _allocate_argument(thread)
        if window is None:
            return Reply(_OUT_OF_MEMORY, 0, [])
    words: list[int] = []
    for param in params:
        if not param[3] and RMEM_INPUT <= param[0] < TMEM_INPUT:
            return Reply(_BAD_PARAMETERS, 0, [])  # a buffer that the normal world gave without a name
        words += param
    count = len(params)
    window.store(0, _REQUESTS[count].pack(command, 0, 0, 0, 0, _PRESET, 0, count, *words))
    buffer = thread.rpc_buffer
    cookie = 0 if buffer is None else buffer.cookie
    yield _CMD, cookie >> 32, cookie & 0xFFFFFFFF
    data = window.load(0, _REQUESTS[count].size)
    header = HEADER.unpack_from(data)
    return Reply(header[5], header[7], list(PARAM.iter_unpack(data[HEADER_SIZE:])))


def _allocate_argument(thread: Thread) -> Steps[Window | None]:
    registers = yield _ALLOC, RPC_ARGUMENT_SIZE, 0
    pa = from_pair(registers[1], registers[2])
    cookie = from_pair(registers[4], registers[5])
    shm = None if pa & PAGE_MASK else thread.partition.shared_memory.add(cookie, (pa,), 0)
    if shm is None:
        if cookie:
            yield _FREE, cookie >> 32, cookie & 0xFFFFFFFF
        return None
    thread.rpc_buffer = thread.rpc_argument = shm
    return shm


def free_argument(thread: Thread) -> Steps[None]:
    """Give back the RPC argument that RPC ALLOC got, if there is one."""
    shm = thread.rpc_buffer
    if shm is None:
        return
    if shm.cookie:
        yield _FREE, shm.cookie >> 32, shm.cookie & 0xFFFFFFFF
    thread.rpc_buffer = thread.rpc_argument = None
    yield from thread.partition.shared_memory.put(thread, shm)


def allocate_payload(thread: Thread, size: int) -> Steps[SharedMemory]:
    """Get a buffer of `size` bytes that tee-supplicant can reach too. Raises TeeError(OUT_OF_MEMORY)."""
    reply = yield from rpc_command(thread, _SHM_ALLOC, ((VALUE_INPUT, _APPL, size, _ALIGNMENT),))
    if reply.ret == 0 and reply.num_params == 1:
        attr, buf_ptr, given, cookie = reply.params[0]
        if given >= size and attr in (TMEM_OUTPUT, TMEM_OUTPUT | NONCONTIG):
            table = thread.partition.shared_memory
            shm = None
            if attr & NONCONTIG:
                shm = table.add_list(buf_ptr, given, cookie)
            elif given <= PAGE_SIZE:
                shm = table.add(cookie, (buf_ptr,), 0)
            if shm is not None:
                return shm
            yield from _send_free(thread, cookie)
    raise TeeError(Result.OUT_OF_MEMORY)


def free_payload(thread: Thread, shm: SharedMemory) -> Steps[None]:
    """Give a payload buffer back."""
    yield from thread.partition.shared_memory.put(thread, shm)
    yield from _send_free(thread, shm.cookie)


def _send_free(thread: Thread, cookie: int) -> Steps[None]:
    yield from rpc_command(thread, _SHM_FREE, ((VALUE_INPUT, _APPL, cookie, 0),))


def cached_payload(thread: Thread, user: str, size: int) -> Steps[SharedMemory]:
    """Get this thread's payload buffer of one kind of user, made larger if need be. Raises TeeError."""
    cached = thread.payloads.get(user)
    if cached is not None:
        if cached.size >= size:
            return cached
        del thread.payloads[user]
        yield from free_payload(thread, cached)
    manager = thread.partition.storage.memory
    if manager is not None:
        kept = manager.rpc_buffers.take(size)
        if kept is not None:
            thread.payloads[user] = kept
            return kept
    size = (size + PAGE_MASK) & ~PAGE_MASK
    thread.payloads[user] = shm = yield from allocate_payload(thread, size)
    return shm


def end_of_call(thread: Thread) -> Steps[None]:
    """Free the payload buffers and, unless it is cached, the RPC argument of a processed message."""
    manager = thread.partition.storage.memory
    while thread.payloads:
        _, shm = thread.payloads.popitem()
        if manager is None or not manager.rpc_buffers.keep(shm):
            yield from free_payload(thread, shm)
    if manager is not None:
        if not thread.partition.sessions.open:
            manager.rpc_buffers.give_up()
        while (surplus := manager.rpc_buffers.surplus()) is not None:
            yield from free_payload(thread, surplus)
    if thread.rpc_buffer is not None and not thread.partition.shm_cache:
        yield from free_argument(thread)
