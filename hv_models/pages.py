"""Pools of single pages: what a hypervisor or mediator allocates for itself."""

from __future__ import annotations

from typing import Final

from hv_models.memory import PAGE_SHIFT, PAGE_SIZE, Bank, Frames, PageStore, PhysicalMemory

BANK_PAGES: Final = 1024
"""A pool grows by 4 MiB of address space at a time; memory is committed page by page."""


class Page:
    """One page of a pool: its address and its bytes. Valid until it is released."""

    __slots__ = ("live", "pa", "view", "words")

    def __init__(self, bank: Bank, page: int) -> None:
        self.pa = bank.frames.address(page)
        self.view: memoryview = bank.page_view(page)
        """4096 writable bytes."""
        self.words = self.view.cast("Q")
        """The same bytes as 512 u64."""
        self.live = False

    def __repr__(self) -> str:
        return f"<Page at PA {self.pa:#x}{'' if self.live else ', released'}>"


class PagePool:
    """Pages with addresses from `base` upward, all of whose bytes are `fill` when they are handed out.

    A released page is filled again at once, so nothing that stood in it outlives it; with a `fill` other
    than 0 whoever forgets to clear what it passes on shows that value (a canary).
    """

    def __init__(self, memory: PhysicalMemory, name: str, base: int, *, fill: int = 0) -> None:
        self._memory = memory
        self._name = name
        self._base = base
        self._banks: list[Bank] = []
        self._unused = 0
        self._free: list[Page] = []
        self._blank = bytes([fill]) * PAGE_SIZE
        self.fill = fill

    @property
    def peak(self) -> int:
        """The most pages that were out at once: a fresh one is taken only when no other is free."""
        return self.capacity - self._unused

    @property
    def allocated(self) -> int:
        """Pages that are out."""
        return self.peak - len(self._free)

    def allocate(self) -> Page:
        """Take a page; it is filled with `fill`."""
        page = self._free.pop() if self._free else self._fresh()
        page.live = True
        return page

    def release(self, page: Page) -> None:
        """Give a page back. Raises ValueError if it was given back before."""
        if not page.live:
            raise ValueError(f"{self._name}: the page at PA {page.pa:#x} was released before")
        page.live = False
        page.view[:] = self._blank
        self._free.append(page)

    def __contains__(self, pa: int) -> bool:
        """Whether an address lies in a page that this pool has ever handed out."""
        return self._base <= pa < self._base + self.peak * PAGE_SIZE

    @property
    def capacity(self) -> int:
        """Pages of all banks so far."""
        return len(self._banks) * BANK_PAGES

    def close(self) -> None:
        """Take the pool's banks from the machine."""
        for bank in self._banks:
            self._memory.remove(bank)
            bank.store.close()
        self._banks.clear()
        self._free.clear()
        self._unused = 0

    def _fresh(self) -> Page:
        if not self._unused:
            base = self._base + (self.capacity << PAGE_SHIFT)
            bank = Bank(self._name, PageStore(self._name, BANK_PAGES), Frames(base, BANK_PAGES))
            self._memory.add(bank)
            self._banks.append(bank)
            self._unused = BANK_PAGES
        page = Page(self._banks[-1], BANK_PAGES - self._unused)
        self._unused -= 1
        if self.fill:
            page.view[:] = self._blank
        return page
