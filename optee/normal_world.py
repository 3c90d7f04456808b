"""Memory of the normal world as OP-TEE reaches it: by PA, page by page, secure memory excluded.

Addresses are checked when something is mapped (`is_page`, `are_pages`); a `Window` then reads and writes by
copy. A frame that vanishes afterwards is an external abort in the secure world: `PhysicalFault` leaves the
generators and becomes a `SecureWorldFault`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hv_models.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Frames, PhysicalFault, PhysicalMemory

_MANY_PAGES = 16  # from here on numpy beats a loop


class NormalWorld:
    """All RAM of the machine that is not secure."""

    def __init__(
        self,
        memory: PhysicalMemory,
        secure_ram: Sequence[tuple[int, int]],
        reserved: tuple[int, int] = (0, 0),
    ) -> None:
        self.memory = memory
        self._secure = tuple((base, base + size) for base, size in secure_ram)
        self._reserved_base, self._reserved_size = reserved
        self.has_reserved = self._reserved_size > 0
        """There is static shared memory."""

    def is_page(self, pa: int) -> bool:
        """Tell whether `pa` is the page-aligned address of non-secure RAM; PA 0 never is."""
        if not pa or pa & PAGE_MASK:
            return False
        for base, end in self._secure:
            if base <= pa < end:
                return False
        try:
            self.memory.find(pa)
        except PhysicalFault:
            return False
        return True

    def are_pages(self, pages: Sequence[int]) -> bool:
        """`is_page` for each of them."""
        if len(pages) >= _MANY_PAGES and self.is_page(pages[0]):
            frames = self.memory.find(pages[0])[0].frames
            if not self._reaches_secure(frames) and frames.are_all(np.asarray(pages, dtype=np.uint64)):
                return True
        return all(map(self.is_page, pages))

    def _reaches_secure(self, frames: Frames) -> bool:
        return any(base < frames.end and frames.base < end for base, end in self._secure)

    def reserved_window(self, pa: int, size: int) -> Window | None:
        """Map bytes of the static shared memory; None if they do not all lie in it."""
        offset = pa - self._reserved_base
        if offset < 0 or offset + size > self._reserved_size:
            return None
        pages = range(pa & ~PAGE_MASK, pa + max(size, 1), PAGE_SIZE)
        return Window(self.memory, pages, pa & PAGE_MASK, size)

    def reserved_rest(self, pa: int) -> Window | None:
        """Map the static shared memory from `pa` to its end."""
        return self.reserved_window(pa, self._reserved_base + self._reserved_size - pa)


class Window:
    """Bytes that OP-TEE has mapped: pages anywhere in memory, one behind the other from `start` on."""

    __slots__ = ("memory", "pages", "size", "start")

    def __init__(self, memory: PhysicalMemory, pages: Sequence[int], start: int, size: int) -> None:
        self.memory = memory
        self.pages = pages
        self.start = start
        """Offset in bytes of the first byte within the first page (may lie behind that page)."""
        self.size = size
        """Bytes."""

    def load(self, offset: int, size: int) -> bytes:
        """Copy `size` bytes from `offset` on; the caller keeps within `self.size`."""
        at = self.start + offset
        first = at & PAGE_MASK
        if first + size <= PAGE_SIZE:
            return bytes(self.memory.frame(self.pages[at >> PAGE_SHIFT])[first : first + size])
        pieces = []
        while size:
            first = at & PAGE_MASK
            count = min(size, PAGE_SIZE - first)
            pieces.append(self.memory.frame(self.pages[at >> PAGE_SHIFT])[first : first + count])
            at += count
            size -= count
        return b"".join(pieces)

    def load_into(self, offset: int, target: memoryview) -> None:
        """Copy as many bytes as `target` holds from `offset` on; the caller keeps within `self.size`."""
        at = self.start + offset
        done = 0
        while done < len(target):
            first = at & PAGE_MASK
            count = min(len(target) - done, PAGE_SIZE - first)
            target[done : done + count] = self.memory.frame(self.pages[at >> PAGE_SHIFT])[first : first + count]
            at += count
            done += count

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`; the caller keeps within `self.size`."""
        at = self.start + offset
        first = at & PAGE_MASK
        size = len(data)
        if first + size <= PAGE_SIZE:
            self.memory.frame(self.pages[at >> PAGE_SHIFT])[first : first + size] = data
            return
        done = 0
        while done < size:
            first = at & PAGE_MASK
            count = min(size - done, PAGE_SIZE - first)
            frame = self.memory.frame(self.pages[at >> PAGE_SHIFT])
            frame[first : first + count] = data[done : done + count]
            at += count
            done += count

    def part(self, offset: int, size: int) -> Window:
        """A window on `size` bytes of this one."""
        return Window(self.memory, self.pages, self.start + offset, size)
