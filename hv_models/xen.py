"""The Xen flavour: a p2m that is filled when the domain is built, and page types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from hv_models.descriptor import BLOCK_PAGES
from hv_models.memory import PAGE_SHIFT, Bank
from hv_models.region import Region
from hv_models.smccc import XEN
from hv_models.stage2 import PageKind
from hv_models.vm import VirtualMachine

PORTION: Final = BLOCK_PAGES[1]
"""Pages that are mapped at a time: those of the largest block. Where no block fits they take a tenth of a second."""


class XenVm(VirtualMachine):
    """A Xen domain. All of its RAM is mapped before it starts; its client id is its domain id + 1."""

    hypervisor = XEN
    built = False
    """Whether all of its RAM is mapped."""

    @property
    def domain(self) -> int:
        """Xen's domain id."""
        return self.client_id - 1

    def add_ram(self, base: int, bank: Bank) -> Region:
        """Give the domain RAM, and map it if the domain is built already. Raises ValueError on an overlap."""
        region = super().add_ram(base, bank)
        if self.built:
            self._populate(region, 0, region.pages)
        return region

    def build(self) -> Iterator[None]:
        """Map all RAM (XENMEM_populate_physmap), and pause between portions of it."""
        for region in self.regions:
            first = 0
            while first < region.pages:
                last = min(first + PORTION - (region.ipa(first) >> PAGE_SHIFT) % PORTION, region.pages)
                self._populate(region, first, last)
                first = last
                if first < region.pages:
                    yield
        self.built = True

    def _populate(self, region: Region, first: int, last: int) -> None:
        frames = region.bank.frames.addresses(np.arange(first, last))
        self.stage2.map(region.ipa(first), frames, PageKind.RAM_RW)

    def map_grant(self, owner: XenVm, owner_ipa: int, ipa: int, pages: int = 1, *, writable: bool = True) -> None:
        """Map pages that another domain granted (GNTTABOP_map_grant_ref)."""
        kind = PageKind.GRANT_RW if writable else PageKind.GRANT_RO
        self.map_frames_of(owner, owner_ipa, ipa, pages, kind)

    def map_foreign(self, owner: XenVm, owner_ipa: int, ipa: int, pages: int = 1) -> None:
        """Map pages of another domain as a privileged one may (XENMAPSPACE_gmfn_foreign)."""
        self.map_frames_of(owner, owner_ipa, ipa, pages, PageKind.FOREIGN_RW)
