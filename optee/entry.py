"""Entry of a yielding call: find the message, check it, carry out its command, write the result.

Source: OP-TEE core behaviour, sections 3, 5 and 6; the measured answers of a real OP-TEE.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final
from uuid import UUID

from hv_models.memory import PAGE_SIZE
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    META,
    NONCONTIG,
    OFFSET_RET,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    Command,
    Login,
    ParamType,
)
from optee.abi.results import Origin, Result
from optee.abi.smc import Function, ReturnCode, from_pair
from optee.errors import TeeError
from optee.normal_world import Window
from optee.parameters import NO_PARAMS, Memref, Params, Value, from_message
from optee.rpc import RPC_ARGUMENT_SIZE, end_of_call, free_argument
from optee.steps import WORK, Steps
from optee.ta_context import Client
from optee.threads import Thread

if TYPE_CHECKING:
    from optee.partition import Partition
    from optee.shared_memory import SharedMemory

_OK: Final = int(ReturnCode.OK)
_EBADADDR: Final = int(ReturnCode.EBADADDR)
_EBADCMD: Final = int(ReturnCode.EBADCMD)

_CALL_WITH_ARG: Final = int(Function.CALL_WITH_ARG)
_CALL_WITH_RPC_ARG: Final = int(Function.CALL_WITH_RPC_ARG)
_CALL_WITH_REGD_ARG: Final = int(Function.CALL_WITH_REGD_ARG)

_OPEN_SESSION: Final = int(Command.OPEN_SESSION)
_INVOKE_COMMAND: Final = int(Command.INVOKE_COMMAND)
_CLOSE_SESSION: Final = int(Command.CLOSE_SESSION)
_CANCEL: Final = int(Command.CANCEL)
_REGISTER_SHM: Final = int(Command.REGISTER_SHM)
_UNREGISTER_SHM: Final = int(Command.UNREGISTER_SHM)
_DO_BOTTOM_HALF: Final = int(Command.DO_BOTTOM_HALF)
_STOP_ASYNC_NOTIF: Final = int(Command.STOP_ASYNC_NOTIF)

_TEE: Final = int(Origin.TEE)
_BAD_PARAMETERS: Final = int(Result.BAD_PARAMETERS)
_DEAD: Final = (int(Result.TARGET_DEAD), _TEE)

_META_VALUE: Final = META | ParamType.VALUE_INPUT
_REGISTER_ATTR: Final = NONCONTIG | ParamType.TMEM_OUTPUT
_NIL_UUID: Final = UUID(int=0)
_ANONYMOUS_LOGINS: Final = frozenset({int(Login.PUBLIC), int(Login.REE_KERNEL)})
_NAMED_LOGINS: Final = frozenset(
    map(int, (Login.USER, Login.GROUP, Login.APPLICATION, Login.APPLICATION_USER, Login.APPLICATION_GROUP))
)

_WORD: Final = struct.Struct("<I")
_RESULT: Final = struct.Struct("<II")  # ret, ret_origin
_VALUES: Final = struct.Struct("<QQ")  # a, b
_SIZE: Final = struct.Struct("<Q")
_UUID: Final = struct.Struct("<QQ")
_OFFSET_VALUES: Final = HEADER_SIZE + 8  # of the words behind the first attribute
_OFFSET_SIZE: Final = _OFFSET_VALUES + 8
_OUTPUT: Final = 2  # bit of a parameter kind that is set where something is written back

_USUAL_SIZE: Final = HEADER_SIZE + 4 * PARAM_SIZE  # most messages are read in one go

_Words = list[tuple[int, ...]]


def yielding_call(thread: Thread, function: int, a1: int, a2: int, a3: int) -> Steps[int]:
    """Run a yielding call from its entry to its end: the a0 of its answer."""
    partition = thread.partition
    if not partition.runtime_ready:
        yield from _initialise_runtime(thread)
    manager = partition.storage.memory
    if manager is not None:
        manager.collector.enter(partition.world.milliseconds())
    held: SharedMemory | None = None
    if function in (_CALL_WITH_ARG, _CALL_WITH_RPC_ARG):
        message = _map_message(partition, from_pair(a1, a2))
    elif function == _CALL_WITH_REGD_ARG:
        held = partition.shared_memory.find(from_pair(a1, a2))
        message = None if held is None else _map_in_buffer(held, a3 & 0xFFFFFFFF)
    else:
        return _EBADCMD
    code = _EBADADDR
    if message is not None:
        code = yield from _processed(thread, message, with_rpc_argument=function != _CALL_WITH_ARG)
    if held is not None:
        yield from partition.shared_memory.put(thread, held)
    return code


def _initialise_runtime(thread: Thread) -> Steps[None]:
    """Initialise services and drivers in a guest's first yielding call; a second call waits for it."""
    partition = thread.partition
    yield from partition.runtime.lock(thread)
    if not partition.runtime_ready:
        yield WORK
        partition.runtime_ready = True
    yield from partition.runtime.unlock(thread)


