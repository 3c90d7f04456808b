"""Physical memory: page stores, banks of frames, and look-up by physical address.

A *page store* is a run of 4 KiB pages in a sealed memfd, so that another process can map the very same
pages. A *bank* gives each page of a store a physical address (it becomes a *frame*) and counts the
references that outsiders hold on it. `PhysicalMemory` is what a machine's bus sees: all banks, and holes.

Nothing here costs time or memory in proportion to the size of a store before its pages are touched.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NewType, TypeAlias

import numpy as np
import numpy.typing as npt

Ipa = NewType("Ipa", int)
"""Intermediate physical address: what a guest calls physical (bytes)."""
Pa = NewType("Pa", int)
"""Physical address as the bus and the secure world see it (bytes)."""
Gfn = NewType("Gfn", int)
"""Guest frame number: `Ipa >> PAGE_SHIFT`."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = PAGE_SIZE - 1
WORDS_PER_PAGE: Final = PAGE_SIZE // 8

PageArray: TypeAlias = npt.NDArray[np.uint64]
"""Addresses of pages (IPA or PA, as the name of the variable says), one u64 each."""
IndexArray: TypeAlias = npt.NDArray[np.int64]
"""Numbers of pages within a store."""

_BUCKET_SHIFT: Final = 32  # banks are looked up by the 4 GiB of address space they reach into
_CACHED_FRAMES: Final = 65536  # bounds the host memory that look-ups of single frames may take
_SHIFT: Final = np.uint64(PAGE_SHIFT)
_ONE: Final = np.ones(1, dtype=np.int32)  # `ufunc.at` takes twice as long with a scalar


class PhysicalFault(Exception):
    """An access to a physical address at which there is no memory."""

    def __init__(self, pa: int) -> None:
        super().__init__(f"no memory at PA {pa:#x}")
        self.pa = Pa(pa)


class PageStore:
    """Pages of memory in a sealed memfd: zero filled, of fixed size, committed on first touch.

    The seals (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL) are what makes it safe to map the file: a peer that
    could truncate it would kill every process that reads its mapping (SIGBUS). Where memfd does not exist
    the pages are anonymous memory of this process and `fd` is -1.
    """

    def __init__(self, name: str, pages: int) -> None:
        if pages <= 0:
            raise ValueError(f"{name}: a store needs at least one page, not {pages}")
        self._adopt(_sealed_memfd(name, pages * PAGE_SIZE), 0, pages)

    @classmethod
    def attach(cls, fd: int, *, offset: int = 0, pages: int | None = None, limit: int | None = None) -> PageStore:
        """Map a memfd of somebody else, from a byte `offset`; the file descriptor becomes the store's own.

        Raises ValueError if the file may shrink or grow, if what is asked for is not whole pages within it
        (`pages` None: up to its end), or has more than `limit` pages. The descriptor is then still the caller's.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ValueError("guest memory must be a memfd") from error
        if ~seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
            raise ValueError("guest memory must be sealed against shrinking and growing")
        size = os.fstat(fd).st_size
        if pages is None:
            pages = (size - offset) >> PAGE_SHIFT
        if size % PAGE_SIZE or offset % PAGE_SIZE or offset < 0 or pages <= 0 or offset + pages * PAGE_SIZE > size:
            raise ValueError(f"{pages} pages at {offset} are not whole pages of a file of {size} bytes")
        if limit is not None and pages > limit:
            raise ValueError(f"guest memory of {pages} pages exceeds the limit of {limit}")
        store = cls.__new__(cls)
        store._adopt(fd, offset, pages)
        return store

    def _adopt(self, fd: int, offset: int, pages: int) -> None:
        self.fd = fd
        self.pages = pages
        self.octets: mmap.mmap | bytes = mmap.mmap(fd, pages * PAGE_SIZE, offset=offset)
        """All bytes; a slice of them is a copy."""
        self.view = memoryview(self.octets)
        """The same, writable; a slice of it is a view."""
        self.words: PageArray = np.frombuffer(self.view, dtype="<u8").reshape(pages, WORDS_PER_PAGE)
        """The same memory as u64, shape (pages, 512)."""
        self.file: tuple[int, int] | None = None
        """Device and inode: stores with the same ones show the same memory."""
        self.offset = offset
        """Bytes of the file before the first page."""
        self._closer = weakref.finalize(self, _close, fd)
        if fd >= 0:
            status = os.fstat(fd)
            self.file = status.st_dev, status.st_ino

    def touched(self) -> Iterator[range]:
        """Runs of pages that memory was committed for; all others are zero and need not be looked at."""
        if self.fd < 0:
            yield range(self.pages)
            return
        end, last = self.offset, self.offset + self.pages * PAGE_SIZE
        while end < last:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            end = min(os.lseek(self.fd, start, os.SEEK_HOLE), last)
            if start < end:
                yield range(start - self.offset >> PAGE_SHIFT, end - self.offset >> PAGE_SHIFT)

    def close(self) -> None:
        """Give up the file; the memory goes when the last view of it does."""
        self._closer()
        self.fd = -1
        self.octets = b""
        self.view = memoryview(self.octets)
        self.words = np.empty((0, WORDS_PER_PAGE), dtype=np.uint64)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _sealed_memfd(name: str, size: int) -> int:
    if not hasattr(os, "memfd_create"):
        return -1
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def sparse_zeros(count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array of zeroes that costs memory where it is written only: most pages of most guests are never shared."""
    return np.frombuffer(
        mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype, count=count
    )


