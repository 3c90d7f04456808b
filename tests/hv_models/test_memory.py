import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.memory import (
    PAGE_SIZE,
    Bank,
    Frames,
    GuestRam,
    PageArray,
    PageStore,
    PhysicalFault,
    PhysicalMemory,
)

BASE = 0x100_0000_0000


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    memory = PhysicalMemory()
    yield memory
    for bank in memory.banks:
        bank.store.close()


def bank_of(pages: int, base: int = BASE, *, stride: int = 1, permutation: int = 0) -> Bank:
    return Bank("test", PageStore("test", pages), Frames(base, pages, stride, permutation))


class TestPageStore:
    @pytest.mark.parametrize("size", [0, PAGE_SIZE, 3 * PAGE_SIZE])
    def test_nobody_can_change_the_size(self, size: int) -> None:
        store = PageStore("sealed", 2)
        with pytest.raises(PermissionError):
            os.ftruncate(store.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(store.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def test_memory_is_committed_by_touch_only(self) -> None:
        store = PageStore("sparse", 262144)
        assert os.fstat(store.fd).st_blocks == 0
        for page in (0, 5, 6, 262143):
            store.view[page * PAGE_SIZE + 17] = 1
        assert list(store.touched()) == [range(1), range(5, 7), range(262143, 262144)]
        assert os.fstat(store.fd).st_blocks * 512 == 4 * PAGE_SIZE

    def test_bytes_and_words_are_the_same_memory(self) -> None:
        store = PageStore("same", 3)
        store.words[1, 511] = 0x0123_4567_89AB_CDEF
        assert store.view[2 * PAGE_SIZE - 8 : 2 * PAGE_SIZE].hex() == "efcdab8967452301"

    def test_an_attached_store_shows_the_same_pages(self) -> None:
        store = PageStore("owner", 4)
        whole = PageStore.attach(os.dup(store.fd), limit=4)
        upper = PageStore.attach(os.dup(store.fd), offset=2 * PAGE_SIZE, pages=1)
        whole.view[2 * PAGE_SIZE] = 7
        upper.view[1] = 8
        assert store.view[2 * PAGE_SIZE : 2 * PAGE_SIZE + 2].tobytes() == b"\x07\x08"
        assert whole.file == upper.file == store.file
        assert list(upper.touched()) == [range(1)]

    @pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
    def test_a_file_that_may_change_its_size_is_refused(self, seals: int) -> None:
        fd = os.memfd_create("foreign", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(ValueError, match="sealed"):
            PageStore.attach(fd)
        os.close(fd)

    @pytest.mark.parametrize(
        ("size", "offset", "pages", "limit"),
        [
            (0, 0, None, None),
            (PAGE_SIZE + 1, 0, None, None),
            (4 * PAGE_SIZE, 0, None, 3),
            (4 * PAGE_SIZE, 0, 5, None),
            (4 * PAGE_SIZE, 4 * PAGE_SIZE, None, None),
            (4 * PAGE_SIZE, 5 * PAGE_SIZE, None, None),
            (4 * PAGE_SIZE, 512, 1, None),
            (4 * PAGE_SIZE, -PAGE_SIZE, 1, None),
            (4 * PAGE_SIZE, 0, -1, None),
        ],
    )
    def test_a_piece_that_is_not_in_the_file_is_refused(
        self, size: int, offset: int, pages: int | None, limit: int | None
    ) -> None:
        fd = os.memfd_create("foreign", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with pytest.raises(ValueError, match="pages"):
            PageStore.attach(fd, offset=offset, pages=pages, limit=limit)
        os.close(fd)

    def test_what_is_no_memfd_is_refused(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file, pytest.raises(ValueError, match="memfd"):
            PageStore.attach(file.fileno())

    def test_a_forgotten_store_leaves_no_descriptor_behind(self) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            PageStore("forgotten", 1)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


frames = st.builds(
    Frames,
    base=st.integers(1, 1 << 30).map(lambda frame: frame * PAGE_SIZE),
    pages=st.integers(1, 300),
    stride=st.sampled_from([1, 2, 8, 64]),
    permutation=st.integers(0, 600),
)


class TestFrames:
    @settings(deadline=None)
    @given(frames)
    def test_follow_the_formula_and_turn_round(self, frames: Frames) -> None:
        pas = frames.addresses()
        expected = [
            frames.base + (page ^ frames.permutation) * frames.stride * PAGE_SIZE for page in range(frames.pages)
        ]
        assert pas.tolist() == expected
        assert frames.find(pas).tolist() == list(range(frames.pages))
        assert [frames.page(pa + 4095) for pa in expected] == list(range(frames.pages))
        assert max(expected) < frames.end

    @settings(deadline=None)
    @given(frames, st.integers(-5, 5000))
    def test_what_is_not_a_frame_is_found_by_neither_look_up(self, frames: Frames, distance: int) -> None:
        pa = max(0, frames.base + distance * PAGE_SIZE)
        known = frames.addresses().tolist()
        expected = known.index(pa) if pa in known else None
        assert frames.page(pa) == expected
        assert frames.find(np.array([pa], dtype=np.uint64))[0] == (-1 if expected is None else expected)
        assert frames.are_all(np.array([*known, pa, *known], dtype=np.uint64)) == (expected is not None)
        assert not frames.are_all(np.array([*known, known[0] + 8], dtype=np.uint64))

    @pytest.mark.parametrize("base", [0, -4096, 1, 4097])
    def test_no_frame_has_address_0(self, base: int) -> None:
        with pytest.raises(ValueError, match="above 0"):
            Frames(base, 1)


class TestPins:
    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(0, 3), max_size=5) | st.integers(0, 5) | st.none(), max_size=30))
    def test_each_mention_counts_until_its_pin_ends_whenever_somebody_asks(
        self, steps: list[list[int] | int | None]
    ) -> None:
        """A list of pages is pinned, a number unpins one of those, None asks for the counts."""
        bank = bank_of(4)
        held: list[tuple[list[int], PageArray]] = []
        for step in [*steps, None]:
            if isinstance(step, list):
                held.append((step, bank.frames.addresses(np.array(step, dtype=np.int64))))
                bank.pin(held[-1][1])
            elif step is None:
                counts = Counter(page for pages, _ in held for page in pages)
                assert bank.pinned() == counts
                assert bank.pins.tolist() == [counts[page] for page in range(4)]
            elif step < len(held):
                bank.unpin(held.pop(step)[1])
        bank.store.close()


class TestPhysicalMemory:
    def test_an_access_may_cross_frames_that_are_not_neighbours_in_the_store(self, memory: PhysicalMemory) -> None:
        bank = bank_of(8, permutation=5)
        memory.add(bank)
        data = bytes(range(256)) * 40
        memory.write(BASE + 100, data)
        assert memory.read(BASE + 100, len(data)) == data
        assert bank.page_view(5)[100:110] == data[:10]
        assert bank.page_view(4)[0:10] == data[PAGE_SIZE - 100 :][:10]

    def test_the_frames_between_belong_to_somebody_else_or_nobody(self, memory: PhysicalMemory) -> None:
        ours, theirs = bank_of(4, stride=4), bank_of(4, BASE + PAGE_SIZE, stride=4)
        memory.add(ours)
        memory.add(theirs)
        assert memory.find(BASE + PAGE_SIZE + 5) == (theirs, 0)
        for hole in (BASE + 2 * PAGE_SIZE, BASE - 1, BASE + 16 * PAGE_SIZE, 0, 1 << 63, -1):
            with pytest.raises(PhysicalFault) as caught:
                memory.frame(hole)
            assert caught.value.pa == hole

    def test_a_write_into_a_hole_changes_nothing(self, memory: PhysicalMemory) -> None:
        memory.add(bank_of(2))
        with pytest.raises(PhysicalFault):
            memory.write(BASE + PAGE_SIZE, b"x" * (PAGE_SIZE + 1))
        assert memory.read(BASE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
        with pytest.raises(PhysicalFault):
            memory.read(BASE + PAGE_SIZE, PAGE_SIZE + 1)

    def test_a_removed_bank_is_a_hole_and_its_place_can_be_taken(self, memory: PhysicalMemory) -> None:
        first, second = bank_of(2), bank_of(2)
        memory.add(first)
        memory.write(BASE, b"first")
        memory.remove(first)
        with pytest.raises(PhysicalFault):
            memory.read(BASE, 5)
        memory.add(second)
        assert memory.read(BASE, 5) == bytes(5)
        assert memory.find(BASE) == (second, 0)

    def test_looking_everything_up_costs_bounded_memory(
        self, memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hv_models.memory._CACHED_FRAMES", 8)
        bank = bank_of(100)
        memory.add(bank)
        for page in (*range(100), *range(99, -1, -1)):
            memory.frame(BASE + page * PAGE_SIZE)[0] = page
            assert memory.find(BASE + page * PAGE_SIZE) == (bank, page)
            assert len(memory._found) <= 8
            assert len(memory._views) <= 8
        assert bank.store.view[::PAGE_SIZE].tolist() == list(range(100))

    def test_a_bank_that_reaches_over_4_gib_is_found_everywhere(self, memory: PhysicalMemory) -> None:
        bank = bank_of(4, 0x1_FFFF_E000)
        memory.add(bank)
        assert [memory.find(0x1_FFFF_E000 + page * PAGE_SIZE) for page in range(4)] == [
            (bank, page) for page in range(4)
        ]


class TestGuestRam:
    def test_reads_and_writes_by_ipa(self) -> None:
        ram = GuestRam(PageStore("ram", 4), 0x4000_0000)
        ram.write(0x4000_1FFE, b"abcd")
        assert ram.read(0x4000_1FFC, 8) == b"\0\0abcd\0\0"
        assert ram.words[2, 0] == int.from_bytes(b"cd", "little")
        assert ram.size == 4 * PAGE_SIZE

    @pytest.mark.parametrize(
        ("ipa", "size"),
        [(0x3FFF_FFFF, 2), (0x4000_3FFF, 2), (0, 1), (-1, 1), ((1 << 64) - 1, 1), (0x4000_0000, 4 * PAGE_SIZE + 1)],
    )
    def test_outside_is_an_error(self, ipa: int, size: int) -> None:
        ram = GuestRam(PageStore("ram", 4), 0x4000_0000)
        with pytest.raises(ValueError, match="outside"):
            ram.read(ipa, size)
        with pytest.raises(ValueError, match="outside"):
            ram.write(ipa, bytes(size))
