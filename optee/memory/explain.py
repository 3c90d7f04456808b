"""The arithmetic of a `Sizing` line by line, with the names of OP-TEE's configuration and where each formula stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from optee.memory.address_space import FIRST_VA, USER_VA
from optee.memory.build import CORE_OWN, GROUP, MIB, PAGE, SCRATCH_POOL, THREAD_CONTEXT, THREAD_STACK, Build
from optee.memory.heap import block_size, block_sizes
from optee.memory.needs import groups, tables
from optee.memory.profile import TaProfile, set_ups
from optee.memory.shared_buffers import register_peak
from optee.memory.sizing import Sizing
from optee.memory.structures import GUEST, SESSION, TABLE_GROUP, shared_memory


class Line(NamedTuple):
    """One step."""

    text: str
    source: str


def explain(sizing: Sizing) -> list[Line]:
    """Every step from the configuration to the answers."""
    build, ta = sizing.build, sizing.load.tas[0]
    return [
        *_address_space(build, ta),
        *_tables(sizing),
        *_usable(sizing),
        *_ta_ram(sizing),
        *_heap(sizing),
        *_shared(sizing),
        *_threads(build),
    ]


def _address_space(build: Build, ta: TaProfile) -> Iterator[Line]:
    geometry = build.geometry
    own = sum(ta.regions(0))
    yield Line(
        f"beside its heap {ta.name} maps {FIRST_VA - USER_VA} (unused start) + {own} (ldelf, stack, code, data) + "
        f"{ta.parameter_size} (parameters) = {ta.beside_heap} bytes = {ta.beside_heap / MIB:.2f} MiB",
        "the TA's profile",
    )
    yield Line(
        f"a table of {geometry.table} bytes maps {geometry.window // MIB} MiB ({geometry.name})",
        "CFG_WITH_LPAE; CORE_MMU_PGDIR_SHIFT",
    )


def _tables(sizing: Sizing) -> Iterator[Line]:
    build, ta = sizing.build, sizing.load.tas[0]
    needed = tables(build, ta)
    heap = "without heap" if ta.heap is None else f"with {ta.heap} bytes of heap"
    yield Line(
        f"tables needed {heap}: {needed}, windows of {build.geometry.window // MIB} MiB from the first region to the "
        "last",
        "core/mm/vm.c, alloc_pgt: checked whenever a region is added",
    )
    if build.prealloc:
        count = groups(build, needed)
        yield Line(
            f"tables come from TA RAM: {count} groups of {GROUP * PAGE} bytes, and {count} x "
            f"{block_size(TABLE_GROUP)} bytes of core heap; CFG_NUM_THREADS has no part in it",
            "CFG_CORE_PREALLOC_EL0_TBLS=y; core/mm/pgt_cache.c",
        )
        return
    if build.table_entries is not None:
        text = f"tables available: CFG_PGT_CACHE_ENTRIES = {build.table_entries}"
    elif build.threads <= 2:
        text = f"tables available: {build.tables}, the least for {build.threads} threads"
    else:
        text = f"tables available: 2 x CFG_NUM_THREADS = 2 x {build.threads} = {build.tables}"
    yield Line(text, "core/mm/pgt_cache.c, PGT_CACHE_SIZE")
    yield Line(
        f"one call needs at most all of them; calls at once that need more than {build.tables} wait, they do not fail",
        "core/mm/pgt_cache.c, pgt_get_all",
    )


def _usable(sizing: Sizing) -> Iterator[Line]:
    build, ta = sizing.build, sizing.load.tas[0]
    if sizing.usable < 0:
        yield Line(
            f"{ta.name} does not fit, however small its heap is: {sizing.usable_binding}", "the sum of the above"
        )
        return
    if sizing.usable_binding == "translation tables":
        size = build.tables * build.geometry.window
        yield Line(
            f"largest heap = {build.tables} x {build.geometry.window // MIB} MiB - {ta.beside_heap} = "
            f"{size - ta.beside_heap} bytes, in whole pages {sizing.usable} = {sizing.usable / MIB:.2f} MiB",
            "the sum of the above",
        )
        return
    yield Line(
        f"largest heap: {sizing.usable} bytes = {sizing.usable / MIB:.2f} MiB, limited by {sizing.usable_binding}",
        "the smallest of all limits",
    )


def _ta_ram(sizing: Sizing) -> Iterator[Line]:
    build = sizing.build
    if build.secure_ram is None:
        yield Line("TA RAM: not given (--ram or --board), so it limits nothing here", "CFG_TZDRAM_SIZE")
        return
    if not build.virtualization:
        yield Line(
            f"TA RAM = CFG_TZDRAM_SIZE - CFG_TEE_RAM_VA_SIZE = {build.secure_ram} - {build.tee_ram} = {build.ta_ram}",
            "core/arch/arm/mm/core_mmu.c",
        )
        return
    yield Line(
        f"share of a guest = (CFG_TZDRAM_SIZE - CFG_TEE_RAM_VA_SIZE) / CFG_VIRT_GUEST_COUNT = ({build.secure_ram} - "
        f"{build.tee_ram}) / {build.guest_count} = {build.guest_share}",
        "core/arch/arm/kernel/virtualization.c",
    )
    yield Line(
        f"TA RAM of a guest = share - {build.core_rw} (the core's writable memory: heap {build.heap}, scratch pool "
        f"{SCRATCH_POOL}, tables, the rest as measured for QEMU) - {build.core_tables} (the core's own tables) = "
        f"{build.ta_ram}",
        "core/arch/arm/kernel/virtualization.c, get_ta_ram_size",
    )
    yield Line(
        f"of it thread stacks take {build.stacks}; a guest more needs a whole share: {sizing.guests} guests fit",
        "CFG_DYN_CONFIG, CFG_VIRT_GUEST_COUNT",
    )
    yield Line(f"nexus heap for each guest: {block_sizes(GUEST)} bytes (estimate)", "CFG_CORE_NEX_HEAP_SIZE")


def _heap(sizing: Sizing) -> Iterator[Line]:
    build, ta = sizing.build, sizing.load.tas[0]
    yield Line(
        "an allocation of n bytes takes max(16, n rounded up to 16) + 16", "lib/libutils/isoc/bget.c, SizeQuant 16"
    )
    yield Line(
        f"the core keeps {CORE_OWN} (assumed, not measured), a session {block_size(SESSION)}, an instance of a TA "
        f"{block_sizes(ta.instance_heap())}: {sizing.heap_used} used, {sizing.heap_free} of {build.heap} free",
        "CFG_CORE_HEAP_SIZE; structure sizes of an AArch64 build",
    )
    kinds = set_ups(build.bignum_bits)
    rsa = block_sizes(kinds["rsa-sign"])
    yield Line(
        f"an RSA signing set-up takes {rsa}: key {block_sizes(kinds['rsa-key'])}, the operation's copy of it, and "
        f"{rsa - 2 * block_sizes(kinds['rsa-key'])}; {sizing.heap_free} / {rsa} = {sizing.rsa_operations} at once",
        f"CFG_CORE_BIGNUM_MAX_BITS={build.bignum_bits}, whatever the key's size",
    )


def _shared(sizing: Sizing) -> Iterator[Line]:
    pages = sizing.largest_buffer
    if not sizing.build.dynamic_shm:
        yield Line("no shared buffer can be registered", "CFG_CORE_DYN_SHM=n")
        return
    yield Line(
        f"registering p pages takes 8p + 16 for the array and {shared_memory(0)} + 8p + 16 for the object at once, the "
        f"object stays: p = {pages} needs {register_peak(pages)}",
        "core/tee/entry_std.c, core/mm/mobj_dyn_shm.c",
    )
    yield Line(
        f"so the largest buffer has {pages} pages = {pages * PAGE / MIB:.1f} MiB; in buffers of "
        f"{sizing.load.buffer} bytes {sizing.total_pages} pages fit, holes of freed arrays considered",
        "bget: first fit, nothing is moved",
    )


def _threads(build: Build) -> Iterator[Line]:
    extra = build.thread_size - THREAD_STACK - PAGE - THREAD_CONTEXT
    yield Line(
        f"a thread costs {THREAD_STACK} (stack) + {PAGE} (level 2 table) + {THREAD_CONTEXT} (thread_ctx) + {extra} "
        f"(its tables) = {build.thread_size}; {build.threads} threads {build.threads * build.thread_size}",
        "CFG_NUM_THREADS",
    )
