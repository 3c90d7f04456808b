"""The guest's page allocator and its scattered buffers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests.errors import OutOfGuestMemoryError
from guests.memory import Buffer, PageAllocator, page_span
from hv_models.memory import PAGE_SIZE
from tests.guests.secure import BASE, make_ram

PAGES = 64


def allocator(pages: int = PAGES) -> PageAllocator:
    return PageAllocator(BASE, pages * PAGE_SIZE)


@given(st.lists(st.tuples(st.sampled_from(["page", "run", "pages", "release"]), st.integers(1, 20))))
def test_no_page_has_two_owners(steps: list[tuple[str, int]]) -> None:
    pages = allocator()
    held: list[tuple[int, ...]] = []
    for action, count in steps:
        if action == "release":
            if held:
                pages.release(held.pop(count % len(held)))
            continue
        take = {"page": lambda _: (pages.page(),), "run": pages.run, "pages": pages.pages}[action]
        before = pages.free
        try:
            taken = take(count)
        except OutOfGuestMemoryError:
            assert action == "run" or before < (1 if action == "page" else count)
            assert pages.free == before
            continue
        held.append(taken)
        if action == "run":
            assert list(taken) == list(range(taken[0], taken[0] + count * PAGE_SIZE, PAGE_SIZE))
    owned = [page for pages_held in held for page in pages_held]
    assert len(set(owned)) == len(owned) == pages.used
    assert all(page % PAGE_SIZE == 0 and 0 <= page - BASE < PAGES * PAGE_SIZE for page in owned)


def test_every_page_can_be_had_and_comes_back() -> None:
    pages = allocator()
    for _ in range(3):
        held = pages.pages(PAGES)
        assert len(set(held)) == PAGES
        with pytest.raises(OutOfGuestMemoryError):
            pages.page()
        pages.release(held)
    assert pages.used == 0


def test_a_buffer_is_never_contiguous_by_chance() -> None:
    held = allocator(1024).pages(512)
    assert all(after - before != PAGE_SIZE for before, after in itertools.pairwise(held))


def test_the_last_page_freed_is_used_next() -> None:
    pages = allocator()
    first, second = pages.page(), pages.page()
    pages.release((first,))
    pages.release((second,))
    assert (pages.page(), pages.page()) == (second, first)


@pytest.mark.parametrize("wrong", [BASE, BASE + 1, BASE - PAGE_SIZE, BASE + PAGES * PAGE_SIZE])
def test_releasing_what_is_not_held_is_an_error(wrong: int) -> None:
    with pytest.raises(ValueError, match="not allocated"):
        allocator().release((wrong,))


@given(st.integers(0, 3 * PAGE_SIZE), st.integers(0, PAGE_SIZE - 1), st.data())
def test_a_buffer_reads_back_what_was_written(size: int, offset: int, data: st.DataObject) -> None:
    ram = make_ram(PAGES)
    buffer = Buffer(ram, allocator().pages(page_span(size, offset)), size, offset)
    expected = bytearray(size)
    for _ in range(3):
        start = data.draw(st.integers(0, size))
        piece = data.draw(st.binary(max_size=min(size - start, 5000)))
        buffer.write(piece, start)
        expected[start : start + len(piece)] = piece
    assert buffer.read() == expected
    with pytest.raises(ValueError, match="outside"):
        buffer.write(b"x", size)
    with pytest.raises(ValueError, match="outside"):
        buffer.read(0, size + 1)
