"""Where a TA that does not fit fails, and so the largest heap with which it works.

Source: memory sizing reference, sections 2 to 5; the pools are met in the order in which a call meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from optee.errors import TeeError
from optee.memory.address_space import USER_VA, mapped, tables_for
from optee.memory.build import GROUP, PAGE, Build, up
from optee.memory.heap import Heap
from optee.memory.needs import groups, heap_with, loaded_ta_ram, tables
from optee.memory.pool import SIZER
from optee.memory.profile import TaProfile
from optee.memory.shared_buffers import count_buffers
from optee.memory.structures import SESSION, TABLE_GROUP, VM_REGION

LOAD: Final = "TA load"
INVOKE: Final = "invoke"
REGISTER: Final = "REGISTER_SHM"
CREATE: Final = "VM_CREATED"
ALLOCATE: Final = "TEE_AllocateOperation"
_OUT_OF_MEMORY: Final = "OUT_OF_MEMORY 0xffff000c"
RESULTS: Final = {
    LOAD: _OUT_OF_MEMORY,
    INVOKE: _OUT_OF_MEMORY,
    ALLOCATE: _OUT_OF_MEMORY,
    REGISTER: "BAD_PARAMETERS 0xffff0006",
    CREATE: "ENOTAVAIL 0x7",
}
"""What the caller sees where a pool is empty."""


class Failure(NamedTuple):
    """Why a TA with a given heap does not work."""

    place: str
    """Where: one of `RESULTS`."""
    limit: str


def first_failure(build: Build, tas: Sequence[TaProfile], ta_heap: int) -> Failure | None:
    """What happens first when the others are loaded, then one instance of the first TA, then one call is made."""
    ta, *others = tas
    base = heap_with(build, others)
    if base is None:
        return Failure(LOAD, "core heap")
    loaded = replace(ta, heap=ta_heap, sessions=1, set_ups=())
    end = mapped(loaded.regions())
    ram = build.stacks + sum(loaded_ta_ram(build, other) for other in others)
    return _load_failure(build, loaded, end, base, ram) or _call_failure(build, loaded, end, base, ram)


def _load_failure(build: Build, ta: TaProfile, end: int, heap: Heap, ram: int) -> Failure | None:
    geometry = build.geometry
    if end - USER_VA > geometry.user_space:
        return Failure(LOAD, "address space of a TA")
    if not build.prealloc and tables_for(geometry, end) > build.tables:
        return Failure(LOAD, "translation tables")
    count = groups(build, tables_for(geometry, end))
    try:
        heap.allocate_all((SESSION, *ta.instance_heap(), *(TABLE_GROUP,) * count), SIZER)
    except TeeError:
        return Failure(LOAD, "core heap")
    if build.ta_ram is not None and ram + ta.own + count * GROUP * PAGE > build.ta_ram:
        return Failure(LOAD, "TA RAM")
    return None


def _call_failure(build: Build, ta: TaProfile, loaded_end: int, heap: Heap, ram: int) -> Failure | None:
    geometry = build.geometry
    sizes = [up(size) for size in ta.parameters if size]
    if any(not build.dynamic_shm or count_buffers(heap, size // PAGE, 1) < 1 for size in sizes):
        return Failure(REGISTER, "core heap")
    end = loaded_end + sum(sizes)
    if end - USER_VA > geometry.user_space:
        return Failure(INVOKE, "address space of a TA")
    if not build.prealloc and tables_for(geometry, end) > build.tables:
        return Failure(INVOKE, "translation tables")
    loaded, called = (groups(build, tables_for(geometry, each)) for each in (loaded_end, end))
    try:
        heap.allocate_all((VM_REGION,) * len(sizes) + (TABLE_GROUP,) * (called - loaded), SIZER)
    except TeeError:
        return Failure(INVOKE, "core heap")
    if build.ta_ram is not None and ram + ta.own + called * GROUP * PAGE > build.ta_ram:
        return Failure(INVOKE, "TA RAM")
    return None


def usable_heap(build: Build, tas: Sequence[TaProfile]) -> tuple[int, str]:
    """The largest heap of one instance of the first TA beside the others, and what limits it; -1 if none works."""
    failure = first_failure(build, tas, 0)
    if failure is not None:
        return -1, failure.limit
    works, fails = 0, build.geometry.user_space // PAGE
    limit = ""
    while fails - works > 1:
        middle = (works + fails) // 2
        failure = first_failure(build, tas, middle * PAGE)
        if failure is None:
            works = middle
        else:
            fails, limit = middle, failure.limit
    return works * PAGE, limit or "address space of a TA"


def set_up_heap_failure(build: Build, tas: Sequence[TaProfile], sessions: int) -> str:
    """Where one session more than fit fails: at its TA's load, or when it allocates its set-ups."""
    ta, *others = tas
    base = heap_with(build, (*others, replace(ta, sessions=sessions)))
    if base is None:
        return LOAD
    group = groups(build, tables(build, ta, parameters=False))
    instance = () if ta.single_instance and sessions else (*ta.instance_heap(), *(TABLE_GROUP,) * group)
    try:
        base.allocate_all((SESSION, *instance), SIZER)
    except TeeError:
        return LOAD
    if build.ta_ram is not None and instance:
        ram = build.stacks + sum(loaded_ta_ram(build, other) for other in others)
        ram += loaded_ta_ram(build, replace(ta, sessions=sessions + 1))
        if ram > build.ta_ram:
            return LOAD
    return ALLOCATE
