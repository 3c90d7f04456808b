"""Parameters of the TEE Client API, and how they travel in a message.

Source: GlobalPlatform TEE Client API Specification 1.0, section 4.3 (TEEC_Value, TEEC_TempMemoryReference,
TEEC_RegisteredMemoryReference); libteec and Linux for what becomes of them.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from guests.client_memory import Direction, SharedMemory
from optee.abi.message import Param, ParamType

MAX_PARAMETERS: Final = 4


@dataclass(frozen=True, slots=True)
class Value:
    """Two 32-bit numbers."""

    a: int = 0
    b: int = 0
    direction: Direction = Direction.INOUT


@dataclass(frozen=True, slots=True)
class Temporary:
    """Memory that is registered for this one operation.

    data: what the buffer holds, for INPUT and INOUT. size: bytes of the buffer where that is more than `data`.
    """

    data: bytes = b""
    size: int = 0
    direction: Direction = Direction.INOUT


@dataclass(frozen=True, slots=True)
class Null:
    """A memory reference to NULL, with the size that goes with it."""

    size: int = 0
    direction: Direction = Direction.OUTPUT


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a registered or allocated buffer, in the direction that it was made for (TEEC_MEMREF_WHOLE)."""

    memory: SharedMemory


@dataclass(frozen=True, slots=True)
class Partial:
    """`size` bytes at `offset` of a registered or allocated buffer."""

    memory: SharedMemory
    offset: int
    size: int
    direction: Direction = Direction.INOUT


Parameter: TypeAlias = Value | Temporary | Null | Whole | Partial | None


class Values(NamedTuple):
    """What a value holds after the operation."""

    a: int
    b: int


class MemoryResult(NamedTuple):
    """What a memory reference holds after the operation.

    size: as the TA set it; with SHORT_BUFFER what it needs. data: the bytes, for temporary outputs only.
    """

    size: int
    data: bytes = b""


Output: TypeAlias = Values | MemoryResult | None

NO_PARAM: Final = Param(ParamType.NONE)
_VALUE: Final = ParamType.VALUE_INPUT - Direction.INPUT
_REGISTERED: Final = ParamType.RMEM_INPUT - Direction.INPUT
_TEMPORARY: Final = ParamType.TMEM_INPUT - Direction.INPUT


def encode_value(value: Value) -> Param:
    """Return a value's parameter."""
    return Param(_VALUE + value.direction, value.a, value.b)


def encode_null(null: Null) -> Param:
    """Return the parameter of a NULL reference; it needs the MEMREF_NULL capability."""
    return Param(_TEMPORARY + null.direction, 0, null.size)


def encode_registered(direction: Direction, cookie: int, offset: int, size: int) -> Param:
    """Return the parameter of a part of a registered buffer."""
    return Param(_REGISTERED + direction, offset, size, cookie)
