"""Parameters as a TA sees them: values and memory references, and how a message's become those.

Source: OP-TEE core behaviour, section 5; GP TEE Internal Core API, TEE_PARAM_TYPES.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from optee.abi.message import META, NONCONTIG, TYPE_MASK
from optee.abi.results import Result
from optee.errors import TaAbort, TeeError
from optee.normal_world import Window

if TYPE_CHECKING:
    from optee.shared_memory import SharedMemory, SharedMemoryTable


class ParamKind(IntEnum):
    """TEE_PARAM_TYPE_*: kind and direction of a parameter, direction as the TA sees it."""

    NONE = 0
    VALUE_INPUT = 1
    VALUE_OUTPUT = 2
    VALUE_INOUT = 3
    MEMREF_INPUT = 5
    MEMREF_OUTPUT = 6
    MEMREF_INOUT = 7


class Value:
    """Two 32-bit numbers."""

    __slots__ = ("a", "b", "kind")

    def __init__(self, a: int = 0, b: int = 0, kind: int = ParamKind.VALUE_INOUT) -> None:
        self.a = a
        self.b = b
        self.kind = kind


class PrivateBuffer:
    """Memory of a TA that it passes to another TA."""

    __slots__ = ("data", "size")
    start = 0
    """It begins with a page."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self.size = len(self.data)

    def load(self, offset: int, size: int) -> bytes:
        """Copy `size` bytes."""
        return bytes(self.data[offset : offset + size])

    def store(self, offset: int, data: bytes) -> None:
        """Write `data`."""
        self.data[offset : offset + len(data)] = data


class Memref:
    """A part of a buffer; `size` in bytes, which the TA may set to what it used or would need."""

    __slots__ = ("buffer", "capacity", "kind", "offset", "size")

    def __init__(
        self,
        buffer: Window | PrivateBuffer | None,
        offset: int,
        size: int,
        kind: int = ParamKind.MEMREF_INOUT,
    ) -> None:
        self.buffer = buffer
        """None for a NULL reference."""
        self.offset = offset
        self.capacity = size
        self.size = size
        self.kind = kind

    @property
    def is_null(self) -> bool:
        """No buffer at all (buf_ptr 0)."""
        return self.buffer is None

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy bytes, as a rule all of them. Beyond the end, or NULL: the TA aborts."""
        if size is None:
            size = self.capacity - offset
        if size <= 0:
            return b""
        if self.buffer is None or offset < 0 or offset + size > self.capacity:
            raise TaAbort(offset)
        return self.buffer.load(self.offset + offset, size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write bytes. Beyond the end, or NULL: the TA aborts."""
        if not data:
            return
        if self.buffer is None or offset < 0 or offset + len(data) > self.capacity:
            raise TaAbort(offset)
        self.buffer.store(self.offset + offset, data)

    def put(self, data: bytes) -> None:
        """Answer with `data`: sets the size; raises TeeError(SHORT_BUFFER) if it does not fit."""
        self.size = len(data)
        if len(data) > self.capacity:
            raise TeeError(Result.SHORT_BUFFER)
        self.write(data)


Param: TypeAlias = Value | Memref | None
Params: TypeAlias = tuple[Param, ...]
"""Always four; None where there is no parameter."""

NO_PARAMS: Final[Params] = (None, None, None, None)
_PADDING: Final[tuple[Params, ...]] = tuple((None,) * (4 - count) for count in range(5))

_FIRST_TMEM = 0x9
_LAST_TMEM = 0xB
_TMEM_TO_MEMREF = 4

_BAD_PARAMETERS = Result.BAD_PARAMETERS
_SECURITY = Result.SECURITY


def from_message(words: Sequence[tuple[int, ...]], table: SharedMemoryTable, held: list[SharedMemory]) -> Params:
    """Make a TA's parameters of a message's (attribute and three words each).

    Every shared memory object that is used is appended to `held`, with a reference to put afterwards, also
    if this fails. Raises TeeError: BAD_PARAMETERS, or SECURITY for a reference beyond its object.
    """
    count = len(words)
    if count > 4:
        raise TeeError(_BAD_PARAMETERS)
    params: list[Param] = []
    for attr, a, b, c in words:
        if attr & META:
            raise TeeError(_BAD_PARAMETERS)
        kind = attr & TYPE_MASK
        if kind == 0:
            params.append(None)
        elif kind <= 3:
            params.append(Value(a & 0xFFFFFFFF, b & 0xFFFFFFFF, kind))
        elif _FIRST_TMEM <= kind <= _LAST_TMEM:
            params.append(_temporary(attr, kind - _TMEM_TO_MEMREF, a, b, c, table, held))
        elif 5 <= kind <= 7:
            shm = table.find(c)
            if shm is None:
                raise TeeError(_BAD_PARAMETERS)
            held.append(shm)
            if a + b > shm.size:
                raise TeeError(_SECURITY)
            params.append(Memref(shm, a, b, kind))
        else:
            raise TeeError(_BAD_PARAMETERS)
    return (*params, *_PADDING[count])


def _temporary(
    attr: int,
    kind: int,
    buf_ptr: int,
    size: int,
    cookie: int,
    table: SharedMemoryTable,
    held: list[SharedMemory],
) -> Memref:
    if not buf_ptr:
        return Memref(None, 0, 0, kind)
    if attr & NONCONTIG:
        shm = table.add_list(buf_ptr, size, cookie)
        if shm is None:
            raise TeeError(_BAD_PARAMETERS)
        held.append(shm)
        if size > shm.size:  # its page count wrapped
            raise TeeError(_BAD_PARAMETERS)
        return Memref(shm, 0, size, kind)
    window = table.normal_world.reserved_window(buf_ptr, size)
    if window is None:
        raise TeeError(_BAD_PARAMETERS)
    return Memref(window, 0, size, kind)
