"""What OP-TEE keeps in its core's heap: sizes of its structures in bytes, without the allocator's header.

Source: memory sizing reference, section 4: read from the debug information of a build for AArch64
(vexpress-qemu_armv8a, CFG_NS_VIRTUALIZATION=y). Named as in OP-TEE.
"""

from __future__ import annotations

from typing import Final

FS_HTREE: Final = 240
"""struct tee_fs_htree: an open file of secure storage, its root node included."""
HTREE_NODE: Final = 104
"""struct htree_node: each further node, for each 4 KiB block beyond the first; all stay while the file is open."""

SESSION: Final = 152
"""struct tee_ta_session: a client's session."""
USER_TA_CONTEXT: Final = 832
"""struct user_ta_ctx: an instance of a user TA."""
VM_REGION: Final = 56
"""struct vm_region: a part of a TA's address space; the only cost of mapping a parameter, whose object exists."""
PRIVATE_REGION: Final = (VM_REGION, 56, 24, 24)
"""vm_region, mobj_with_fobj, fobj_sec_mem, tee_mm_entry: a region in memory of the TA's own."""
TABLE_GROUP: Final = 192
"""A group of translation tables of CFG_CORE_PREALLOC_EL0_TBLS with its four descriptors."""

TRANSIENT_OBJECT: Final = 96
"""struct tee_obj."""
RSA_KEYPAIR: Final = 64
RSA_PUBLIC_KEY: Final = 16
BIGNUM: Final = 16
"""A big number without its digits."""
RSA_KEYPAIR_NUMBERS: Final = 8
RSA_PUBLIC_NUMBERS: Final = 2
OPERATION: Final = 64
"""struct tee_cryp_state."""
HASH_STATE: Final = 432
HMAC_STATE: Final = 584
CBC_STATE: Final = 944
CTR_STATE: Final = 1104
GCM_STATE: Final = 608

PERSISTENT_OBJECT: Final = 72
"""struct tee_pobj: what all handles of one persistent object share; its id is allocated beside it."""
FILE_HANDLE: Final = 64
"""struct tee_fs_fd."""

SHARED_MEMORY: Final = 72
"""struct mobj_reg_shm without its pages."""
PAGE_ADDRESS: Final = 8
"""Each page of a shared buffer, in its object and in the array that REGISTER_SHM works with."""
MAPPING: Final = 24
"""tee_mm_entry: shared memory mapped into the core."""

GUEST_PARTITION: Final = 128
"""struct guest_partition, in the nexus heap."""
MAP_ENTRY: Final = 40
"""struct tee_mmap_region, in the nexus heap."""
MEMORY_ENTRY: Final = 24
"""tee_mm_entry of a partition's memory, in the nexus heap."""
GUEST_MAP_ENTRIES: Final = 26
"""Estimate: with the next it makes about 1.5 KiB of nexus heap for each guest, as the reference has it."""
GUEST_DATA: Final = 272
"""Estimate: what drivers of the nexus keep for each guest."""


def shared_memory(pages: int) -> int:
    """Bytes of a shared-memory object of so many pages."""
    return SHARED_MEMORY + PAGE_ADDRESS * pages


def rsa_keypair(bignum_bits: int = 4096) -> tuple[int, ...]:
    """Allocations of an RSA key pair: its numbers are as large as the build allows, whatever the key's size is."""
    return (TRANSIENT_OBJECT, RSA_KEYPAIR, *(BIGNUM, bignum_bits // 8) * RSA_KEYPAIR_NUMBERS)


def rsa_public_key(bignum_bits: int = 4096) -> tuple[int, ...]:
    """Allocations of an RSA public key."""
    return (TRANSIENT_OBJECT, RSA_PUBLIC_KEY, *(BIGNUM, bignum_bits // 8) * RSA_PUBLIC_NUMBERS)


def ta_context(regions: int) -> tuple[int, ...]:
    """Allocations of an instance of a user TA with so many regions of its own."""
    return (USER_TA_CONTEXT, *PRIVATE_REGION * regions)


GUEST: Final = (GUEST_PARTITION, MEMORY_ENTRY, MAP_ENTRY * GUEST_MAP_ENTRIES, GUEST_DATA)
"""Allocations in the nexus heap for a guest."""