def _map_message(partition: Partition, pa: int) -> Window | None:
    normal_world = partition.world.normal_world
    if normal_world.has_reserved and normal_world.reserved_window(pa, HEADER_SIZE) is not None:
        return normal_world.reserved_rest(pa) if not pa & 7 else None
    if not normal_world.is_page(pa):
        return None
    return Window(normal_world.memory, (pa,), 0, PAGE_SIZE)


def _map_in_buffer(shm: SharedMemory, offset: int) -> Window | None:
    if (shm.start + offset) & 7 or offset + HEADER_SIZE > shm.size:
        return None
    return shm.part(offset, shm.size - offset)


def _processed(thread: Thread, message: Window, *, with_rpc_argument: bool) -> Steps[int]:
    """Check the message's size and carry it out."""
    data = message.load(0, min(message.size, _USUAL_SIZE))
    command, function, number, *_, num_params = HEADER.unpack_from(data)
    if num_params > MAX_PARAMS:
        return _EBADADDR
    size = HEADER_SIZE + num_params * PARAM_SIZE
    if size + (RPC_ARGUMENT_SIZE if with_rpc_argument else 0) > message.size:
        return _EBADADDR
    data = data[:size] if size <= len(data) else data + message.load(len(data), size - len(data))
    if with_rpc_argument:
        if thread.rpc_buffer is not None:
            yield from free_argument(thread)
        thread.rpc_argument = message.part(size, RPC_ARGUMENT_SIZE)
    partition = thread.partition
    if partition.world.interrupt_pending is not None:
        yield WORK
    words = list(PARAM.iter_unpack(data[HEADER_SIZE:]))
    code = _OK
    if command == _INVOKE_COMMAND:
        yield from _invoke(thread, message, function, number, words)
    elif command == _OPEN_SESSION:
        yield from _open_session(thread, message, words)
    elif command == _CLOSE_SESSION:
        result = _BAD_PARAMETERS
        if not words:
            result = yield from partition.sessions.close(thread, number, partition.sessions.open)
        message.store(OFFSET_RET, _RESULT.pack(result, _TEE))
    elif command == _CANCEL:
        result = _BAD_PARAMETERS if words else partition.sessions.cancel(number)
        partition.world.cancels += 1
        message.store(OFFSET_RET, _RESULT.pack(result, _TEE))
    elif command in (_REGISTER_SHM, _UNREGISTER_SHM) and not partition.world.config.dynamic_shm:
        code = _EBADCMD
    elif command == _REGISTER_SHM:
        _register(partition, message, words)
    elif command == _UNREGISTER_SHM:
        yield from _unregister(thread, message, words)
    elif command == _STOP_ASYNC_NOTIF:
        partition.notifications_started = False
    elif command != _DO_BOTTOM_HALF:
        code = _EBADCMD
    manager = partition.storage.memory
    if code == _OK and (thread.payloads or thread.rpc_buffer is not None or (manager and manager.rpc_buffers)):
        yield from end_of_call(thread)
    if with_rpc_argument:
        thread.rpc_argument = None
    return code


