"""Configuration of the OP-TEE model, named after OP-TEE's own build options where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from optee.storage.keys import DEFAULT_CHIP_ID, DEFAULT_HUK

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

NOTIFICATION_VALUES = 64
"""Asynchronous notification values, 0..63, of each guest (OP-TEE core behaviour, section 9)."""

MAX_SYSCALL_RECURSION = 4
"""CFG_CORE_MAX_SYSCALL_RECURSION: TA to TA calls inside each other."""


@dataclass(frozen=True, slots=True)
class Config:
    """What is built into this OP-TEE and how big the board's share of memory is."""

    threads: int = 8
    """CFG_NUM_THREADS: threads of each guest."""

    guests: int = 64
    """Partitions for which the board's secure RAM suffices; one more VM_CREATED answers ENOTAVAIL."""

    virtualization: bool = True
    """CFG_NS_VIRTUALIZATION. Without it a7 is ignored and there is one partition from the start."""

    revision: tuple[int, int] = (4, 10)
    """Major and minor version of GET_OS_REVISION."""

    build_id: int = 0
    """First 32 bits of the commit, the third number of GET_OS_REVISION; 0 in a build without one."""

    secure_ram: tuple[tuple[int, int], ...] = ((0x0E00_0000, 0x3200_0000),)
    """(PA, bytes) of memory that the normal world must not name. The first range holds the TAs."""

    reserved_shm: tuple[int, int] = (0x4200_0000, 0x20_0000)
    """PA and bytes of static shared memory: announced and accepted only without virtualization."""

    core_heap_size: int = 4 << 20
    """CFG_CORE_HEAP_SIZE in bytes. As yet it bounds two things, each alone: a page list, and the nodes of open
    files of secure storage."""

    early_tas: frozenset[UUID] | None = None
    """CFG_EARLY_TA: user TAs inside the OP-TEE image. None: all that the model knows. Others come from the
    guest's tee-supplicant, with the RPCs of the secure storage TA database around that."""

    extra_tas: tuple[type[TrustedApplication], ...] = ()
    """TAs beside the built-in ones, early or loadable as `early_tas` says."""

    huk: bytes = DEFAULT_HUK
    """Hardware unique key of the machine, from which all keys of secure storage follow. Guests have none of their
    own."""

    chip_id: bytes = DEFAULT_CHIP_ID
    """Die id of the machine, 32 bytes."""

    guest_storage_keys: bool = False
    """Ours, not OP-TEE's: let each guest's keys of secure storage depend on its client id too, so that files of one
    guest do not open in another. It must then have the same client id each time."""

    rpmb_fs: bool = False
    """CFG_RPMB_FS: storage TEE_STORAGE_PRIVATE_RPMB. One guest can have it at a time: the device is shared."""

    rpmb_write_key: bool = False
    """CFG_RPMB_WRITE_KEY: program the key of a device that has none; else such a device is not available."""

    ree_fs_integrity_rpmb: bool | None = None
    """CFG_REE_FS_INTEGRITY_RPMB: keep the root hash of dirf.db in RPMB, against rollback. None: as rpmb_fs."""

    ree_fs_allow_reset: bool = False
    """CFG_REE_FS_ALLOW_RESET: begin an empty store where the anchored dirf.db is gone; else SECURITY."""

    seed: int = 0
    """Everything random in the model comes from here."""

    @property
    def is_anchored(self) -> bool:
        """REE FS has its anchor in RPMB."""
        return self.rpmb_fs if self.ree_fs_integrity_rpmb is None else self.ree_fs_integrity_rpmb

    def is_early(self, uuid: UUID) -> bool:
        """Tell whether a user TA is part of the image."""
        return self.early_tas is None or uuid in self.early_tas


DEFAULT = Config()
"""The default build on the default board."""
