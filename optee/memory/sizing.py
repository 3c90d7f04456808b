"""What fits: the arithmetic of one guest's memory, without running anything.

Source: memory sizing reference. Every number follows from a `Build` and the TAs of a guest; `Sizing.limits` has one
entry for each pool, in the order in which a guest meets them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from optee.errors import TeeError
from optee.memory.address_space import USER_VA, mapped, tables_for
from optee.memory.build import CORE_OWN, GROUP, MIB, PAGE, Build, down, up
from optee.memory.heap import HEADER, Heap, block_size, block_sizes
from optee.memory.pool import Owner
from optee.memory.profile import TEST_PROGRAM, TaProfile, set_ups
from optee.memory.structures import GUEST, MAPPING, PAGE_ADDRESS, SESSION, TABLE_GROUP, VM_REGION, shared_memory

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

_SIZER: Final = Owner("size", 0)
_SIMULATED: Final = 64


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
    return CORE_OWN + _loaded(build, load.tas), down(build.heap, 16) - HEADER


def _loaded(build: Build, tas: Sequence[TaProfile]) -> int:
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
        for taken in (CORE_OWN, _loaded(build, tas)):
            if taken:
                heap.allocate(taken - HEADER, _SIZER)
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
    needed = build.stacks + sum(_ta_ram(build, ta) for ta in load.tas)
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


def _loaded_ta_ram(build: Build, ta: TaProfile) -> int:
    """TA RAM that all instances of a TA take, between two calls."""
    return ta.instances * (ta.own + groups(build, tables(build, ta, parameters=False)) * GROUP * PAGE)


def _ta_ram(build: Build, ta: TaProfile) -> int:
    """TA RAM that all instances of a TA take, one of them in a call."""
    more = groups(build, tables(build, ta)) - groups(build, tables(build, ta, parameters=False))
    return _loaded_ta_ram(build, ta) + more * GROUP * PAGE


def call_heap(build: Build, ta: TaProfile) -> int:
    """Core heap that one call takes at most while it runs: its buffers, their mapping, and tables for them."""
    more = groups(build, tables(build, ta)) - groups(build, tables(build, ta, parameters=False))
    shared = sum(register_peak(up(size) // PAGE) for size in ta.parameters if size)
    return shared + block_size(VM_REGION) * len(ta.parameters) + block_size(TABLE_GROUP) * more


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
    ram = build.stacks + sum(_loaded_ta_ram(build, other) for other in others)
    return _load_failure(build, loaded, end, base, ram) or _call_failure(build, loaded, end, base, ram)


def _load_failure(build: Build, ta: TaProfile, end: int, heap: Heap, ram: int) -> Failure | None:
    geometry = build.geometry
    if end - USER_VA > geometry.user_space:
        return Failure(LOAD, "address space of a TA")
    if not build.prealloc and tables_for(geometry, end) > build.tables:
        return Failure(LOAD, "translation tables")
    count = groups(build, tables_for(geometry, end))
    try:
        heap.allocate_all((SESSION, *ta.instance_heap(), *(TABLE_GROUP,) * count), _SIZER)
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
        heap.allocate_all((VM_REGION,) * len(sizes) + (TABLE_GROUP,) * (called - loaded), _SIZER)
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


def _sessions(build: Build, tas: Sequence[TaProfile]) -> int | None:
    """Sessions of the first TA, each with its set-ups, that fit at once beside the other TAs."""
    ta, *others = tas
    if first_failure(build, tas, ta.heap or 0) is not None:
        return 0  # no session of it is of any use
    kinds = set_ups(build.bignum_bits)
    each = block_size(SESSION) + sum(block_sizes(kinds[kind]) * number for kind, number in ta.set_ups)
    group = groups(build, tables(build, ta, parameters=False))
    instance = block_sizes((*ta.instance_heap(), *(TABLE_GROUP,) * group))
    heap = down(build.heap, 16) - HEADER - CORE_OWN - _loaded(build, others)
    if ta.single_instance:
        return max(heap - instance, 0) // each
    fit = max(heap, 0) // (each + instance)
    if build.ta_ram is not None:
        ram = build.ta_ram - build.stacks - sum(_loaded_ta_ram(build, other) for other in others)
        fit = min(fit, max(ram, 0) // (ta.own + group * GROUP * PAGE))
    return fit


def set_up_heap_failure(build: Build, tas: Sequence[TaProfile], sessions: int) -> str:
    """Where one session more than fit fails: at its TA's load, or when it allocates its set-ups."""
    ta, *others = tas
    base = heap_with(build, (*others, replace(ta, sessions=sessions)))
    if base is None:
        return LOAD
    group = groups(build, tables(build, ta, parameters=False))
    instance = () if ta.single_instance and sessions else (*ta.instance_heap(), *(TABLE_GROUP,) * group)
    try:
        base.allocate_all((SESSION, *instance), _SIZER)
    except TeeError:
        return LOAD
    if build.ta_ram is not None and instance:
        ram = build.stacks + sum(_loaded_ta_ram(build, other) for other in others)
        ram += _loaded_ta_ram(build, replace(ta, sessions=sessions + 1))
        if ram > build.ta_ram:
            return LOAD
    return ALLOCATE


def count_set_ups(build: Build, free: int, kind: str = "rsa-sign") -> int:
    """Set-ups of a kind that fit so many bytes of heap in one piece."""
    return max(free, 0) // block_sizes(set_ups(build.bignum_bits)[kind])


def register_peak(pages: int) -> int:
    """Heap that registering a buffer takes while it happens: the array of addresses, and the object that stays."""
    return block_size(PAGE_ADDRESS * pages) + max(block_size(shared_memory(pages)), list_page())


def list_page() -> int:
    """Heap for one page of a page list while it is mapped."""
    return block_sizes((shared_memory(1), MAPPING))


def largest_buffer(largest_free: int) -> int:
    """Pages of the largest buffer that can be registered where the largest free block holds so many bytes."""
    pages = max(largest_free, 0) // (2 * PAGE_ADDRESS)
    while pages and register_peak(pages) > largest_free + HEADER:
        pages -= 1
    return pages


def count_buffers(heap: Heap, pages: int, most: int = 1 << 20) -> int:
    """Buffers of so many pages that can be registered one after the other, at most `most`. Uses up the heap."""
    for count in range(most):
        try:
            array = heap.allocate(PAGE_ADDRESS * pages, _SIZER)
            heap.free_all(heap.allocate_all((shared_memory(1), MAPPING), _SIZER))
            heap.allocate(shared_memory(pages), _SIZER)
        except TeeError:
            return count
        heap.free(array)
    return most


def total_pages(heap: Heap, pages: int) -> int:
    """Pages that can be shared in buffers of so many pages each. Uses up the heap, which has one free block."""
    if not pages:
        return 0
    # Of a large heap all but the end is alike: each object, and unless the best fit is sought a hole beside it.
    each = block_size(shared_memory(pages)) + (0 if heap.best_fit else block_size(PAGE_ADDRESS * pages))
    alike = max(heap.largest_free // each - _SIMULATED, 0)
    if alike:
        heap.allocate(alike * each - HEADER, _SIZER)
    return (alike + count_buffers(heap, pages)) * pages


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


def heap_needed(allocations: Iterable[int]) -> int:
    """The smallest heap (CFG_CORE_HEAP_SIZE) that holds these beside what the core itself keeps."""
    return up(CORE_OWN + block_sizes(allocations) + HEADER)