@dataclass(frozen=True, slots=True)
class Frames:
    """Where the pages of a bank lie: PA(page i) = base + ((i XOR permutation) * stride) * 4096.

    With a stride above 1 the frames between belong to other banks; with a permutation consecutive pages are
    not consecutive frames. Both directions are arithmetic, so that no table is needed to turn a PA round.
    """

    base: int
    pages: int
    stride: int = 1
    permutation: int = 0
    end: int = field(init=False, repr=False, compare=False)
    """First PA behind every place a frame may have."""
    _shift: int = field(init=False, repr=False, compare=False)
    """log2 of the distance of two frames in bytes."""

    def __post_init__(self) -> None:
        if self.base <= 0 or self.base % PAGE_SIZE:
            raise ValueError(f"frames start at a page-aligned PA above 0, not {self.base:#x}")
        if self.pages <= 0 or self.permutation < 0:
            raise ValueError("frames need pages and a permutation of at least 0")
        if self.stride <= 0 or self.stride & (self.stride - 1):
            raise ValueError(f"the stride of frames is a power of two, not {self.stride}")
        places = 1 << max((self.pages - 1).bit_length(), self.permutation.bit_length())
        object.__setattr__(self, "end", self.base + (places * self.stride << PAGE_SHIFT))
        object.__setattr__(self, "_shift", PAGE_SHIFT + self.stride.bit_length() - 1)

    def addresses(self, pages: IndexArray | None = None) -> PageArray:
        """PA of each of some pages, or of all."""
        places = np.arange(self.pages, dtype=np.uint64) if pages is None else pages.astype(np.uint64)
        places ^= np.uint64(self.permutation)
        places *= np.uint64(self.stride << PAGE_SHIFT)
        places += np.uint64(self.base)
        return places

    def address(self, page: int) -> Pa:
        """PA of one page."""
        return Pa(self.base + ((page ^ self.permutation) * self.stride << PAGE_SHIFT))

    def page(self, pa: int) -> int | None:
        """Number of the page whose frame contains `pa`, if one does."""
        offset = pa - self.base
        page = (offset >> self._shift) ^ self.permutation
        between = (self.stride - 1) << PAGE_SHIFT
        return page if offset >= 0 and not offset & between and page < self.pages else None

    def find(self, pas: PageArray) -> IndexArray:
        """Number of the page of each PA; -1 for those that are not here."""
        offsets = pas - np.uint64(self.base)
        pages = offsets >> np.uint64(self._shift)
        pages ^= np.uint64(self.permutation)
        between = np.uint64((self.stride - 1) << PAGE_SHIFT)
        return np.where((offsets & between == 0) & (pages < self.pages), pages.view(np.int64), -1)

    def are_all(self, pas: PageArray) -> bool:
        """Tell whether each of the addresses is that of a frame's first byte."""
        offsets = pas - np.uint64(self.base)
        if np.count_nonzero(offsets & np.uint64((1 << self._shift) - 1)):
            return False
        pages = offsets >> np.uint64(self._shift)
        pages ^= np.uint64(self.permutation)
        return not np.count_nonzero(pages >= np.uint64(self.pages))


