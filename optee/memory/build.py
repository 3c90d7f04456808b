"""A build of OP-TEE as far as it decides about memory, and what each guest gets of the board.

Source: memory sizing reference, sections 2 and 5; the reference on OP-TEE's core behaviour, section 1. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PAGE: Final = 4096
KIB: Final = 1 << 10
MIB: Final = 1 << 20

THREAD_STACK: Final = 8192
"""STACK_THREAD_SIZE of AArch64, without canaries."""
THREAD_STACK_PAGES: Final = 3
"""Pages of TA RAM for a stack and its guard, where the configuration is dynamic."""
THREAD_CONTEXT: Final = 1792
"""struct thread_ctx."""
SCRATCH_POOL: Final = 46 * KIB
"""The static pool of each guest for big-number arithmetic and blocks of storage."""
CORE_OWN: Final = 2448
"""What the core itself keeps of its heap once a guest runs. Not measured: with it 60 000 bytes of a 64 KiB heap are
free beside one TA with one session, which is what the reference assumes."""

_RW_REST: Final = 0x4A000 - 192 * KIB - 8 * PAGE - SCRATCH_POOL - 2 * THREAD_CONTEXT
"""Measured for QEMU's build: 0x4a000 bytes of writable memory of the core, less what this module counts itself."""
_CORE_TABLE: Final = 64
"""Bytes of level 1 table for each core, of which whole pages are taken."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Translation tables of user space."""

    name: str
    table: int
    """Bytes of a table."""
    window: int
    """Virtual memory that a table maps."""
    user_space: int
    """Virtual memory of a TA at most."""

    @property
    def per_page(self) -> int:
        """Tables in a page."""
        return PAGE // self.table

    def windows(self, start: int, end: int) -> int:
        """Tables for the virtual addresses from `start` up to `end`."""
        if end <= start:
            return 0
        return (end - 1) // self.window - start // self.window + 1


LPAE: Final = Geometry("LPAE", 4096, 2 * MIB, 1 << 30)
SHORT: Final = Geometry("short descriptors", 1024, MIB, 32 * MIB)
GROUP: Final = 4
"""Pages of a group of tables of CFG_CORE_PREALLOC_EL0_TBLS."""


def up(size: int, to: int = PAGE) -> int:
    """Round up."""
    return -(-size // to) * to


def down(size: int, to: int = PAGE) -> int:
    """Round down."""
    return size // to * to


@dataclass(frozen=True, slots=True)
class Build:
    """The options that decide what fits, with OP-TEE's defaults; the board's memory."""

    threads: int = 8
    """CFG_NUM_THREADS, of each guest."""
    heap: int = 64 * KIB
    """CFG_CORE_HEAP_SIZE, of each guest."""
    nexus_heap: int = 16 * KIB
    """CFG_CORE_NEX_HEAP_SIZE, of all guests together."""
    best_fit: bool = False
    """CFG_CORE_BGET_BESTFIT."""
    prealloc: bool = False
    """CFG_CORE_PREALLOC_EL0_TBLS."""
    table_entries: int | None = None
    """CFG_PGT_CACHE_ENTRIES; None for its default."""
    lpae: bool = True
    """CFG_WITH_LPAE; always so on AArch64."""
    virtualization: bool = True
    """CFG_NS_VIRTUALIZATION."""
    guest_count: int = 2
    """CFG_VIRT_GUEST_COUNT."""
    secure_ram: int | None = None
    """CFG_TZDRAM_SIZE; None if TA RAM shall not limit anything."""
    tee_ram: int = 2 * MIB
    """CFG_TEE_RAM_VA_SIZE: the core's own part of it."""
    cores: int = 4
    """CFG_TEE_CORE_NB_CORE."""
    bignum_bits: int = 4096
    """CFG_CORE_BIGNUM_MAX_BITS."""
    dynamic_shm: bool = True
    """CFG_CORE_DYN_SHM."""
    dynamic_config: bool = True
    """CFG_DYN_CONFIG: thread stacks come from TA RAM."""

    @property
    def geometry(self) -> Geometry:
        """Format of the translation tables."""
        return LPAE if self.lpae else SHORT

    @property
    def tables(self) -> int:
        """Tables of the pool (PGT_CACHE_SIZE), without preallocation."""
        if self.table_entries is not None:
            entries = self.table_entries
        elif self.threads < 2:
            entries = 4
        elif self.threads == 2:
            entries = 8  # also with LPAE: where the default is chosen that is not known yet
        else:
            entries = 2 * self.threads
        return up(entries, self.geometry.per_page)

    @property
    def thread_size(self) -> int:
        """Core memory that each thread costs: stack, level 2 table, context, and tables of the pool."""
        tables = 0 if self.prealloc or self.table_entries is not None else 2 * self.geometry.table
        return THREAD_STACK + PAGE + THREAD_CONTEXT + tables

    @property
    def core_rw(self) -> int:
        """Writable memory of the core that each guest has a copy of (VCORE_UNPG_RW_SZ)."""
        tables = 0 if self.prealloc else self.tables * self.geometry.table
        return up(_RW_REST + self.heap + tables + SCRATCH_POOL + self.threads * THREAD_CONTEXT)

    @property
    def core_tables(self) -> int:
        """Translation tables of the core itself for each guest."""
        return up(self.cores * _CORE_TABLE) + self.threads * PAGE

    @property
    def guest_share(self) -> int | None:
        """Secure RAM for each guest: the same whether there are others or not."""
        if self.secure_ram is None:
            return None
        return max(self.secure_ram - self.tee_ram, 0) // self.guest_count

    @property
    def ta_ram(self) -> int | None:
        """TA RAM of each guest; None if not limited."""
        if self.secure_ram is None:
            return None
        if not self.virtualization:
            return max(down(self.secure_ram - self.tee_ram), 0)
        return max(down((self.guest_share or 0) - self.core_rw - self.core_tables), 0)

    @property
    def stacks(self) -> int:
        """TA RAM that the threads' stacks take."""
        return self.threads * THREAD_STACK_PAGES * PAGE if self.dynamic_config and self.virtualization else 0

    def secure_ram_for(self, ta_ram: int) -> int:
        """Secure RAM in which each of `guest_count` guests has so much TA RAM."""
        return self.tee_ram + self.guest_count * (up(ta_ram) + self.core_rw + self.core_tables)

    def guests_by_ram(self) -> int | None:
        """Guests for which secure RAM suffices: each takes its share whole."""
        ta_ram = self.ta_ram
        if self.secure_ram is None or ta_ram is None:
            return None
        if not ta_ram:
            return 0
        return (self.secure_ram - self.tee_ram) // (ta_ram + self.core_rw + self.core_tables)
