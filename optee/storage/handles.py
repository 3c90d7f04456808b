"""What a TA holds of trusted storage: handles on objects, enumerators, and keys to be stored.

Source: GP TEE Internal Core API, TEE_ObjectInfo and TEE_ObjectHandle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from optee.storage.attributes import USAGE_ALL, unpack_attributes
from optee.storage.layout import ObjectHeader
from optee.storage.registry import Record

if TYPE_CHECKING:
    from optee.storage.file_system import OpenFile, Storage

PERSISTENT: Final = 0x10000
INITIALIZED: Final = 0x20000
"""TEE_HANDLE_FLAG_*."""


class ObjectInfo(NamedTuple):
    """TEE_ObjectInfo: sizes of keys in bits, of data in bytes."""

    object_type: int
    object_size: int
    max_object_size: int
    object_usage: int
    data_size: int
    data_position: int
    handle_flags: int


class TransientKey(NamedTuple):
    """A key to be made persistent: its attributes in the order of its type's table (`attributes.OBJECT_TYPES`)."""

    object_type: int
    object_size: int
    attributes: tuple[bytes, ...]
    object_usage: int = USAGE_ALL


class ObjectHandle:
    """A handle on an open object (TEE_ObjectHandle); `number` names it within its instance."""

    __slots__ = (
        "data_size",
        "file",
        "flags",
        "header",
        "memory",
        "number",
        "position",
        "record",
        "serialized",
        "storage",
    )

    def __init__(self, number: int, storage: Storage, record: Record, flags: int, memory: tuple[int, ...]) -> None:
        self.number = number
        self.memory = memory
        """Where it lies in the core's heap."""
        self.storage = storage
        self.record = record
        self.flags = flags
        self.file: OpenFile
        self.header: ObjectHeader
        self.serialized = b""
        """Attributes as they stand in the file."""
        self.data_size = 0
        self.position = 0

    @property
    def info(self) -> ObjectInfo:
        """TEE_GetObjectInfo1."""
        header = self.header
        sizes = header.object_type, header.object_size, header.max_object_size
        flags = PERSISTENT | INITIALIZED | self.flags
        return ObjectInfo(*sizes, self.record.usage, self.data_size, self.position, flags)

    @property
    def attributes(self) -> list[bytes]:
        """Attributes of a key in the order of its type's table."""
        return unpack_attributes(self.serialized)


class Enumerator:
    """TEE_ObjectEnumHandle."""

    __slots__ = ("number", "opened", "storage")

    def __init__(self, number: int) -> None:
        self.number = number
        self.storage: Storage
        self.opened: object | None = None
        """What the storage's file system has open for it; None before a start and after a reset."""


class Handles:
    """What one instance of a TA holds; OP-TEE closes all of it when the instance ends."""

    def __init__(self) -> None:
        self.objects: dict[int, ObjectHandle] = {}
        self.enumerators: dict[int, Enumerator] = {}
        self._last = 0

    def __bool__(self) -> bool:
        return bool(self.objects or self.enumerators)

    def new_number(self) -> int:
        """A number that no handle has had."""
        self._last += 1
        return self._last