def _open_session(thread: Thread, message: Window, words: _Words) -> Steps[None]:
    partition = thread.partition
    held: list[SharedMemory] = []
    result, origin, number = _BAD_PARAMETERS, _TEE, 0
    params: Params = NO_PARAMS
    try:
        uuid, client = _identify(words)
        params = from_message(words[2:], partition.shared_memory, held)
    except TeeError as error:
        result = error.result
    else:
        result, origin, session = yield from partition.sessions.open_session(
            thread, uuid, client, params, partition.sessions.open
        )
        if session is not None:
            number = session.id
        _copy_out(message, params, words, 2, untouched=(result, origin) == _DEAD)
    for shm in held:
        yield from partition.shared_memory.put(thread, shm)
    message.store(OFFSET_SESSION, _WORD.pack(number))
    message.store(OFFSET_RET, _RESULT.pack(result, origin))


def _identify(words: _Words) -> tuple[UUID, Client]:
    """TA and client from the two META parameters of OPEN_SESSION. Raises TeeError(BAD_PARAMETERS)."""
    if len(words) < 2 or words[0][0] != _META_VALUE or words[1][0] != _META_VALUE:
        raise TeeError(Result.BAD_PARAMETERS)
    login = words[1][3] & 0xFFFFFFFF
    if login in _ANONYMOUS_LOGINS:
        client = Client(login, _NIL_UUID)
    elif login in _NAMED_LOGINS:
        client = Client(login, UUID(bytes=_UUID.pack(*words[1][1:3])))
    else:
        raise TeeError(Result.BAD_PARAMETERS)
    return UUID(bytes=_UUID.pack(*words[0][1:3])), client


def _invoke(thread: Thread, message: Window, function: int, number: int, words: _Words) -> Steps[None]:
    partition = thread.partition
    held: list[SharedMemory] = []
    try:
        params = from_message(words, partition.shared_memory, held)
    except TeeError as error:
        result, origin = error.result, _TEE
    else:
        sessions = partition.sessions
        result, origin = yield from sessions.invoke(thread, number, function, params, sessions.open)
        _copy_out(message, params, words, 0, untouched=(result, origin) == _DEAD)
    for shm in held:
        yield from partition.shared_memory.put(thread, shm)
    message.store(OFFSET_RET, _RESULT.pack(result, origin))


def _copy_out(message: Window, params: Params, words: _Words, first: int, *, untouched: bool) -> None:
    """Write output values and sizes; those of a TA that died are what came in, cut to 32 bits."""
    for index, param in enumerate(params, first):
        if param is None or not param.kind & _OUTPUT:
            continue
        at = index * PARAM_SIZE
        if isinstance(param, Memref):
            size = param.capacity if untouched else param.size
            message.store(_OFFSET_SIZE + at, _SIZE.pack(size))
        else:
            if untouched:
                param = Value(words[index][1], words[index][2])
            message.store(_OFFSET_VALUES + at, _VALUES.pack(param.a & 0xFFFFFFFF, param.b & 0xFFFFFFFF))


def _register(partition: Partition, message: Window, words: _Words) -> None:
    """REGISTER_SHM: any failure, of memory too, is BAD_PARAMETERS; the origin is not written."""
    result = _BAD_PARAMETERS
    if len(words) == 1 and words[0][0] == _REGISTER_ATTR:
        _, buf_ptr, size, cookie = words[0]
        shm = partition.shared_memory.add_list(buf_ptr, size, cookie)
        if shm is not None:
            shm.guarded = False
            result = 0
    message.store(OFFSET_RET, _WORD.pack(result))


def _unregister(thread: Thread, message: Window, words: _Words) -> Steps[None]:
    """UNREGISTER_SHM: waits for the buffer's users; the attribute is not looked at."""
    if len(words) != 1:
        message.store(OFFSET_RET, _RESULT.pack(_BAD_PARAMETERS, _TEE))
        return
    result = 0
    try:
        yield from thread.partition.shared_memory.release(thread, words[0][3])
    except TeeError as error:
        result = error.result
    message.store(OFFSET_RET, _WORD.pack(result))
