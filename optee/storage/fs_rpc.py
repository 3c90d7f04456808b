"""The normal world's file system as secure storage uses it: one RPC for each operation.

Source: OP-TEE secure storage, section 3; recordings of secure_storage. Every function raises TeeError with what
tee-supplicant answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from optee.abi.results import Result
from optee.abi.rpc import FS_NAME_MAX, FsOperation, RpcCommand
from optee.errors import TeeError
from optee.rpc import (
    RMEM_INPUT,
    RMEM_OUTPUT,
    VALUE_INPUT,
    VALUE_OUTPUT,
    Reply,
    RpcParam,
    cached_payload,
    free_payload,
    rpc_command,
)
from optee.steps import Steps
from optee.threads import Thread

_FS: Final = int(RpcCommand.FS)
_OPEN: Final = int(FsOperation.OPEN)
_CREATE: Final = int(FsOperation.CREATE)
_CLOSE: Final = int(FsOperation.CLOSE)
_READ: Final = int(FsOperation.READ)
_WRITE: Final = int(FsOperation.WRITE)
_TRUNCATE: Final = int(FsOperation.TRUNCATE)
_REMOVE: Final = int(FsOperation.REMOVE)
_USER: Final = "FS"


def _send(thread: Thread, params: Sequence[RpcParam]) -> Steps[Reply]:
    reply = yield from rpc_command(thread, _FS, params)
    if reply.ret:
        manager = thread.partition.storage.memory
        if manager is not None and reply.ret != Result.ITEM_NOT_FOUND:
            manager.rpc_buffers.give_up()
            payload = thread.payloads.pop(_USER, None)
            if payload is not None:
                yield from free_payload(thread, payload)
        raise TeeError(reply.ret)
    return reply


def _send_name(thread: Thread, operation: int, name: str, *more: RpcParam) -> Steps[Reply]:
    payload = yield from cached_payload(thread, _USER, FS_NAME_MAX)
    payload.store(0, f"/{name}\0".encode())
    return (
        yield from _send(thread, ((VALUE_INPUT, operation, 0, 0), (RMEM_INPUT, 0, FS_NAME_MAX, payload.cookie), *more))
    )


def open_file(thread: Thread, name: str, *, create: bool) -> Steps[int]:
    """Open a file, or make an empty one: its descriptor."""
    reply = yield from _send_name(thread, _CREATE if create else _OPEN, name, (VALUE_OUTPUT, 0, 0, 0))
    return reply.params[-1][1]


def remove_file(thread: Thread, name: str) -> Steps[None]:
    """Remove a file; whether that works makes no difference to anybody."""
    try:
        yield from _send_name(thread, _REMOVE, name)
    except TeeError:
        return


def close_file(thread: Thread, fd: int) -> Steps[None]:
    """Close a file; an error is ignored, as OP-TEE does."""
    yield from rpc_command(thread, _FS, ((VALUE_INPUT, _CLOSE, fd, 0),))


def read_file(thread: Thread, fd: int, offset: int, size: int) -> Steps[bytes]:
    """Read exactly `size` bytes; fewer are CORRUPT_OBJECT."""
    payload = yield from cached_payload(thread, _USER, size)
    reply = yield from _send(thread, ((VALUE_INPUT, _READ, fd, offset), (RMEM_OUTPUT, 0, size, payload.cookie)))
    if reply.params[1][2] != size:
        raise TeeError(Result.CORRUPT_OBJECT)
    return payload.load(0, size)


def read_into(thread: Thread, fd: int, offset: int, target: memoryview) -> Steps[int]:
    """Read up to as many bytes as `target` holds, fewer at the end of the file: how many."""
    payload = yield from cached_payload(thread, _USER, len(target))
    reply = yield from _send(thread, ((VALUE_INPUT, _READ, fd, offset), (RMEM_OUTPUT, 0, len(target), payload.cookie)))
    size = reply.params[1][2]
    if size > len(target):
        raise TeeError(Result.CORRUPT_OBJECT)
    payload.load_into(0, target[:size])
    return size


def write_file(thread: Thread, fd: int, offset: int, data: bytes | memoryview) -> Steps[None]:
    """Write all of `data`."""
    payload = yield from cached_payload(thread, _USER, len(data))
    payload.store(0, data)
    yield from _send(thread, ((VALUE_INPUT, _WRITE, fd, offset), (RMEM_INPUT, 0, len(data), payload.cookie)))


def truncate_file(thread: Thread, fd: int, size: int) -> Steps[None]:
    """Cut or lengthen a file to `size` bytes."""
    yield from _send(thread, ((VALUE_INPUT, _TRUNCATE, fd, size),))
