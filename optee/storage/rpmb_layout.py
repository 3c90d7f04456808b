"""What OP-TEE's RPMB file system writes to the device: partition header, FAT, and where data may go.

Source: OP-TEE secure storage, section 4. Integers are little endian. The FAT grows from byte 512 upwards, data is put
as high as it fits.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from optee.abi.rpmb import RPMB_BLOCK_SIZE
from optee.storage.layout import FEK_SIZE

MAGIC: Final = 0x52504D42
VERSION: Final = 2
FAT_START: Final = 512
ACTIVE: Final = 1
"""Flag of a FAT entry: a file has it."""
LAST: Final = 2
"""Flag of a FAT entry: there is none behind it."""
FILE_NAME_SIZE: Final = 224

_PARTITION: Final = struct.Struct("<4I112s")
_FAT_ENTRY: Final = struct.Struct(f"<4I{FEK_SIZE}s{FILE_NAME_SIZE}s")

PARTITION_SIZE: Final = _PARTITION.size
FAT_ENTRY_SIZE: Final = _FAT_ENTRY.size


class Partition(NamedTuple):
    """The header at byte 0."""

    magic: int = MAGIC
    version: int = VERSION
    write_counter: int = 0
    fat_start: int = FAT_START
    reserved: bytes = bytes(112)

    @classmethod
    def unpack(cls, data: bytes) -> Partition:
        """Read 128 bytes."""
        return cls(*_PARTITION.unpack(data))

    def pack(self) -> bytes:
        """128 bytes."""
        return _PARTITION.pack(*self)


class FatEntry(NamedTuple):
    """A file: where its data begins, in bytes, and its key."""

    start: int = 0
    size: int = 0
    flags: int = 0
    unused: int = 0
    enc_fek: bytes = bytes(FEK_SIZE)
    name_field: bytes = bytes(FILE_NAME_SIZE)

    @classmethod
    def unpack(cls, data: bytes) -> FatEntry:
        """Read 256 bytes."""
        return cls(*_FAT_ENTRY.unpack(data))

    def pack(self) -> bytes:
        """256 bytes."""
        return _FAT_ENTRY.pack(*self)

    @property
    def name(self) -> str:
        """Path of the file; what is not ASCII was not written by OP-TEE, and is no file's name."""
        return self.name_field.split(b"\0")[0].decode("ascii", "replace")

    def named(self, name: str) -> FatEntry:
        """The same with another name."""
        return self._replace(name_field=name.encode().ljust(FILE_NAME_SIZE, b"\0"))


LAST_ENTRY: Final = FatEntry(flags=LAST)


def directory_name(owner: bytes) -> str:
    """What the names of a TA's files begin with; the UUID as a structure of C, in upper-case digits."""
    return f"/{owner.hex().upper()}/"


def file_name(owner: bytes, object_id: bytes, *, temporary: bool = False) -> str:
    """Name of an object's file; `temporary` while it is made."""
    return f"{directory_name(owner)}{'.' if temporary else ''}{object_id.hex().upper()}"


def parse_object_id(owner: bytes, name: str) -> bytes | None:
    """Object id of a file of this TA; None for others', temporary ones, and (as in OP-TEE) the empty id."""
    digits = name.removeprefix(directory_name(owner))
    if digits == name or len(digits) % 2 or not set(digits) <= set("0123456789ABCDEF"):
        return None
    return bytes.fromhex(digits) or None


class Space:
    """What of the device is taken, rebuilt from the FAT whenever a place is looked for.

    top: bytes that may be used; the rest of the device is not.
    """

    def __init__(self, top: int) -> None:
        self._top = top // RPMB_BLOCK_SIZE
        self._taken: list[tuple[int, int]] = []  # first block, and the one behind the last

    def take(self, start: int, size: int) -> bool:
        """Mark bytes as taken; False if some are already, or do not exist."""
        first, end = start // RPMB_BLOCK_SIZE, -(-(start + size) // RPMB_BLOCK_SIZE)
        if end > self._top or any(first < other_end and other < end for other, other_end in self._taken):
            return False
        self._taken.append((first, end))
        return True

    def find(self, size: int) -> int | None:
        """The highest place for so many bytes; None if there is none."""
        count = -(-size // RPMB_BLOCK_SIZE)
        ceiling = self._top
        for first, end in sorted(self._taken, reverse=True):
            if ceiling - end >= count:
                break
            ceiling = first
        return (ceiling - count) * RPMB_BLOCK_SIZE if ceiling >= count else None
