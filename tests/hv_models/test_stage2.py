from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.descriptor import LEAF_ATTRIBUTES, Descriptor
from hv_models.memory import PAGE_SIZE, Bank, Frames, Ipa, PageStore, PhysicalMemory
from hv_models.pages import PagePool
from hv_models.region import Region
from hv_models.sharing import FrameSharing
from hv_models.stage2 import PageKind, Reason, Stage2, Stage2Fault
from hv_models.walk import WalkFault

RAM = 0x4000_0000
FRAMES = 0x100_0000_0000
TABLES = 1 << 46
GIB_PAGES = 262144
MAPPED = [kind for kind in PageKind if kind is not PageKind.NONE]


def run(first: int, pages: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return (np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)) + np.uint64(first)


@dataclass
class Tables:
    """Stage-2 tables without a VM around them."""

    memory: PhysicalMemory = field(default_factory=PhysicalMemory)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.memory, "tables", TABLES)
        self.stage2 = Stage2(self.memory, self.pool, FrameSharing(self.memory))

    def add_region(self, pages: int) -> Region:
        bank = Bank("ram", PageStore("ram", pages), Frames(FRAMES, pages))
        self.memory.add(bank)
        region = Region(RAM, bank)
        self.stage2.add_region(region)
        return region


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = Tables()
    yield tables
    tables.stage2.close()
    assert tables.pool.allocated == 0
    for bank in tables.memory.banks:
        bank.store.close()


REGION_PAGES = 1100  # two whole blocks of 2 MiB and a part of a third
WINDOW = 300  # pages before and behind the region that operations reach as well
places = st.one_of(st.sampled_from([0, 512, 1024]), st.integers(-WINDOW, REGION_PAGES + WINDOW - 1))
lengths = st.one_of(st.sampled_from([1, 512, 1024]), st.integers(1, 700))
kinds = st.sampled_from(MAPPED)
operations = st.one_of(
    st.tuples(st.just("map"), places, lengths, kinds, st.sampled_from([0, 512, 7, 5000])),
    st.tuples(st.just("scatter"), st.lists(st.integers(0, REGION_PAGES - 1), unique=True), st.booleans()),
    st.tuples(st.just("unmap"), places, lengths),
    st.tuples(st.just("change"), places, lengths, st.sampled_from(PageKind)),
    st.tuples(st.just("protect"), places, lengths),
    st.tuples(st.just("unprotect"), places, lengths),
)


@dataclass
class Entry:
    pa: int
    kind: PageKind
    logged: bool = False


@settings(deadline=None, max_examples=60)
@given(st.lists(operations, min_size=1, max_size=8))
def test_tables_walker_and_tlb_agree_with_a_plain_dictionary(steps: list[tuple[object, ...]]) -> None:
    tables = Tables()
    stage2, region = tables.stage2, tables.add_region(REGION_PAGES)
    model: dict[int, Entry] = {}
    for step in steps:
        apply(stage2, model, step)
    window = range(-WINDOW, REGION_PAGES + WINDOW + 700)
    ipas = [RAM + page * PAGE_SIZE for page in window]
    expected = [model.get(page) for page in window]
    walks = [stage2.walk(ipa + 5) for ipa in ipas]
    assert [(walk.pa, walk.kind) for walk in walks] == [
        (None, PageKind.NONE) if entry is None else (entry.pa + 5, entry.kind) for entry in expected
    ]
    leaves = stage2.descriptors(ipas[0], len(ipas))
    assert stage2.lookup(np.array(ipas[::-1], dtype=np.uint64)).tolist() == leaves.tolist()[::-1]
    assert [describe(leaf) for leaf in leaves.tolist()] == expected
    shareable = {region.bank.pa[page]: page + 1 for page in range(REGION_PAGES)}
    pas = [
        entry.pa if (entry := model.get(page)) and entry.kind is PageKind.RAM_RW and entry.pa in shareable else 0
        for page in range(REGION_PAGES)
    ]
    assert region.pas.tolist() == [*pas, 0]
    assert region.entries.tolist() == [shareable.get(pa, 0) for pa in [*pas, 0]]
    for pa in (FRAMES, FRAMES + 512 * PAGE_SIZE, FRAMES + 5000 * PAGE_SIZE):
        assert stage2.find(pa + 9) == [
            RAM + page * PAGE_SIZE for page in window if page in model and model[page].pa == pa
        ]
    stage2.close()
    assert tables.pool.allocated == 0


