"""Reads the blocks of an RPMB device as they lie in a file, without OP-TEE and without the device's key.

Source: OP-TEE secure storage, section 4. What is in such a file is only as true as who copied it.
"""

from __future__ import annotations

from optee.abi.rpmb import RPMB_BLOCK_SIZE
from optee.storage.anchor import ANCHOR_NAME
from optee.storage.keys import StorageKeys
from optee.storage.layout import CORE_OWNER, HASH_SIZE
from optee.storage.rpmb_layout import ACTIVE, FAT_ENTRY_SIZE, LAST, MAGIC, PARTITION_SIZE, VERSION, FatEntry, Partition


class NotAnImageError(Exception):
    """These are not the blocks of a device with OP-TEE's file system, or not whole."""


def read_anchor(image: bytes, keys: StorageKeys) -> bytes | None:
    """Root hash of dirf.db that is anchored; None if there is no anchor. Raises NotAnImageError."""
    partition = Partition.unpack(image[:PARTITION_SIZE].ljust(PARTITION_SIZE, b"\0"))
    if (partition.magic, partition.version) != (MAGIC, VERSION):
        raise NotAnImageError("no file system of OP-TEE's begins there")
    for at in range(partition.fat_start, len(image) - FAT_ENTRY_SIZE + 1, FAT_ENTRY_SIZE):
        entry = FatEntry.unpack(image[at : at + FAT_ENTRY_SIZE])
        if entry.flags & ACTIVE and entry.name == f"/{ANCHOR_NAME}":
            return _content(image, entry, keys) if entry.size == HASH_SIZE else None
        if entry.flags & LAST:
            return None
    raise NotAnImageError("it ends in the middle of its FAT")


def _content(image: bytes, entry: FatEntry, keys: StorageKeys) -> bytes:
    """Data of a file that has its first block only."""
    block = image[entry.start : entry.start + RPMB_BLOCK_SIZE]
    if len(block) < RPMB_BLOCK_SIZE:
        raise NotAnImageError(f"it ends before byte {entry.start + RPMB_BLOCK_SIZE}, where {entry.name} lies")
    return keys.open_rpmb_file(CORE_OWNER, entry.enc_fek).open(entry.start // RPMB_BLOCK_SIZE, block)[: entry.size]
