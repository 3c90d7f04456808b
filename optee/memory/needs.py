"""What loaded TAs take of each pool, between two calls and in one: core heap, TA RAM, translation tables.

Source: memory sizing reference, sections 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from optee.errors import TeeError
from optee.memory.address_space import mapped, tables_for
from optee.memory.build import CORE_OWN, GROUP, PAGE, Build, up
from optee.memory.heap import HEADER, Heap, block_size, block_sizes
from optee.memory.pool import SIZER
from optee.memory.profile import TaProfile, set_ups
from optee.memory.shared_buffers import register_peak
from optee.memory.structures import SESSION, TABLE_GROUP, VM_REGION


def loaded_heap(build: Build, tas: Sequence[TaProfile]) -> int:
    """Core heap of TAs that are loaded with all their sessions and set-ups, between two calls."""
    kinds = set_ups(build.bignum_bits)
    taken = 0
    for ta in tas:
        group = groups(build, tables(build, ta, parameters=False))
        taken += ta.instances * (block_sizes(ta.instance_heap()) + group * block_size(TABLE_GROUP))
        held = sum(block_sizes(kinds[kind]) * number for kind, number in ta.set_ups)
        taken += ta.sessions * (block_size(SESSION) + held)
    return taken


def heap_with(build: Build, tas: Sequence[TaProfile]) -> Heap | None:
    """A core heap in which these TAs are loaded; None if they do not fit.

    What is allocated one after the other lies side by side, so that one block stands for all.
    """
    heap = Heap(build.heap, best_fit=build.best_fit)
    try:
        for taken in (CORE_OWN, loaded_heap(build, tas)):
            if taken:
                heap.allocate(taken - HEADER, SIZER)
    except TeeError:
        return None
    return heap


def tables(build: Build, ta: TaProfile, *, parameters: bool = True, heap: int | None = None) -> int:
    """Translation tables of one instance, with those of a call's parameters or without."""
    end = mapped(ta.regions(heap)) + (ta.parameter_size if parameters else 0)
    return tables_for(build.geometry, end)


def groups(build: Build, count: int) -> int:
    """Groups of preallocated tables for so many tables."""
    return -(-count // (GROUP * build.geometry.per_page)) if build.prealloc else 0


def loaded_ta_ram(build: Build, ta: TaProfile) -> int:
    """TA RAM that all instances of a TA take, between two calls."""
    return ta.instances * (ta.own + groups(build, tables(build, ta, parameters=False)) * GROUP * PAGE)


def ta_ram(build: Build, ta: TaProfile) -> int:
    """TA RAM that all instances of a TA take, one of them in a call."""
    more = groups(build, tables(build, ta)) - groups(build, tables(build, ta, parameters=False))
    return loaded_ta_ram(build, ta) + more * GROUP * PAGE


def call_heap(build: Build, ta: TaProfile) -> int:
    """Core heap that one call takes at most while it runs: its buffers, their mapping, and tables for them."""
    more = groups(build, tables(build, ta)) - groups(build, tables(build, ta, parameters=False))
    shared = sum(register_peak(up(size) // PAGE) for size in ta.parameters if size)
    return shared + block_size(VM_REGION) * len(ta.parameters) + block_size(TABLE_GROUP) * more


def count_set_ups(build: Build, free: int, kind: str = "rsa-sign") -> int:
    """Set-ups of a kind that fit so many bytes of heap in one piece."""
    return max(free, 0) // block_sizes(set_ups(build.bignum_bits)[kind])
