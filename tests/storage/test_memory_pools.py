"""Pools and buffers of the memory manager: what is released is zero, and no wrong release does harm."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.storage.memory.buffers import CLASSES, Buffer, Buffers
from optee.storage.memory.pool import Pool, Slot

OWNER = Owner("test", 1)


class Pools(RuleBasedStateMachine):
    """Two pools on one heap; a dictionary says what each slot holds."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.heap = Heap(4096)
        self.pools = [Pool(self.heap, OWNER, size, 20, 4, alignment=64, places=True) for size in (64, 32)]
        self.held: list[dict[Slot, bytes]] = [{}, {}]
        self.wrong = [[0, 0], [0, 0]]

    @rule(target=slots, which=st.integers(0, 1), byte=st.integers(1, 255))
    def allocate(self, which: int, byte: int) -> tuple[int, Slot] | None:
        pool = self.pools[which]
        slot = pool.allocate()
        if slot is None:
            assert len(pool) == 20 or self.heap.largest_free < 4 * pool.size + 48
            return None
        assert not any(slot.view), "a fresh slot is zero"
        assert slot.address % 32 == 0
        slot.view[:] = bytes([byte]) * pool.size
        self.held[which][slot] = bytes(slot.view)
        return which, slot

    @rule(slot=slots, which=st.integers(0, 1))
    def release(self, slot: tuple[int, Slot] | None, which: int) -> None:
        """Of any slot, held or released before, to its own pool or to the other one."""
        if slot is None:
            return
        owner, taken = slot
        good = owner == which and taken in self.held[owner]
        if not good:
            double = taken not in self.held[owner]
            self.wrong[which][not double] += 1
        assert self.pools[which].release(taken) == good
        if good:
            del self.held[owner][taken]

    @rule(keep=st.integers(0, 2))
    def trim(self, keep: int) -> None:
        for pool in self.pools:
            before = self.heap.allocated
            _, gained = pool.trim(100, keep=keep)
            assert before - self.heap.allocated == gained

    @invariant()
    def nothing_is_corrupt(self) -> None:
        for pool, held, (double, foreign) in zip(self.pools, self.held, self.wrong, strict=True):
            assert len(pool) == len(held) == len(pool.places or {})
            assert all(slot.view == content for slot, content in held.items())
            assert len({slot.address for slot in held}) == len(held)
            assert (pool.double_releases, pool.foreign_releases) == (double, foreign)
            assert pool.statistics.current == len(held) * pool.size
            assert pool.charged <= pool.bound
            assert 0 <= pool.fragmentation <= 1
        assert self.heap.allocated == sum(pool.charged for pool in self.pools)

    def teardown(self) -> None:
        for pool, held in zip(self.pools, self.held, strict=True):
            for slot in held:
                pool.release(slot)
            pool.trim(100, keep=0)
        assert self.heap.allocated == 0


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=settings.default.max_examples // 2, stateful_step_count=40)


def test_the_place_of_an_allocation_is_the_callers() -> None:
    pool = Pool(Heap(4096), OWNER, 64, 4, 4, places=True)
    slot = pool.allocate()
    (place,) = (pool.places or {}).values()
    assert place.startswith(f"{__name__}:")
    assert slot is not None and pool.release(slot)
    assert pool.places == {}


def test_size_classes() -> None:
    heap = Heap(256 << 10)
    buffers = Buffers(heap, OWNER, (4, 4, 2))
    base = heap.allocated
    for size, smallest in ((1, 1024), (1024, 1024), (1025, 4096), (4096, 4096), (4097, 16384), (16384, 16384)):
        buffer = buffers.allocate(size)
        assert buffer is not None and len(buffer.view) == smallest and buffer.address % smallest == 0
        buffer.release()
    assert heap.allocated == base, "slabs were there in advance"
    direct = buffers.allocate(20000, 4096)
    assert direct is not None and direct.address % 4096 == 0 and len(direct.view) == 20000
    assert buffers.direct.current == buffers.charged - base >= 20000
    direct.release()
    assert heap.allocated == base
    small = buffers.allocate(10, 4096)
    assert small is not None and small.address % 4096 == 0, "an alignment chooses the class, too"
    assert buffers.allocate(1 << 20) is None and buffers.direct.failures == 1
    assert [buffers.allocate(16384) for _ in range(3)][2] is None, "a class has a limit"


def test_the_last_reference_releases() -> None:
    buffers = Buffers(Heap(256 << 10), OWNER, (1, 1, 1))
    buffer = buffers.allocate(100)
    assert buffer is not None
    view = buffer.view
    view[:4] = b"data"
    assert buffer.share() is buffer
    buffer.release()
    assert bytes(view[:4]) == b"data" and buffers.allocate(100) is None
    buffer.release()
    assert not any(view)
    again = buffers.allocate(100)
    assert isinstance(again, Buffer)
    again.view[:3] = b"new"
    buffer.release()
    assert buffers.double_releases == 1
    assert bytes(again.view[:3]) == b"new", "who has the memory now keeps it"
    assert CLASSES == (1024, 4096, 16384)
