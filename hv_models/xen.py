"""The Xen flavour: a p2m that is filled when the domain is built, and page types."""

from __future__ import annotations

from hv_models.memory import Bank
from hv_models.region import Region
from hv_models.smccc import XEN
from hv_models.stage2 import PageKind
from hv_models.vm import VirtualMachine


class XenVm(VirtualMachine):
    """A Xen domain. All of its RAM is mapped from the start; its client id is its domain id + 1."""

    hypervisor = XEN

    @property
    def domain(self) -> int:
        """Xen's domain id."""
        return self.client_id - 1

    def add_ram(self, base: int, bank: Bank) -> Region:
        """Give the domain RAM and map it (XENMEM_populate_physmap). Raises ValueError on an overlap."""
        region = super().add_ram(base, bank)
        self.stage2.map(base, bank.pa, PageKind.RAM_RW)
        return region

    def map_grant(self, owner: XenVm, owner_ipa: int, ipa: int, pages: int = 1, *, writable: bool = True) -> None:
        """Map pages that another domain granted (GNTTABOP_map_grant_ref)."""
        kind = PageKind.GRANT_RW if writable else PageKind.GRANT_RO
        self.map_frames_of(owner, owner_ipa, ipa, pages, kind)

    def map_foreign(self, owner: XenVm, owner_ipa: int, ipa: int, pages: int = 1) -> None:
        """Map pages of another domain as a privileged one may (XENMAPSPACE_gmfn_foreign)."""
        self.map_frames_of(owner, owner_ipa, ipa, pages, PageKind.FOREIGN_RW)
