"""The smallest changes of a build that make a load fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from optee.memory.build import MIB, PAGE, THREAD_STACK_PAGES, Build, up
from optee.memory.build_files import OPTIONS
from optee.memory.heap import HEADER, block_sizes
from optee.memory.needs import tables
from optee.memory.sizing import Load, Sizing, limits, size
from optee.memory.structures import GUEST

_LARGEST_HEAP = 1 << 30


@dataclass(frozen=True, slots=True)
class Change:
    """A way to make the load fit."""

    name: str
    build: Build
    lines: tuple[str, ...]
    """For the build: CFG_...=..."""
    costs: tuple[str, ...]
    sizing: Sizing


def solve(build: Build, load: Load) -> list[Change]:
    """Ways to make `load` fit, none if it does; each is checked. Empty too if no option helps."""
    if all(limit.holds for limit in limits(build, load)):
        return []
    found: list[Change] = []
    for name, start in _table_choices(build, load):
        changed = _enough_memory(start, load)
        if changed is None:
            continue
        sizing = size(changed, load)
        if sizing.fits and all(change.build != changed for change in found):
            found.append(Change(name, changed, _lines(build, changed), tuple(_costs(build, changed)), sizing))
    return found


def _table_choices(build: Build, load: Load) -> Iterator[tuple[str, Build]]:
    needed = max(tables(build, ta) for ta in load.tas)
    if build.prealloc or needed <= build.tables:
        yield "more memory", build
        return
    if build.table_entries is None:
        yield "more threads", replace(build, threads=-(-needed // 2))
    yield "preallocated tables", replace(build, prealloc=True)
    yield "a larger pool (OP-TEE 4.3 and later)", replace(build, table_entries=needed)


def _enough_memory(build: Build, load: Load) -> Build | None:
    """The build with as much heap, nexus heap and secure RAM as the load needs; None if that does not help."""
    if not build.dynamic_shm and load.buffers:
        build = replace(build, dynamic_shm=True)
    build = replace(build, guest_count=max(build.guest_count, load.guests))
    if build.virtualization:
        nexus = up(load.guests * block_sizes(GUEST) + HEADER, 1024)
        build = replace(build, nexus_heap=max(build.nexus_heap, nexus))
    heap = _least(build.heap, _LARGEST_HEAP, lambda value: not _heap_fails(replace(build, heap=value), load))
    if heap is None:
        return None
    build = replace(build, heap=heap)
    if build.secure_ram is None:
        return build
    ram = _least(build.secure_ram, 1 << 40, lambda value: _ram_suffices(replace(build, secure_ram=value), load), MIB)
    return None if ram is None else replace(build, secure_ram=ram)


def _heap_fails(build: Build, load: Load) -> bool:
    return any(limit.name.startswith("core heap") and not limit.holds for limit in limits(build, load))


def _ram_suffices(build: Build, load: Load) -> bool:
    return all(limit.holds for limit in limits(build, load) if limit.name in ("TA RAM", "secure RAM"))


def _least(low: int, high: int, good: Callable[[int], bool], step: int = PAGE) -> int | None:
    """The least value from `low` on, in whole steps, that is good."""
    if good(low):
        return low
    below = above = max(low // step, 1)
    while not good(above * step):
        if above * step >= high:
            return None
        below, above = above, above * 2
    while above - below > 1:
        middle = (below + above) // 2
        if good(middle * step):
            above = middle
        else:
            below = middle
    return above * step


def _lines(old: Build, new: Build) -> tuple[str, ...]:
    lines = []
    for name, option in OPTIONS.items():
        value = getattr(new, name)
        if value != getattr(old, name):
            lines.append(f"{option}={_value(name, value)}")
    return tuple(lines)


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "y" if value else "n"
    return f"{value:#x}" if name == "secure_ram" else str(value)


def _costs(old: Build, new: Build) -> Iterator[str]:
    threads = new.threads * new.thread_size - old.threads * old.thread_size
    if new.threads != old.threads:
        stacks = (new.threads - old.threads) * THREAD_STACK_PAGES * PAGE if new.stacks else 0
        yield f"{threads / 1024:.0f} KiB more core memory for threads, in each guest"
        if stacks:
            yield f"{stacks / 1024:.0f} KiB of TA RAM for their stacks and guards"
        if new.threads * new.thread_size > new.tee_ram:
            yield (
                f"{new.threads * new.thread_size} bytes for threads are more than "
                f"CFG_TEE_RAM_VA_SIZE={new.tee_ram:#x}: raise that too"
            )
    if new.prealloc and not old.prealloc:
        yield "0.2 % of what a TA maps, from TA RAM, and 208 bytes of core heap for each 8 MiB"
        yield "no waiting for tables any more: a call fails when TA RAM is used up"
        yield "cannot be had with the pager (CFG_WITH_PAGER)"
    if new.table_entries != old.table_entries and new.table_entries is not None:
        more = (new.tables - old.tables) * new.geometry.table
        yield f"{more / 1024:.0f} KiB more core memory in each guest"
    if new.heap != old.heap:
        yield f"{(new.heap - old.heap) / 1024:.0f} KiB more core heap in each guest"
    if new.secure_ram != old.secure_ram and new.secure_ram is not None and old.secure_ram is not None:
        more = (new.secure_ram - old.secure_ram) // MIB
        yield f"{more} MiB more secure RAM, which the boot firmware must set aside"
    elif new.guest_count != old.guest_count and new.ta_ram is not None:
        yield f"{new.ta_ram} bytes of TA RAM for each guest instead of {old.ta_ram}"