class Bank:
    """The frames of one page store, and how often each is pinned."""

    def __init__(self, name: str, store: PageStore, frames: Frames) -> None:
        if frames.pages != store.pages:
            raise ValueError(f"{name}: {frames.pages} frames for a store of {store.pages} pages")
        self.name = name
        self.store = store
        self.frames = frames
        self._pins: npt.NDArray[np.int32] = sparse_zeros(store.pages, np.dtype(np.int32))
        self._uncounted: dict[int, PageArray] = {}

    def __repr__(self) -> str:
        return f"<Bank {self.name}: {self.store.pages} pages from PA {self.frames.base:#x}>"

    def pin(self, pas: PageArray) -> None:
        """Hold a reference on each of these frames, one per mention, until `unpin` of this array."""
        # Most pins are gone before anybody asks for counts, and counting takes longer than translating.
        self._uncounted[id(pas)] = pas

    def unpin(self, pas: PageArray) -> None:
        """Give the references of one `pin` back."""
        if self._uncounted.pop(id(pas), None) is None:
            np.subtract.at(self._pins, self.frames.find(pas), _ONE)

    @property
    def pins(self) -> npt.NDArray[np.int32]:
        """References held on each page of the store."""
        for pas in self._uncounted.values():
            np.add.at(self._pins, self.frames.find(pas), _ONE)
        self._uncounted.clear()
        return self._pins

    @property
    def pa(self) -> PageArray:
        """PA of each page of the store: an array that is made anew."""
        return self.frames.addresses()

    def pinned(self) -> dict[int, int]:
        """References per page, of the pages that have any."""
        pins = self.pins
        pages = np.flatnonzero(pins)
        return dict(zip(pages.tolist(), pins[pages].tolist(), strict=True))

    def frame(self, pa: int) -> memoryview:
        """The 4096 bytes of the frame at a PA that is in this bank."""
        page = self.frames.page(pa)
        assert page is not None
        return self.page_view(page)

    def page_view(self, page: int) -> memoryview:
        """The 4096 bytes of one page."""
        return self.store.view[page << PAGE_SHIFT : (page + 1) << PAGE_SHIFT]


