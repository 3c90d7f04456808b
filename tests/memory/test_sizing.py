"""What `mediator size` computes, against the published numbers and against sums made here."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optee.memory.boards import BOARDS
from optee.memory.build import CORE_OWN, KIB, MIB, SHORT, Build
from optee.memory.changes import solve
from optee.memory.explain import explain
from optee.memory.failures import CREATE, INVOKE, REGISTER
from optee.memory.heap import HEADER, Heap, block_sizes
from optee.memory.measurements import PREDICTED, rows
from optee.memory.needs import groups, heap_with, tables
from optee.memory.pool import Owner
from optee.memory.profile import MAP_OF_7077, SMALL_TA, TEST_PROGRAM, TaProfile, set_ups
from optee.memory.shared_buffers import count_buffers, largest_buffer, register_peak, total_pages
from optee.memory.sizing import Load, Sizing, size
from optee.memory.structures import SESSION, TABLE_GROUP, rsa_keypair, rsa_public_key, shared_memory

QEMU = BOARDS["qemu_armv8a"].build


def sized(build: Build, *tas: TaProfile, guests: int = 1, **load: int) -> Sizing:
    return size(build, Load(guests, tas or (TEST_PROGRAM,), **load))


@pytest.mark.parametrize(("threads", "usable"), [(16, 28), (32, 92), (64, 220), (128, 476)])
def test_published_thread_counts(threads: int, usable: int) -> None:
    sizing = sized(Build(threads=threads))
    assert sizing.usable == usable * MIB
    assert sizing.usable_binding == "translation tables"
    assert sizing.fits


def test_eight_threads_do_not_hold_the_test_program() -> None:
    sizing = sized(Build(threads=8))
    (limit,) = sizing.failing
    assert (limit.needed, limit.available, limit.place) == (18, 16, INVOKE)
    assert sizing.usable == -1


def test_a_calibrated_number_is_never_called_predicted() -> None:
    predicted = [(row.threads, row.model, row.measured) for row in rows() if row.kind == PREDICTED]
    assert predicted == [(16, 28, "28"), (64, 220, "220"), (128, 476, "475")]
    assert len(rows()) == 20
    assert all(row.why for row in rows())


def test_the_split_of_qemu() -> None:
    sizing = sized(QEMU, SMALL_TA, guests=2)
    assert QEMU.ta_ram == 6_500_352
    assert (sizing.guests, sizing.fits) == (2, True)
    third = sized(QEMU, SMALL_TA, guests=3)
    assert [limit.place for limit in third.failing] == [CREATE]


@pytest.mark.parametrize(("heap", "keys", "mib"), [(64, 6, 14.6), (144, 15, 34.6), (192, 20, 46.6), (256, 27, 62.6)])
def test_core_heaps(heap: int, keys: int, mib: float) -> None:
    sizing = sized(Build(threads=32, heap=heap * KIB))
    assert sizing.rsa_operations == keys
    assert round(sizing.largest_buffer * 4096 / MIB, 1) == mib


def test_the_map_of_7077_needs_59_threads_or_preallocation() -> None:
    assert tables(Build(), MAP_OF_7077) == 118
    assert sized(Build(threads=59), MAP_OF_7077).fits
    assert not sized(Build(threads=58), MAP_OF_7077).fits
    assert sized(Build(threads=2, prealloc=True), MAP_OF_7077).fits


@pytest.mark.parametrize(
    ("threads", "lpae", "expected"),
    [(1, True, 4), (2, True, 8), (2, False, 8), (3, True, 6), (3, False, 8), (8, True, 16)],
)
def test_size_of_the_table_pool(threads: int, lpae: bool, expected: int) -> None:
    assert Build(threads=threads, lpae=lpae).tables == expected


def test_structure_sizes_make_the_published_sums() -> None:
    assert block_sizes(rsa_keypair()) == 4672
    assert block_sizes(rsa_public_key()) == 1264
    assert block_sizes(set_ups()["rsa-sign"]) == 9424
    assert [block_sizes((shared_memory(pages),)) for pages in (1, 128, 512, 4096)] == [96, 1120, 4192, 32864]


def test_a_thread_costs_22_kib() -> None:
    assert Build().thread_size == 22272
    assert Build(prealloc=True).thread_size == 22272 - 8192


def test_a_short_descriptor_ta_has_32_mib() -> None:
    sizing = sized(Build(threads=64, lpae=False), replace(SMALL_TA, heap=None))
    assert sizing.usable == SHORT.user_space - SMALL_TA.beside_heap
    assert "address space" in sizing.usable_binding


def test_shared_buffers_fail_as_bad_parameters() -> None:
    build = Build(threads=32)
    most = sized(build, buffer=MIB).total_pages // 256
    assert sized(build, buffer=MIB, buffers=most).fits
    (limit,) = sized(build, buffer=MIB, buffers=most + 1).failing
    assert (limit.place, limit.available) == (REGISTER, most)
    assert sized(replace(build, dynamic_shm=False), buffers=1).failing[0].option == "CFG_CORE_DYN_SHM=n"


@given(st.integers(4096, 400_000), st.integers(1, 40), st.booleans())
def test_shared_pages_are_counted_as_if_one_by_one(heap: int, pages: int, best_fit: bool) -> None:
    slow, fast = (Heap(heap, best_fit=best_fit) for _ in range(2))
    assert total_pages(fast, pages) == count_buffers(slow, pages) * pages


@given(st.integers(0, 1 << 22))
def test_the_largest_buffer_fits_and_one_page_more_does_not(free: int) -> None:
    pages = largest_buffer(free)
    assert not pages or register_peak(pages) <= free + 16
    assert register_peak(pages + 1) > free + 16


def builds() -> st.SearchStrategy[Build]:
    return st.builds(
        Build,
        threads=st.integers(1, 64),
        heap=st.integers(4, 512).map(lambda pages: pages * 4096),
        prealloc=st.booleans(),
        lpae=st.booleans(),
        guest_count=st.integers(1, 8),
        secure_ram=st.none() | st.integers(4, 512).map(lambda mib: mib * MIB),
    )


def profiles() -> st.SearchStrategy[TaProfile]:
    return st.builds(
        TaProfile,
        name=st.just("TA"),
        code=st.integers(1, 4 * MIB),
        stack=st.integers(1, 4 * MIB),
        heap=st.integers(0, 64 * MIB),
        parameters=st.lists(st.integers(1, 8 * MIB), max_size=4).map(tuple),
        sessions=st.integers(1, 8),
        single_instance=st.booleans(),
    )


@given(builds(), profiles())
def test_the_largest_heap_fits_and_a_page_more_does_not(build: Build, ta: TaProfile) -> None:
    one = replace(ta, heap=None, sessions=1)
    usable = sized(build, one).usable
    if usable < 0:
        assert not sized(build, replace(one, heap=0)).fits
        return
    broken = [limit for limit in sized(build, replace(one, heap=usable)).failing if limit.place != CREATE]
    assert [limit for limit in broken if limit.name != "core heap"] == []
    assert not sized(build, replace(one, heap=usable + 4096)).fits


@given(builds(), profiles(), st.integers(1, 4), st.integers(0, 20))
def test_what_solve_answers_fits(build: Build, ta: TaProfile, guests: int, buffers: int) -> None:
    load = Load(guests, (ta,), 64 * KIB, buffers)
    for change in solve(build, load):
        assert size(change.build, load).fits
        assert change.lines
        assert all(line.startswith("CFG_") for line in change.lines)


@given(builds(), profiles())
def test_everything_can_be_explained(build: Build, ta: TaProfile) -> None:
    assert all(line.text and line.source for line in explain(sized(build, ta)))


def test_solve_gives_both_ways_out_of_large_tas() -> None:
    large = replace(TEST_PROGRAM, heap=85 * MIB)
    changes = solve(Build(), Load(2, (large,)))
    assert [change.lines for change in changes] == [
        ("CFG_NUM_THREADS=31",),
        ("CFG_CORE_PREALLOC_EL0_TBLS=y",),
        ("CFG_PGT_CACHE_ENTRIES=61",),
    ]
    assert solve(Build(threads=31), Load(2, (large,))) == []


def test_solve_raises_the_heap_to_the_least_that_suffices() -> None:
    load = Load(1, (replace(SMALL_TA, set_ups=(("rsa-sign", 7),)),))
    (change,) = solve(Build(), load)
    (line,) = change.lines
    needed = CORE_OWN + 176 + 2896 + 7 * 9424 + 16
    assert line == f"CFG_CORE_HEAP_SIZE={-(-needed // 4096) * 4096}"


def test_best_fit_keeps_the_large_block() -> None:
    first, best = (sized(Build(best_fit=best), SMALL_TA, buffer=64 * KIB).total_pages for best in (False, True))
    assert first <= best


def test_a_ta_that_does_not_fit_has_no_sessions() -> None:
    assert sized(Build(threads=8)).sessions == 0
    assert sized(Build(threads=9)).sessions


@pytest.mark.parametrize("best_fit", [False, True])
def test_a_loaded_heap_is_that_of_its_allocations_one_by_one(best_fit: bool) -> None:
    build = replace(QEMU, best_fit=best_fit, prealloc=True)
    tas = (replace(SMALL_TA, sessions=3, set_ups=(("rsa-sign", 2),)), replace(SMALL_TA, sessions=2))
    kinds = set_ups(build.bignum_bits)
    heap = Heap(build.heap, best_fit=best_fit)
    heap.allocate(CORE_OWN - HEADER, Owner("test", 0))
    for ta in tas:
        group = groups(build, tables(build, ta, parameters=False))
        for _ in range(ta.sessions):
            heap.allocate_all((*ta.instance_heap(), *(TABLE_GROUP,) * group, SESSION), Owner("test", 0))
            for kind, number in ta.set_ups:
                heap.allocate_all(kinds[kind] * number, Owner("test", 0))
    loaded = heap_with(build, tas)
    assert loaded is not None
    assert (loaded.largest_free, loaded.allocated) == (heap.largest_free, heap.allocated)


def test_the_work_does_not_grow_with_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    allocate = Heap.allocate

    def counted(heap: Heap, size: int, owner: Owner) -> int:
        nonlocal count
        count += 1
        return allocate(heap, size, owner)

    monkeypatch.setattr(Heap, "allocate", counted)
    many = replace(SMALL_TA, sessions=65535, set_ups=(("rsa-sign", 65535),))
    assert not sized(QEMU, many).fits
    sized(replace(QEMU, heap=1 << 30), replace(SMALL_TA, set_ups=(("rsa-sign", 60000),)))
    assert count < 2000
