"""The heap against a model that keeps every block in a list and searches it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.heap import Heap, block_size
from optee.memory.pool import Owner, Statistics

SOMEBODY = Owner("test", 1)


class Block:
    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = True


class SlowHeap:
    """Blocks in the order of addresses, and the free list in the order of its links."""

    def __init__(self, size: int) -> None:
        self.blocks = [Block(0, size // 16 * 16 - 16)]
        self.free_list = [self.blocks[0]]

    def allocate(self, size: int) -> int | None:
        need = max(16, -(-size // 16) * 16) + 16
        for block in self.free_list:
            if block.size < need:
                continue
            if block.size - need <= 32:
                block.free = False
                self.free_list.remove(block)
                return block.address
            block.size -= need
            taken = Block(block.address + block.size, need)
            taken.free = False
            self.blocks.insert(self.blocks.index(block) + 1, taken)
            return taken.address
        return None

    def release(self, address: int) -> None:
        (index,) = (i for i, block in enumerate(self.blocks) if block.address == address)
        block = self.blocks[index]
        block.free = True
        if index and self.blocks[index - 1].free:
            below = self.blocks[index - 1]
            below.size += block.size
            del self.blocks[index]
            block, index = below, index - 1
        else:
            self.free_list.append(block)
        if index + 1 < len(self.blocks) and self.blocks[index + 1].free:
            above = self.blocks.pop(index + 1)
            self.free_list.remove(above)
            block.size += above.size

    def used(self) -> dict[int, int]:
        return {block.address: block.size for block in self.blocks if not block.free}


@given(
    st.integers(64, 4096),
    st.lists(st.tuples(st.booleans(), st.integers(0, 600), st.integers(0, 99)), max_size=80),
)
def test_every_address_is_that_of_the_slow_heap(size: int, steps: list[tuple[bool, int, int]]) -> None:
    heap, slow = Heap(size), SlowHeap(size)
    held: list[int] = []
    failures = []
    for take, amount, which in steps:
        if take:
            expected = slow.allocate(amount)
            try:
                address = heap.allocate(amount, SOMEBODY)
            except TeeError as error:
                assert error.result == Result.OUT_OF_MEMORY
                assert expected is None
                failures.append(amount)
            else:
                assert address == expected
                held.append(address)
        elif held:
            address = held.pop(which % len(held))
            heap.free(address)
            slow.release(address)
        assert {block.address: block.size for block in heap.allocations()} == slow.used()
        assert heap.allocated == sum(slow.used().values()) <= heap.max_allocated
        assert heap.largest_free == max((block.size - 16 for block in slow.free_list), default=0)
        assert (heap.statistics.failed, heap.statistics.biggest_failure) == (len(failures), max(failures, default=0))
    for address in held:
        heap.free(address)
    assert heap.allocated == 0
    assert heap.largest_free == size // 16 * 16 - 32


def test_fragments_do_not_add_up() -> None:
    heap = Heap(1024)
    blocks = [heap.allocate(100, SOMEBODY) for _ in range(7)]
    for block in blocks[::2]:
        heap.free(block)
    assert 1024 - heap.allocated > 600
    with pytest.raises(TeeError):
        heap.allocate(300, SOMEBODY)
    heap.free(blocks[1])
    heap.allocate(300, SOMEBODY)


def test_statistics_are_those_of_optee() -> None:
    heap = Heap(1024)
    kept = heap.allocate(100, SOMEBODY)
    heap.free(heap.allocate(500, SOMEBODY))
    for size in (2000, 3000, 1500):
        with pytest.raises(TeeError):
            heap.allocate(size, SOMEBODY)
    kept_size, other = block_size(100), block_size(500)
    assert heap.statistics == Statistics(kept_size, kept_size + other, 1024, 3, 3000, kept_size)
    heap.reset_statistics()
    assert heap.statistics == Statistics(kept_size, kept_size, 1024, 0, 0, 0)
    heap.free(kept)


def test_all_or_none() -> None:
    heap = Heap(1024)
    with pytest.raises(TeeError):
        heap.allocate_all((100, 200, 900), SOMEBODY)
    assert heap.allocated == 0
    heap.free_all(heap.allocate_all((100, 200, 500), SOMEBODY))
    assert heap.allocated == 0


def test_what_is_left_tells_whose_it_is() -> None:
    heap = Heap(1024)
    owner = Owner("RSA key", 3, session=7)
    heap.free(heap.allocate(32, SOMEBODY))
    address = heap.allocate(64, owner)
    assert heap.allocations() == [(address, 80, owner)]


@pytest.mark.parametrize(("size", "block"), [(0, 32), (1, 32), (16, 32), (17, 48), (80, 96), (104, 128), (152, 176)])
def test_block_sizes(size: int, block: int) -> None:
    assert block_size(size) == block
    heap = Heap(256)
    heap.allocate(size, SOMEBODY)
    assert heap.allocated == block


@pytest.mark.parametrize("size", [0, 16, 31, 32])
def test_a_heap_too_small_for_a_block(size: int) -> None:
    with pytest.raises(TeeError):
        Heap(size).allocate(1, SOMEBODY)


@given(st.integers(200, 1200), st.lists(st.integers(0, 300), max_size=6), st.lists(st.integers(0, 200), max_size=3))
def test_what_passes_through_leaves_the_heap_as_if_taken(size: int, before: list[int], sizes: list[int]) -> None:
    heaps = Heap(size), Heap(size)
    for heap in heaps:
        held = []
        for amount in before:
            try:
                held.append(heap.allocate(amount, SOMEBODY))
            except TeeError:
                break
        for address in held[::2]:
            heap.free(address)
    failed = []
    for heap, passes in zip(heaps, (True, False), strict=True):
        try:
            if passes:
                heap.pass_through(sizes, SOMEBODY)
            else:
                heap.free_all(heap.allocate_all(sizes, SOMEBODY))
        except TeeError:
            failed.append(passes)
    assert len(failed) in (0, 2)
    one, other = heaps
    assert one.statistics == other.statistics
    for amount in (16, 100, 50, 300, 16):
        results = []
        for heap in heaps:
            try:
                results.append(heap.allocate(amount, SOMEBODY))
            except TeeError:
                results.append(-1)
        assert results[0] == results[1]