def apply(stage2: Stage2, model: dict[int, Entry], step: tuple[object, ...]) -> None:
    match step:
        case "map", int(first), int(pages), PageKind() as kind, int(source):
            stage2.map(RAM + first * PAGE_SIZE, run(FRAMES + source * PAGE_SIZE, pages), kind)
            for page in range(pages):
                model[first + page] = Entry(FRAMES + (source + page) * PAGE_SIZE, kind)
        case "scatter", list(scattered), bool(logged):
            ipas = np.array([RAM + page * PAGE_SIZE for page in scattered], dtype=np.uint64)
            pas = np.array([FRAMES + (page ^ 1) * PAGE_SIZE for page in scattered], dtype=np.uint64)
            stage2.map_scattered(ipas, pas, logged=logged)
            for page in scattered:
                model[page] = Entry(FRAMES + (page ^ 1) * PAGE_SIZE, PageKind.RAM_RW, logged)
        case "unmap", int(first), int(pages):
            stage2.unmap(RAM + first * PAGE_SIZE, pages)
            for page in range(pages):
                model.pop(first + page, None)
        case "change", int(first), int(pages), PageKind() as kind:
            unmapped = next((page for page in range(first, first + pages) if page not in model), None)
            if kind is PageKind.NONE:
                apply(stage2, model, ("unmap", first, pages))
                stage2.change(RAM + first * PAGE_SIZE, pages, kind)
            elif unmapped is not None:
                with pytest.raises(Stage2Fault) as caught:
                    stage2.change(RAM + first * PAGE_SIZE, pages, kind)
                assert (caught.value.ipa, caught.value.reason) == (RAM + unmapped * PAGE_SIZE, Reason.UNMAPPED)
            else:
                stage2.change(RAM + first * PAGE_SIZE, pages, kind)
                for page in range(first, first + pages):
                    model[page] = Entry(model[page].pa, kind)
        case "protect", int(first), int(pages):
            stage2.protect_for_logging(run(RAM + first * PAGE_SIZE, pages))
            for page in range(first, first + pages):
                if page in model and model[page].kind is PageKind.RAM_RW:
                    model[page].logged = True
        case "unprotect", int(first), int(pages):
            stage2.unprotect_logged(run(RAM + first * PAGE_SIZE, pages))
            for page in range(first, first + pages):
                if page in model:
                    model[page].logged = False
        case _:
            raise AssertionError(step)


def describe(leaf: int) -> Entry | None:
    descriptor = Descriptor(leaf)
    return Entry(descriptor.address, descriptor.kind, descriptor.logged) if descriptor.valid else None


