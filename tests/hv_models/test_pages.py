from collections.abc import Iterator

import pytest

from hv_models.memory import PAGE_SIZE, PhysicalFault, PhysicalMemory
from hv_models.pages import BANK_PAGES, PagePool

BASE = 1 << 47


@pytest.fixture(params=[0, 0xA5])
def pool(request: pytest.FixtureRequest) -> Iterator[PagePool]:
    pool = PagePool(PhysicalMemory(), "pool", BASE, fill=request.param)
    yield pool
    pool.close()


def test_pages_are_distinct_frames_of_physical_memory() -> None:
    memory = PhysicalMemory()
    pool = PagePool(memory, "pool", BASE)
    pages = [pool.allocate() for _ in range(BANK_PAGES + 3)]
    assert len({page.pa for page in pages}) == len(pages) == pool.allocated
    for number, page in enumerate(pages):
        page.words[511] = number
    assert [int.from_bytes(memory.read(page.pa + 4088, 8), "little") for page in pages] == list(range(len(pages)))
    assert min(page.pa for page in pages) == BASE
    pool.close()
    with pytest.raises(PhysicalFault):
        memory.frame(BASE)


def test_nothing_outlives_a_release(pool: PagePool) -> None:
    blank = bytes([pool.fill]) * PAGE_SIZE
    page = pool.allocate()
    assert page.view == blank
    page.view[:] = b"secret!!" * 512
    pa = page.pa
    pool.release(page)
    again = pool.allocate()
    assert (again.pa, again.view.tobytes()) == (pa, blank)


def test_counts(pool: PagePool) -> None:
    pages = [pool.allocate() for _ in range(5)]
    for page in pages[:3]:
        pool.release(page)
    assert (pool.allocated, pool.peak) == (2, 5)
    pool.allocate()
    assert (pool.allocated, pool.peak) == (3, 5)


def test_a_page_is_released_once(pool: PagePool) -> None:
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(ValueError, match="released before"):
        pool.release(page)
    assert pool.allocated == 0


def test_knows_its_own_addresses(pool: PagePool) -> None:
    page = pool.allocate()
    assert page.pa in pool
    assert page.pa + PAGE_SIZE - 1 in pool
    assert page.pa + PAGE_SIZE not in pool
    assert page.pa - 1 not in pool
