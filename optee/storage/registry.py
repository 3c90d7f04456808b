"""Which persistent objects of a guest are open, and who may open one too (tee_pobj).

Source: OP-TEE secure storage, section 1; GP TEE Internal Core API, data flags. It is a list of open objects and no
cache: one that nobody has open is not in it.
"""

from __future__ import annotations

from enum import Enum, IntFlag, auto

from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.memory.structures import PERSISTENT_OBJECT


class DataFlag(IntFlag):
    """TEE_DATA_FLAG_*."""

    ACCESS_READ = 0x1
    ACCESS_WRITE = 0x2
    ACCESS_WRITE_META = 0x4
    SHARE_READ = 0x10
    SHARE_WRITE = 0x20
    OVERWRITE = 0x400


OPEN_FLAGS = 0x37
"""All but OVERWRITE."""

_SHARES = ((DataFlag.ACCESS_READ, DataFlag.SHARE_READ), (DataFlag.ACCESS_WRITE, DataFlag.SHARE_WRITE))


class Purpose(Enum):
    """What an object is wanted for."""

    OPEN = auto()
    CREATE = auto()
    RENAME = auto()
    ENUMERATE = auto()


class Record:
    """An object that at least one handle has open."""

    __slots__ = ("creating", "flags", "memory", "object_id", "owner", "references", "usage")

    def __init__(self, owner: bytes, object_id: bytes, flags: int, *, creating: bool, memory: tuple[int, ...]) -> None:
        self.owner = owner
        self.object_id = object_id
        self.flags = flags
        self.creating = creating
        """Not whole yet: nobody else gets it."""
        self.memory = memory
        """Where it and its id lie in the core's heap."""
        self.references = 1
        self.usage = 0
        """objectUsage, the same for all handles."""


class ObjectRegistry:
    """Open objects of one guest in one storage."""

    def __init__(self, heap: Heap, guest: int) -> None:
        self._heap = heap
        self._memory_owner = Owner("persistent object", guest)
        self._records: dict[tuple[bytes, bytes], Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, owner: bytes, object_id: bytes, flags: int, purpose: Purpose) -> Record:
        """Take a reference. Raises TeeError: ACCESS_CONFLICT, OUT_OF_MEMORY."""
        record = self._records.get((owner, object_id))
        if record is None:
            memory = self._heap.allocate_all((PERSISTENT_OBJECT, len(object_id)), self._memory_owner)
            record = Record(owner, object_id, flags, creating=purpose is Purpose.CREATE, memory=memory)
            self._records[owner, object_id] = record
            return record
        if purpose is not Purpose.ENUMERATE:
            if record.creating or (purpose is Purpose.CREATE and not flags & DataFlag.OVERWRITE):
                raise TeeError(Result.ACCESS_CONFLICT)
            _check_sharing(record.flags, flags)
        record.references += 1
        return record

    def put(self, record: Record) -> None:
        """Drop a reference."""
        record.references -= 1
        if not record.references:
            del self._records[record.owner, record.object_id]
            self._heap.free_all(record.memory)

    def rename(self, record: Record, reserved: Record) -> None:
        """Let an object have the id that `reserved` holds; that one's reference is dropped."""
        del self._records[record.owner, record.object_id]
        record.object_id = reserved.object_id
        self._heap.free_all(record.memory)
        record.memory = reserved.memory
        self._records[record.owner, record.object_id] = record


def _check_sharing(first: int, second: int) -> None:
    conflict = (first | second) & DataFlag.ACCESS_WRITE_META
    for access, share in _SHARES:
        conflict |= (first ^ second) & share
        conflict |= (first | second) & access and not first & second & share
    if conflict:
        raise TeeError(Result.ACCESS_CONFLICT)