class TestBlocks:
    def test_the_largest_block_is_used_that_frames_and_address_allow(self, tables: Tables) -> None:
        stage2 = tables.stage2
        stage2.map(1 << 30, run(1 << 40, GIB_PAGES + 512 + 3), PageKind.RAM_RW)
        walks = [stage2.walk(ipa) for ipa in ((2 << 30) - 1, 2 << 30, (2 << 30) + (2 << 20))]
        assert [walk.pages for walk in walks] == [GIB_PAGES, 512, 1]
        assert [walk.pa for walk in walks] == [
            (1 << 40) + offset for offset in ((1 << 30) - 1, 1 << 30, (1 << 30) + (2 << 20))
        ]
        assert stage2.tables == 3  # one of each level

    def test_frames_that_are_not_aligned_get_pages(self, tables: Tables) -> None:
        tables.stage2.map(1 << 30, run((1 << 40) + PAGE_SIZE, 512), PageKind.RAM_RW)
        assert tables.stage2.walk(1 << 30).pages == 1

    def test_a_change_within_a_block_splits_it_down_to_pages_and_touches_nothing_else(self, tables: Tables) -> None:
        stage2 = tables.stage2
        stage2.map(1 << 30, run(1 << 40, GIB_PAGES), PageKind.RAM_RW)
        page = 77 * 512 + 5
        stage2.change((1 << 30) + page * PAGE_SIZE, 1, PageKind.RAM_RO)
        assert [
            (walk.pa, walk.kind, walk.pages)
            for offset in (-1, 0, 4095, 4096, 2 << 20, -(2 << 20))
            for walk in [stage2.walk((1 << 30) + page * PAGE_SIZE + offset)]
        ] == [
            ((1 << 40) + page * PAGE_SIZE + offset, kind, pages)
            for offset, kind, pages in [
                (-1, PageKind.RAM_RW, 1),
                (0, PageKind.RAM_RO, 1),
                (4095, PageKind.RAM_RO, 1),
                (4096, PageKind.RAM_RW, 1),
                (2 << 20, PageKind.RAM_RW, 512),
                (-(2 << 20), PageKind.RAM_RW, 512),
            ]
        ]

    def test_a_block_over_tables_gives_them_back(self, tables: Tables) -> None:
        stage2 = tables.stage2
        stage2.map(1 << 30, run((1 << 40) + PAGE_SIZE, GIB_PAGES), PageKind.RAM_RW)
        assert stage2.tables == 2 + 512
        stage2.map(1 << 30, run(1 << 40, GIB_PAGES), PageKind.RAM_RW)
        assert stage2.tables == tables.pool.allocated == 1
        stage2.unmap(1 << 30, GIB_PAGES)
        assert stage2.walk(1 << 30).fault_level == 1


class TestWalk:
    def test_shows_every_level(self, tables: Tables) -> None:
        tables.stage2.map(0x4020_3000, run(0x100_0000_5000, 1), PageKind.RAM_RW)
        text = str(tables.stage2.walk(0x4020_3ABC)).splitlines()
        assert text[0] == "IPA 0x40203abc"
        assert text[1].startswith(f"  level 1: table {TABLES:#x}[1] = ")
        assert text[2].startswith("  level 2: table ")
        assert "[1] = " in text[2]
        assert "[3] = 0x00000100000057ff, page, PA 0x10000005000, S2AP rw, Normal write-back, RAM_RW" in text[3]
        assert text[4] == "  PA 0x10000005abc RAM_RW"

    @pytest.mark.parametrize("ipa", [-1, 1 << 39, (1 << 64) - 1, 1 << 70])
    def test_an_address_beyond_the_tables_faults_at_level_0(self, tables: Tables, ipa: int) -> None:
        walk = tables.stage2.walk(ipa)
        assert (walk.fault, walk.fault_level, walk.steps) == (WalkFault.TRANSLATION, 0, ())
        assert str(walk).endswith("translation fault, level 0")

    def test_faults_at_the_level_where_the_way_ends(self, tables: Tables) -> None:
        tables.stage2.map(0x4000_0000, run(FRAMES + PAGE_SIZE, 1), PageKind.RAM_RW)
        levels = [tables.stage2.walk(ipa).fault_level for ipa in (0, 0x4020_0000, 0x4000_1000)]
        assert levels == [1, 2, 3]

    def test_reads_the_tables_in_memory(self, tables: Tables) -> None:
        tables.stage2.map(0x4000_0000, run(FRAMES, 1), PageKind.RAM_RW)
        leaf = tables.stage2.walk(0x4000_0000).steps[2]
        at = leaf.table + 8 * leaf.index
        assert tables.memory.read(at, 8) == int(leaf.descriptor).to_bytes(8, "little")
        tables.memory.write(at, (leaf.descriptor & ~(1 << 10)).to_bytes(8, "little"))
        assert tables.stage2.walk(0x4000_0000).fault is WalkFault.ACCESS_FLAG
        tables.memory.write(at, (leaf.descriptor & ~2).to_bytes(8, "little"))
        assert tables.stage2.walk(0x4000_0000).fault is WalkFault.TRANSLATION

    def test_a_table_outside_of_memory_is_an_external_abort(self, tables: Tables) -> None:
        tables.stage2.map(0x4000_0000, run(FRAMES, 1), PageKind.RAM_RW)
        step = tables.stage2.walk(0x4000_0000).steps[1]
        at = step.table + 8 * step.index
        tables.memory.write(at, (0xDEAD_BEEF_0000 | 3).to_bytes(8, "little"))
        walk = tables.stage2.walk(0x4000_0000)
        assert (walk.fault, walk.fault_level, walk.pa) == (WalkFault.EXTERNAL_ABORT, 3, None)
        tables.memory.write(at, int(step.descriptor).to_bytes(8, "little"))


