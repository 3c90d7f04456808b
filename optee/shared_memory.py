"""Dynamic shared memory: buffers of the normal world that OP-TEE knows by cookie (mobj_reg_shm).

Source: OP-TEE core behaviour, section 6. Cookies need not be unique: the newest object shadows. An object
made for one call or one RPC is *guarded*: it answers to its cookie, but UNREGISTER_SHM cannot take it away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hv_models.memory import PAGE_MASK, PAGE_SHIFT
from optee.abi.message import ENTRIES_PER_PAGE
from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.pool import Owner
from optee.memory.pools import GuestPools
from optee.memory.structures import MAPPING, PAGE_ADDRESS, shared_memory
from optee.normal_world import NormalWorld, Window
from optee.steps import Steps
from optee.threads import Thread
from optee.wait_queue import Condition, Mutex

_NEXT = ENTRIES_PER_PAGE * PAGE_ADDRESS  # where a list page has the address of the next one
_LIST_PAGE_MAPPED = (shared_memory(1), MAPPING)
_SIZE_MASK = (1 << 64) - 1  # size_t of AArch64


class SharedMemory(Window):
    """One buffer: whole pages from `start` on, so `size` is what was asked for, rounded up to a page end."""

    __slots__ = ("cookie", "guarded", "heap_address", "references", "releasing")

    def __init__(self, normal_world: NormalWorld, cookie: int, pages: Sequence[int], start: int) -> None:
        super().__init__(normal_world.memory, pages, start, (len(pages) << PAGE_SHIFT) - start)
        self.cookie = cookie
        self.heap_address = 0
        """Where it lies in the core's heap."""
        self.references = 1
        self.guarded = True
        self.releasing = False


class SharedMemoryTable:
    """All objects of one guest."""

    def __init__(self, normal_world: NormalWorld, pools: GuestPools) -> None:
        self.normal_world = normal_world
        self._heap = pools.heap
        self._owner = Owner("shared memory", pools.guest)
        self._dynamic = pools.build.dynamic_shm
        self._by_cookie: dict[int, list[SharedMemory]] = {}
        self._mutex = Mutex()
        self._released = Condition(self._mutex)
        self._release_waiters = 0

    def __iter__(self) -> Iterator[SharedMemory]:
        return (shm for shms in self._by_cookie.values() for shm in shms)

    def add(self, cookie: int, pages: Sequence[int], start: int) -> SharedMemory | None:
        """Make an object of data pages at PAs; None if one is not a page of non-secure RAM, or the heap too small."""
        if not pages or not self._dynamic or not self.normal_world.are_pages(pages):
            return None
        try:
            address = self._heap.allocate(shared_memory(len(pages)), self._owner)
        except TeeError:
            return None
        shm = SharedMemory(self.normal_world, cookie, pages, start)
        shm.heap_address = address
        self._by_cookie.setdefault(cookie, []).append(shm)
        return shm

    def add_list(self, buf_ptr: int, size: int, cookie: int) -> SharedMemory | None:
        """Make an object of a page list; None if the list or a page is bad, or the heap too small.

        `buf_ptr` is the PA of the first list page plus the offset in the first data page; `size` in bytes. Meanwhile
        the heap holds an array of the addresses, and each list page is mapped in turn.
        """
        start = buf_ptr & PAGE_MASK
        count = (((size + start - 1) & _SIZE_MASK) >> PAGE_SHIFT) + 1  # wraps for an empty buffer
        if not self._dynamic:
            return None
        try:
            array = self._heap.allocate(PAGE_ADDRESS * count, self._owner)
        except TeeError:
            return None
        try:
            pages = self._read_list(buf_ptr - start, count)
            return None if pages is None else self.add(cookie, pages, start)
        except TeeError:
            return None
        finally:
            self._heap.free(array)

    def _read_list(self, list_pa: int, count: int) -> Sequence[int] | None:
        lists: list[memoryview] = []
        while True:
            if not self.normal_world.is_page(list_pa):
                return None
            self._heap.pass_through(_LIST_PAGE_MAPPED, self._owner)
            frame = self.normal_world.memory.frame(list_pa)
            if count <= ENTRIES_PER_PAGE:
                lists.append(frame[: count * PAGE_ADDRESS])
                return memoryview(b"".join(lists)).cast("Q")
            lists.append(frame[:_NEXT])
            list_pa = int.from_bytes(frame[_NEXT:], "little")
            count -= ENTRIES_PER_PAGE

    def find(self, cookie: int) -> SharedMemory | None:
        """The newest object with that cookie, with one more reference on it."""
        shms = self._by_cookie.get(cookie)
        if shms is None:
            return None
        shms[-1].references += 1
        return shms[-1]

    def put(self, thread: Thread, shm: SharedMemory) -> Steps[None]:
        """Drop a reference; the last one frees the object and wakes who waits to unregister it."""
        if self.drop(shm) and self._release_waiters:
            self._released.broadcast()
            yield from self._mutex.wake_next(thread)

    def drop(self, shm: SharedMemory) -> bool:
        """Drop a reference; True if it was the last one and the object is gone."""
        shm.references -= 1
        if shm.references:
            return False
        shms = self._by_cookie[shm.cookie]
        shms.remove(shm)
        if not shms:
            del self._by_cookie[shm.cookie]
        self._heap.free(shm.heap_address)
        return True

    def release(self, thread: Thread, cookie: int) -> Steps[None]:
        """Unregister by cookie and wait until nobody uses the object any more. Raises TeeError."""
        shms = self._by_cookie.get(cookie)
        shm = shms[-1] if shms else None
        if shm is None or shm.guarded or shm.releasing:
            raise TeeError(Result.BAD_PARAMETERS)
        shm.releasing = True
        yield from self.put(thread, shm)
        self._release_waiters += 1
        while shm.references:
            yield from self._released.wait(thread)
        self._release_waiters -= 1
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)
