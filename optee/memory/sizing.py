"""What fits: the arithmetic of one guest's memory, without running anything.

Source: memory sizing reference. Every number follows from a `Build` and the TAs of a guest; `Sizing.limits` has one
entry for each pool, in the order in which a guest meets them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optee.memory.address_space import USER_VA, mapped
from optee.memory.build import CORE_OWN, GROUP, MIB, PAGE, Build, down, up
from optee.memory.failures import ALLOCATE, CREATE, INVOKE, LOAD, REGISTER, first_failure, usable_heap
from optee.memory.heap import HEADER, block_size, block_sizes
from optee.memory.needs import call_heap, count_set_ups, groups, heap_with, loaded_heap, loaded_ta_ram, ta_ram, tables
from optee.memory.profile import TEST_PROGRAM, TaProfile, set_ups
from optee.memory.shared_buffers import count_buffers, largest_buffer, total_pages
from optee.memory.structures import GUEST, SESSION, TABLE_GROUP


@dataclass(frozen=True, slots=True)
class Load:
    """What shall fit."""

    guests: int = 1
    tas: tuple[TaProfile, ...] = (TEST_PROGRAM,)
    buffer: int = MIB
    """Bytes of each shared buffer, where buffers are counted."""
    buffers: int = 0
    """Buffers of that size that each guest registers."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One pool: what the load needs of it, and what there is."""

    name: str
    option: str
    """The configuration that decides."""
    needed: int
    available: int | None
    """None if nothing is known to limit it."""
    unit: str
    place: str
    """Where it fails: one of `RESULTS`."""

    @property
    def holds(self) -> bool:
        """Whether the load fits."""
        return self.available is None or self.needed <= self.available

    @property
    def share(self) -> float:
        """How much of the pool the load takes."""
        if not self.available:
            return 0.0 if self.available is None or not self.needed else float("inf")
        return self.needed / self.available

    def __str__(self) -> str:
        available = "no limit known" if self.available is None else f"{self.available} {self.unit}"
        return f"{self.name}: {self.needed} {self.unit} needed, {available} ({self.option})"


@dataclass(frozen=True, slots=True)
class Sizing:
    """The answer for one build and one load. Sizes are bytes, of one guest."""

    build: Build
    load: Load
    limits: tuple[Limit, ...]
    usable: int
    """Largest heap of the first TA; -1 if it does not fit without any."""
    usable_binding: str
    """Which limit that is."""
    heap_used: int
    """Of the core's heap, once the load runs."""
    heap_free: int
    sessions: int | None
    """Sessions of the first TA that fit at once."""
    rsa_operations: int
    """RSA signing set-ups that fit beside the load."""
    largest_buffer: int
    """Pages of the largest buffer that can be registered beside the load."""
    total_pages: int
    """Pages that can be shared in buffers of the load's size."""
    guests: int | None
    """Guests that this build holds."""

    @property
    def fits(self) -> bool:
        """Whether the whole load fits."""
        return all(limit.holds for limit in self.limits)

    @property
    def failing(self) -> tuple[Limit, ...]:
        """Limits that the load breaks."""
        return tuple(limit for limit in self.limits if not limit.holds)

    @property
    def binding(self) -> Limit:
        """The limit that is met first: the first that does not hold, else the one of which most is taken."""
        return self.failing[0] if self.failing else max(self.limits, key=lambda limit: limit.share)