class TestRegions:
    def test_may_not_overlap_or_reach_beyond_the_tables(self, tables: Tables) -> None:
        region = tables.add_region(8)
        for base in (RAM, RAM + 7 * PAGE_SIZE, RAM - 7 * PAGE_SIZE):
            with pytest.raises(ValueError, match="overlaps"):
                tables.stage2.add_region(Region(base, region.bank))
        with pytest.raises(ValueError, match="beyond"):
            tables.stage2.add_region(Region((1 << 39) - 7 * PAGE_SIZE, region.bank))
        with pytest.raises(ValueError, match="aligned"):
            Region(RAM + 8, region.bank)

    def test_what_was_mapped_before_is_in_the_tlb(self, tables: Tables) -> None:
        tables.stage2.map(RAM + PAGE_SIZE, run(FRAMES, 2), PageKind.RAM_RW)
        assert tables.add_region(4).entries.tolist() == [0, 1, 2, 0, 0]

    def test_a_removed_one_leaves_no_mapping_of_its_frames_anywhere(self, tables: Tables) -> None:
        region = tables.add_region(2048)
        tables.stage2.map(RAM, region.bank.pa, PageKind.RAM_RW)
        tables.stage2.map(0x8000_0000, region.bank.pa[5:6], PageKind.RAM_RW)
        tables.stage2.map(0x9000_0000, run(0x5_0000_0000, 1), PageKind.MMIO)
        tables.stage2.remove_region(region)
        assert [tables.stage2.walk(ipa).pa for ipa in (RAM, 0x8000_0000, 0x9000_0000)] == [None, None, 0x5_0000_0000]

    def test_ipa_0_is_never_shareable(self, tables: Tables) -> None:
        bank = Bank("low", PageStore("low", 4), Frames(FRAMES, 4))
        tables.memory.add(bank)
        region = Region(0, bank)
        tables.stage2.add_region(region)
        tables.stage2.map(0, bank.pa, PageKind.RAM_RW)
        assert region.entries.tolist() == [0, 2, 3, 4, 0]
        assert region.ipa(3) == Ipa(0x3000)


@pytest.mark.parametrize("kind", MAPPED)
def test_every_kind_survives_in_the_tables(tables: Tables, kind: PageKind) -> None:
    tables.stage2.map(RAM, run(FRAMES, 600), kind)
    assert {tables.stage2.walk(RAM + page * PAGE_SIZE).kind for page in (0, 511, 512, 599)} == {kind}
    assert LEAF_ATTRIBUTES[kind] == tables.stage2.walk(RAM).descriptor & ~((1 << 48) - 4096) & ~2
