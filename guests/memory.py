"""A guest's own RAM: its page allocator, and buffers that lie in scattered pages."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Final, cast

from guests.errors import OutOfGuestMemoryError
from hv_models.memory import PAGE_SIZE, GuestRam, Ipa

# Consecutive allocations are this many pages apart, so a buffer of several pages never happens to be contiguous:
# who treats an IPA range as one range finds somebody else's data. Odd, hence coprime to every power of two.
_STRIDE: Final = 0x1D3


class PageAllocator:
    """Free pages of a range of guest RAM, single ones scattered and last freed first, as Linux' per-CPU lists.

    Bounded by the range itself: a guest that allocates more than it has gets `OutOfGuestMemoryError`.
    """

    def __init__(self, base: int, size: int) -> None:
        if base % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"[{base:#x}, +{size:#x}) does not consist of whole pages")
        self._base = base
        self._count = size // PAGE_SIZE
        self._used = bytearray(self._count)
        self._stride = _STRIDE if self._count % _STRIDE else 1
        self._fresh = 0
        self._stack: list[int] = []
        self._stacked = bytearray(self._count)
        self.used = 0

    @property
    def free(self) -> int:
        """Pages that are left."""
        return self._count - self.used

    def page(self) -> Ipa:
        """Take one page. Raises OutOfGuestMemoryError."""
        return self.pages(1)[0]

    def pages(self, count: int) -> tuple[Ipa, ...]:
        """Take `count` pages, in general not adjacent; all or none. Raises OutOfGuestMemoryError.

        Freed ones come first. One that `run` took meanwhile is passed over.
        """
        if count > self.free:
            raise OutOfGuestMemoryError(f"{count} pages asked, {self.free} of {self._count} are free")
        used, stacked, stack = self._used, self._stacked, self._stack
        taken: list[int] = []
        while stack and len(taken) < count:
            index = stack.pop()
            stacked[index] = 0
            if not used[index]:
                used[index] = 1
                taken.append(index)
        while len(taken) < count:
            index = self._fresh * self._stride % self._count
            self._fresh += 1
            if not used[index]:
                used[index] = 1
                taken.append(index)
        self.used += count
        base = self._base
        return cast("tuple[Ipa, ...]", tuple([base + index * PAGE_SIZE for index in taken]))

    def run(self, count: int) -> tuple[Ipa, ...]:
        """Take `count` adjacent pages. Raises OutOfGuestMemoryError."""
        start = self._used.find(bytes(count))
        if start < 0:
            raise OutOfGuestMemoryError(f"no {count} adjacent pages among {self.free} free ones")
        self._used[start : start + count] = b"\1" * count
        self.used += count
        return tuple(Ipa(self._base + index * PAGE_SIZE) for index in range(start, start + count))

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. Raises ValueError for a page that is not in use: the guest kernel's own mistake."""
        base, count = self._base, self._count
        used, stacked = self._used, self._stacked
        for page in pages:
            distance = page - base
            index = distance // PAGE_SIZE
            if distance % PAGE_SIZE or not 0 <= index < count or not used[index]:
                raise ValueError(f"page {page:#x} is not allocated")
            used[index] = 0
            self.used -= 1
            if not stacked[index]:
                stacked[index] = 1
                self._stack.append(index)


class Buffer:
    """`size` bytes that begin `offset` bytes into the first of `pages`, as a process sees them in one piece."""

    __slots__ = ("_addresses", "_ram", "offset", "pages", "size")

    def __init__(self, ram: GuestRam, pages: tuple[Ipa, ...], size: int, offset: int = 0) -> None:
        self._ram = ram
        self.pages = pages
        self.size = size
        self.offset = offset
        self._addresses: bytes | None = None

    @property
    def addresses(self) -> bytes:
        """The pages as u64 each, as they stand in a page list: worked out once, for a buffer keeps its pages."""
        if self._addresses is None:
            self._addresses = array("Q", self.pages).tobytes()
        return self._addresses

    def _pieces(self, offset: int, size: int) -> Iterator[tuple[Ipa, int]]:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"[{offset}, +{size}) lies outside a buffer of {self.size} bytes")
        position = self.offset + offset
        while size:
            page, within = divmod(position, PAGE_SIZE)
            length = min(size, PAGE_SIZE - within)
            yield Ipa(self.pages[page] + within), length
            position += length
            size -= length

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy bytes out; to the end unless `size` says less. Raises ValueError outside the buffer."""
        pieces = self._pieces(offset, self.size - offset if size is None else size)
        return b"".join([self._ram.read(ipa, length) for ipa, length in pieces])

    def write(self, data: bytes, offset: int = 0) -> None:
        """Copy bytes in. Raises ValueError outside the buffer."""
        position = 0
        for ipa, length in self._pieces(offset, len(data)):
            self._ram.write(ipa, data[position : position + length])
            position += length


def allocate_buffer(ram: GuestRam, allocator: PageAllocator, size: int, offset: int = 0) -> Buffer:
    """Take zeroed pages for a process, for `size` bytes from `offset` on. Raises OutOfGuestMemoryError."""
    pages = allocator.pages(page_span(size, offset))
    ram.clear(pages)
    return Buffer(ram, pages, size, offset)


def page_span(size: int, offset: int) -> int:
    """Return how many pages a buffer covers; an empty one has one all the same, as a mapping does."""
    return max(1, -(-(offset + size) // PAGE_SIZE))