def size(build: Build, load: Load) -> Sizing:
    """Work out what fits."""
    base = heap_with(build, load.tas)
    used, whole = _heap_used(build, load)
    usable, usable_binding = usable_heap(build, load.tas)
    return Sizing(
        build=build,
        load=load,
        limits=limits(build, load),
        usable=usable,
        usable_binding=usable_binding,
        heap_used=used,
        heap_free=max(whole - used, 0),
        sessions=_sessions(build, load.tas),
        rsa_operations=0 if base is None else count_set_ups(build, whole - used),
        largest_buffer=0 if base is None or not build.dynamic_shm else largest_buffer(base.largest_free),
        total_pages=0 if base is None or not build.dynamic_shm else total_pages(base, up(load.buffer) // PAGE),
        guests=guests(build),
    )


def limits(build: Build, load: Load) -> tuple[Limit, ...]:
    """Only what the load needs of each pool."""
    return tuple(_limits(build, load, *_heap_used(build, load)))


def _heap_used(build: Build, load: Load) -> tuple[int, int]:
    """Core heap that is used once the load runs, and that there is."""
    return CORE_OWN + loaded_heap(build, load.tas), down(build.heap, 16) - HEADER


def _limits(build: Build, load: Load, used: int, whole: int) -> Iterator[Limit]:
    yield Limit(
        "secure RAM", f"CFG_VIRT_GUEST_COUNT={build.guest_count}", load.guests, _possible(build), "guests", CREATE
    )
    yield Limit(
        "nexus heap",
        f"CFG_CORE_NEX_HEAP_SIZE={build.nexus_heap}",
        load.guests,
        nexus_guests(build) if build.virtualization else 1,
        "guests",
        CREATE,
    )
    for ta in load.tas:
        yield from _table_limits(build, ta)
    if not build.dynamic_shm:
        references = sum(len(ta.parameters) for ta in load.tas)
        yield Limit("registered memory for parameters", "CFG_CORE_DYN_SHM=n", references, 0, "buffers", REGISTER)
    needed = build.stacks + sum(ta_ram(build, ta) for ta in load.tas)
    yield Limit("TA RAM", _ta_ram_option(build), needed, build.ta_ram, "bytes", LOAD)
    place = ALLOCATE if any(ta.set_ups for ta in load.tas) else LOAD
    transient = max((call_heap(build, ta) for ta in load.tas), default=0)
    option = f"CFG_CORE_HEAP_SIZE={build.heap}"
    yield Limit("core heap", option, used + transient, whole, "bytes", place)
    if load.buffers:
        pages = up(load.buffer) // PAGE
        base = heap_with(build, load.tas)
        fit = 0 if base is None or not build.dynamic_shm else count_buffers(base, pages, load.buffers)
        option = option if build.dynamic_shm else "CFG_CORE_DYN_SHM=n"
        yield Limit(f"core heap for buffers of {pages} pages", option, load.buffers, fit, "buffers", REGISTER)


def _ta_ram_option(build: Build) -> str:
    if build.secure_ram is None:
        return "CFG_TZDRAM_SIZE not given"
    split = f" for {build.guest_count} guests" if build.virtualization else ""
    return f"CFG_TZDRAM_SIZE={build.secure_ram:#x}{split}"


def _table_limits(build: Build, ta: TaProfile) -> Iterator[Limit]:
    geometry = build.geometry
    loaded, called = tables(build, ta, parameters=False), tables(build, ta)
    if not build.prealloc:
        place = LOAD if loaded > build.tables or called == loaded else INVOKE
        option = f"CFG_NUM_THREADS={build.threads}"
        if build.table_entries is not None:
            option = f"CFG_PGT_CACHE_ENTRIES={build.table_entries}"
        yield Limit(f"translation tables for {ta.name}", option, called, build.tables, "tables", place)
    space = mapped(ta.regions()) + ta.parameter_size - USER_VA
    place = LOAD if mapped(ta.regions()) - USER_VA > geometry.user_space else INVOKE
    yield Limit(f"address space of {ta.name}", geometry.name, space, geometry.user_space, "bytes", place)


def _sessions(build: Build, tas: Sequence[TaProfile]) -> int | None:
    """Sessions of the first TA, each with its set-ups, that fit at once beside the other TAs."""
    ta, *others = tas
    if first_failure(build, tas, ta.heap or 0) is not None:
        return 0  # no session of it is of any use
    kinds = set_ups(build.bignum_bits)
    each = block_size(SESSION) + sum(block_sizes(kinds[kind]) * number for kind, number in ta.set_ups)
    group = groups(build, tables(build, ta, parameters=False))
    instance = block_sizes((*ta.instance_heap(), *(TABLE_GROUP,) * group))
    heap = down(build.heap, 16) - HEADER - CORE_OWN - loaded_heap(build, others)
    if ta.single_instance:
        return max(heap - instance, 0) // each
    fit = max(heap, 0) // (each + instance)
    if build.ta_ram is not None:
        ram = build.ta_ram - build.stacks - sum(loaded_ta_ram(build, other) for other in others)
        fit = min(fit, max(ram, 0) // (ta.own + group * GROUP * PAGE))
    return fit


def nexus_guests(build: Build) -> int:
    """Guests for which the nexus heap suffices."""
    return max(down(build.nexus_heap, 16) - HEADER, 0) // block_sizes(GUEST)


def _possible(build: Build) -> int | None:
    return build.guests_by_ram() if build.virtualization else 1


def guests(build: Build) -> int | None:
    """Guests that this build holds; None if only secure RAM limits them and it is not known."""
    if not build.virtualization:
        return 1
    by_ram = build.guests_by_ram()
    return nexus_guests(build) if by_ram is None else min(by_ram, nexus_guests(build))