class PhysicalMemory:
    """All memory of a machine by physical address. What no bank covers is a hole (`PhysicalFault`)."""

    def __init__(self) -> None:
        self.changes = 0
        """How often banks came or went: who passes them on sees by it whether there is anything to pass on."""
        self._banks: list[Bank] = []
        self._buckets: dict[int, list[Bank]] = {}
        self._found: dict[int, tuple[Bank, int]] = {}
        self._views: dict[int, memoryview] = {}

    @property
    def banks(self) -> tuple[Bank, ...]:
        """The banks present, in the order in which they came."""
        return tuple(self._banks)

    def add(self, bank: Bank) -> None:
        """Make the frames of a bank answer. The caller sees to it that no other bank has them."""
        self.changes += 1
        self._banks.append(bank)
        for bucket in _buckets(bank.frames):
            self._buckets.setdefault(bucket, []).append(bank)

    def remove(self, bank: Bank) -> None:
        """Turn the frames of a bank into holes."""
        self.changes += 1
        self._banks.remove(bank)
        for bucket in _buckets(bank.frames):
            self._buckets[bucket].remove(bank)
            if not self._buckets[bucket]:
                del self._buckets[bucket]
        self._forget()

    def reaching(self, first: int, last: int) -> list[Bank]:
        """Banks that may have frames between two addresses, both included."""
        return [bank for bank in self._banks if bank.frames.base <= last and first < bank.frames.end]

    def find(self, pa: int) -> tuple[Bank, int]:
        """The bank that holds `pa` and the number of the page in it. Raises PhysicalFault."""
        number = pa >> PAGE_SHIFT
        found = self._found.get(number)
        if found is None:
            for bank in self._buckets.get(pa >> _BUCKET_SHIFT, ()):
                page = bank.frames.page(pa)
                if page is not None:
                    found = bank, page
                    break
            else:
                raise PhysicalFault(pa)
            if len(self._found) >= _CACHED_FRAMES:
                self._forget()
            self._found[number] = found
        return found

    def frame(self, pa: int) -> memoryview:
        """The 4096 writable bytes of the frame that contains `pa`. Raises PhysicalFault."""
        view = self._views.get(pa >> PAGE_SHIFT)
        if view is None:
            bank, page = self.find(pa)
            view = self._views[pa >> PAGE_SHIFT] = bank.page_view(page)
        return view

    def read(self, pa: int, size: int) -> bytes:
        """Copy `size` bytes; each frame on the way is looked up. Raises PhysicalFault."""
        offset = pa & PAGE_MASK
        if offset + size <= PAGE_SIZE:
            return self.frame(pa)[offset : offset + size].tobytes()
        return b"".join(self.frame(at)[start:stop] for at, start, stop in _pieces(pa, size))

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`; all frames are looked up before the first byte changes. Raises PhysicalFault."""
        offset = pa & PAGE_MASK
        if offset + len(data) <= PAGE_SIZE:
            self.frame(pa)[offset : offset + len(data)] = data
            return
        pieces = [(self.frame(at), start, stop) for at, start, stop in _pieces(pa, len(data))]
        done = 0
        for view, start, stop in pieces:
            view[start:stop] = data[done : done + stop - start]
            done += stop - start

    def _forget(self) -> None:
        self._found.clear()
        self._views.clear()


def _buckets(frames: Frames) -> range:
    return range(frames.base >> _BUCKET_SHIFT, ((frames.end - 1) >> _BUCKET_SHIFT) + 1)


def _pieces(address: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of bytes at page boundaries: (address, first, behind last) within each page."""
    while size:
        offset = address & PAGE_MASK
        count = min(size, PAGE_SIZE - offset)
        yield address, offset, offset + count
        address += count
        size -= count


_ZERO_PAGE: Final = bytes(PAGE_SIZE)


class GuestRam:
    """A stretch of RAM as the guest itself sees it: by IPA, without translation or bookkeeping."""

    def __init__(self, store: PageStore, base: int) -> None:
        self.store = store
        self.base = Ipa(base)
        self.size = store.pages * PAGE_SIZE
        self.words = store.words
        """The RAM as u64, shape (pages, 512): row n is the page at IPA base + 4096 * n."""

    def read(self, ipa: int, size: int) -> bytes:
        """Copy `size` bytes. Raises ValueError outside of this RAM."""
        offset = self._offset(ipa, size)
        return self.store.view[offset : offset + size].tobytes()

    def write(self, ipa: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`. Raises ValueError outside of this RAM."""
        offset = self._offset(ipa, len(data))
        self.store.view[offset : offset + len(data)] = data

    def clear(self, pages: Sequence[int]) -> None:
        """Fill whole pages, named by their IPAs, with zeroes. Raises ValueError for what is no page of this RAM."""
        if len(pages) == 1 and not pages[0] & PAGE_MASK:
            offset = self._offset(pages[0], PAGE_SIZE)
            self.store.view[offset : offset + PAGE_SIZE] = _ZERO_PAGE
            return
        distances = np.array(pages, dtype=np.int64) - self.base
        if np.any(distances & PAGE_MASK) or np.any(distances < 0) or np.any(distances >= self.size):
            raise ValueError(f"not all of {len(pages)} addresses are pages of the RAM at {self.base:#x}")
        self.words[distances >> PAGE_SHIFT] = 0

    def _offset(self, ipa: int, size: int) -> int:
        offset = ipa - self.base
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes at IPA {ipa:#x} are outside of the RAM at {self.base:#x}")
        return offset
