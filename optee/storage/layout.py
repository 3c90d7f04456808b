"""The structures of secure storage as they lie on the disk, and where in a file each one lies.

Source: OP-TEE secure storage, sections 1 and 3. Integers are little endian. A hash-tree file keeps everything in two
versions: the head (first block), the nodes (31 in a node block) and the data blocks.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple
from uuid import UUID

BLOCK_SIZE: Final = 4096
HASH_SIZE: Final = 32
IV_SIZE: Final = 16
TAG_SIZE: Final = 16
FEK_SIZE: Final = 16
COUNTER_SIZE: Final = 4  # the last bytes of a head
MAX_OBJECT_ID: Final = 64

COMMITTED_BLOCK: Final = 1
"""Flag of a node: which version of its block is committed."""

DIRECTORY_NAME: Final = "dirf.db"
CORE_OWNER: Final = bytes(16)
"""Owner of the files of OP-TEE's core: a UUID of zeroes. They have no object header."""

_HEAD: Final = struct.Struct("<16s16s16s16sI")
_NODE: Final = struct.Struct("<32s16s16sH")
_META: Final = struct.Struct("<QI4x")
_ENTRY: Final = struct.Struct("<16s64sI32sI")
_OBJECT_HEADER: Final = struct.Struct("<6I")

HEAD_SIZE: Final = _HEAD.size
NODE_SIZE: Final = _NODE.size
META_SIZE: Final = _META.size
ENTRY_SIZE: Final = _ENTRY.size
OBJECT_HEADER_SIZE: Final = _OBJECT_HEADER.size

NODES_PER_BLOCK: Final = 31
_DATA_BETWEEN_NODES: Final = 61  # of the physical blocks behind a node block, before the next one
_BLOCK_SIZES: Final = _DATA_BETWEEN_NODES + 1


def committed_child(number: int) -> int:
    """Flag of a node: which version of its child 0 or 1 is committed."""
    return 2 << number


def head_offset(slot: int) -> int:
    """Where a version of the head lies, in bytes."""
    return slot * HEAD_SIZE


def node_offset(number: int, version: int) -> int:
    """Where a version of the node with this id lies; the root's id is 1."""
    group, place = divmod(number - 1, NODES_PER_BLOCK)
    return (1 + group * _BLOCK_SIZES) * BLOCK_SIZE + (2 * place + version) * NODE_SIZE


def block_offset(block: int, version: int) -> int:
    """Where a version of a data block lies."""
    slot = 2 * block + version
    return (2 + slot + slot // _DATA_BETWEEN_NODES) * BLOCK_SIZE


def adjacent_blocks(slot: int) -> int:
    """How many versions of blocks lie one behind the other from this one on; slot: twice the block, and its version."""
    return _DATA_BETWEEN_NODES - slot % _DATA_BETWEEN_NODES


def block_count(length: int) -> int:
    """Blocks that hold `length` bytes."""
    return -(-length // BLOCK_SIZE)


def committed_head(even: int, odd: int) -> int | None:
    """Slot of the head that counts, by the counters in slots 0 and 1; None if there is none.

    Slot 0 counts with an even counter, slot 1 with an odd one; of two the larger.
    """
    if even & 1:
        return 1 if odd & 1 else None
    return 1 if odd & 1 and odd >= even else 0


class Head(NamedTuple):
    """Head of a file: its key, encrypted, and its meta data, sealed together with the root hash."""

    iv: bytes
    tag: bytes
    enc_fek: bytes
    imeta: bytes
    counter: int

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Read 68 bytes."""
        return cls(*_HEAD.unpack(data))

    def pack(self) -> bytes:
        """68 bytes."""
        return _HEAD.pack(*self)


class Node(NamedTuple):
    """Node of the tree: IV and tag of its block, and which versions are committed."""

    hash: bytes
    iv: bytes
    tag: bytes
    flags: int

    @classmethod
    def unpack(cls, data: bytes) -> Node:
        """Read 66 bytes."""
        return cls(*_NODE.unpack(data))

    def pack(self) -> bytes:
        """66 bytes."""
        return _NODE.pack(*self)


class Meta(NamedTuple):
    """What a head keeps encrypted: bytes of data, and the largest node id, 0 until a node beside the root was made."""

    length: int
    max_node_id: int

    @classmethod
    def unpack(cls, data: bytes) -> Meta:
        """Read 16 bytes."""
        return cls(*_META.unpack(data))

    def pack(self) -> bytes:
        """16 bytes."""
        return _META.pack(*self)


class DirectoryEntry(NamedTuple):
    """Entry of dirf.db. An empty object id is told from a free entry by the first byte of its field."""

    owner: bytes
    """UUID as a structure of C has it (`UUID.bytes_le`)."""
    id_field: bytes
    id_size: int
    root_hash: bytes
    number: int
    """The file's name is this number in hexadecimal."""

    @classmethod
    def unpack(cls, data: bytes) -> DirectoryEntry:
        """Read 120 bytes."""
        return cls(*_ENTRY.unpack(data))

    @classmethod
    def make(cls, owner: bytes, object_id: bytes, root_hash: bytes, number: int) -> DirectoryEntry:
        """Entry of an object."""
        return cls(owner, (object_id or b"\1").ljust(MAX_OBJECT_ID, b"\0"), len(object_id), root_hash, number)

    def pack(self) -> bytes:
        """120 bytes."""
        return _ENTRY.pack(*self)

    @property
    def is_free(self) -> bool:
        """No object has it."""
        return not self.id_size and not self.id_field[0]

    @property
    def object_id(self) -> bytes:
        """0 to 64 bytes."""
        return self.id_field[: self.id_size]

    @property
    def uuid(self) -> UUID:
        """UUID of the owner."""
        return UUID(bytes_le=self.owner)

    @property
    def file_name(self) -> str:
        """Name of the object's file in the directory of the supplicant."""
        return f"{self.number:x}"


FREE_ENTRY: Final = DirectoryEntry(bytes(16), bytes(MAX_OBJECT_ID), 0, bytes(HASH_SIZE), 0)


class ObjectHeader(NamedTuple):
    """The first 24 bytes in the file of a TA's object; attributes follow, then the data stream."""

    attr_size: int
    object_size: int
    max_object_size: int
    object_usage: int
    object_type: int
    have_attrs: int

    @classmethod
    def unpack(cls, data: bytes) -> ObjectHeader:
        """Read 24 bytes."""
        return cls(*_OBJECT_HEADER.unpack(data))

    def pack(self) -> bytes:
        """24 bytes."""
        return _OBJECT_HEADER.pack(*self)

    @property
    def data_offset(self) -> int:
        """Where the data stream begins, in bytes of the file's content."""
        return OBJECT_HEADER_SIZE + self.attr_size


USAGE_OFFSET: Final = 12
"""Where in an object's header objectUsage stands."""
