"""Configuration of the OP-TEE model, named after OP-TEE's own build options where it has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

from optee.memory.build import Build, up
from optee.memory.heap import HEADER, block_sizes
from optee.memory.structures import GUEST
from optee.storage.keys import DEFAULT_CHIP_ID, DEFAULT_HUK
from optee.storage.options import OPTEE, StorageOptions

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

NOTIFICATION_VALUES = 64
"""Asynchronous notification values, 0..63, of each guest (OP-TEE core behaviour, section 9)."""

ROOMY = 64 << 20
"""Bytes of secure RAM for each guest on the simulated board, where no other board is asked for."""

MAX_SYSCALL_RECURSION = 4
"""CFG_CORE_MAX_SYSCALL_RECURSION: TA to TA calls inside each other."""


@dataclass(frozen=True, slots=True)
class Config:
    """What is built into this OP-TEE and how big the board's share of memory is."""

    threads: int = 8
    """CFG_NUM_THREADS: threads of each guest."""

    guests: int = 64
    """CFG_VIRT_GUEST_COUNT: equal shares into which the board's secure RAM is split; one more VM_CREATED answers
    ENOTAVAIL."""

    virtualization: bool = True
    """CFG_NS_VIRTUALIZATION. Without it a7 is ignored and there is one partition from the start."""

    revision: tuple[int, int] = (4, 10)
    """Major and minor version of GET_OS_REVISION."""

    build_id: int = 0
    """First 32 bits of the commit, the third number of GET_OS_REVISION; 0 in a build without one."""

    tzdram_start: int = 0xE0_0000_0000
    """CFG_TZDRAM_START: PA of the memory that holds the core and the TAs of all guests."""

    tzdram_size: int | None = None
    """CFG_TZDRAM_SIZE in bytes; None: the simulated board has `ROOMY` for each guest."""

    secure_devices: tuple[tuple[int, int], ...] = ((0x0E00_0000, 0x3200_0000),)
    """(PA, bytes) of other memory that the normal world must not name."""

    reserved_shm: tuple[int, int] = (0x4200_0000, 0x20_0000)
    """PA and bytes of static shared memory: announced and accepted only without virtualization."""

    core_heap_size: int = 4 << 20
    """CFG_CORE_HEAP_SIZE in bytes, of each guest. OP-TEE's default is 64 KiB; this board is roomy."""

    nexus_heap_size: int | None = None
    """CFG_CORE_NEX_HEAP_SIZE in bytes, of all guests together; None: as much as they need."""

    best_fit: bool = False
    """CFG_CORE_BGET_BESTFIT."""

    preallocated_tables: bool = False
    """CFG_CORE_PREALLOC_EL0_TBLS: translation tables of TAs come from TA RAM, not from a pool."""

    table_cache_entries: int | None = None
    """CFG_PGT_CACHE_ENTRIES; None: two for each thread."""

    lpae: bool = True
    """CFG_WITH_LPAE; always so on AArch64."""

    tee_ram_size: int = 2 << 20
    """CFG_TEE_RAM_VA_SIZE in bytes: the core's own part of secure RAM."""

    cores: int = 4
    """CFG_TEE_CORE_NB_CORE."""

    bignum_bits: int = 4096
    """CFG_CORE_BIGNUM_MAX_BITS."""

    dynamic_shm: bool = True
    """CFG_CORE_DYN_SHM. Without it no buffer can be registered, nor a list of pages be passed."""

    dynamic_config: bool = True
    """CFG_DYN_CONFIG: thread stacks come from TA RAM."""

    leak_report: bool = False
    """Tell on the console and in `SecureWorld.leaks` what a guest leaves that nobody holds any more."""

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

    storage: StorageOptions = OPTEE
    """What secure storage keeps in memory: nothing, as OP-TEE, or what these options of ours say."""

    listed_primes: bool = False
    """RSA keys are made of primes from a list, which the seed chooses: as quick as it can be. Otherwise primes are
    searched for, which takes the time that it takes."""

    seed: int = 0
    """Everything random in the model comes from here."""

    @property
    def secure_ram(self) -> tuple[tuple[int, int], ...]:
        """(PA, bytes) of all memory that the normal world must not name."""
        return ((self.tzdram_start, self.build.secure_ram or 0), *self.secure_devices)

    @property
    def build(self) -> Build:
        """What of this decides about memory."""
        nexus = self.nexus_heap_size
        return Build(
            threads=self.threads,
            heap=self.core_heap_size,
            nexus_heap=up(block_sizes(GUEST) * self.guests + HEADER) if nexus is None else nexus,
            best_fit=self.best_fit,
            prealloc=self.preallocated_tables,
            table_entries=self.table_cache_entries,
            lpae=self.lpae,
            virtualization=self.virtualization,
            guest_count=self.guests,
            secure_ram=self.guests * ROOMY if self.tzdram_size is None else self.tzdram_size,
            tee_ram=self.tee_ram_size,
            cores=self.cores,
            bignum_bits=self.bignum_bits,
            dynamic_shm=self.dynamic_shm,
            dynamic_config=self.dynamic_config,
        )

    def built(self, build: Build) -> Config:
        """Return this configuration on another build and board; secure RAM that is not limited is roomy."""
        return replace(
            self,
            threads=build.threads,
            core_heap_size=build.heap,
            nexus_heap_size=build.nexus_heap,
            best_fit=build.best_fit,
            preallocated_tables=build.prealloc,
            table_cache_entries=build.table_entries,
            lpae=build.lpae,
            virtualization=build.virtualization,
            guests=build.guest_count,
            tzdram_size=build.secure_ram,
            tee_ram_size=build.tee_ram,
            cores=build.cores,
            bignum_bits=build.bignum_bits,
            dynamic_shm=build.dynamic_shm,
            dynamic_config=build.dynamic_config,
        )

    @property
    def is_anchored(self) -> bool:
        """REE FS has its anchor in RPMB."""
        return self.rpmb_fs if self.ree_fs_integrity_rpmb is None else self.ree_fs_integrity_rpmb

    def is_early(self, uuid: UUID) -> bool:
        """Tell whether a user TA is part of the image."""
        return self.early_tas is None or uuid in self.early_tas


DEFAULT = Config()
"""The default build on the default board."""
