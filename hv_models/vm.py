"""Virtual machines: identity, vCPUs, interrupts, and how the hypervisor arranges their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from hv_models.guest_memory import GuestMemory
from hv_models.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Bank, Ipa, PageArray, PhysicalMemory
from hv_models.region import Region
from hv_models.smccc import Hypervisor
from hv_models.stage2 import PageKind, Reason, Stage2, Stage2Fault
from hv_models.walk import REFUSED_KINDS
from optee.abi.smc import VmId


class VirtualMachine(GuestMemory):
    """A VM: RAM, stage-2 tables, vCPUs. `KvmVm` and `XenVm` say how pages come and go.

    What a mediator may do with it is `GuestMemory`; the rest is for the hypervisor and the guest.
    """

    hypervisor: ClassVar[Hypervisor]
    """Flavour: conduit and what the hypervisor answers itself."""

    def __init__(
        self,
        name: str,
        client_id: VmId,
        memory: PhysicalMemory,
        stage2: Stage2,
        vcpus: int,
        release: Callable[[Bank], None],
    ) -> None:
        if vcpus < 1:
            raise ValueError(f"{name}: a VM has at least one vCPU, not {vcpus}")
        super().__init__(name, memory, stage2, release)
        self.client_id = client_id
        """The id by which OP-TEE knows this VM (a7)."""
        self.vcpus = range(vcpus)
        """Numbers of the virtual CPUs."""
        self.alive = True
        """False once the machine destroyed it."""
        self.on_interrupt: Callable[[], object] | None = None
        """Called whenever an interrupt becomes pending."""
        self.on_kick: Callable[[], object] | None = None
        """Called as well, after that: who holds up a vCPU lets it go."""
        self.injected = 0
        """Interrupts that became pending so far."""
        self._pending: dict[int, None] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, client id {self.client_id}>"

    def build(self) -> Iterator[None]:
        """Do what the hypervisor does before the VM runs; at each pause who builds may do something else."""
        return iter(())

    def touch(self, ipa: int, size: int, *, write: bool = False) -> None:
        """Do what the guest's own access to a range does to the tables. Raises Stage2Fault.

        The guest's bytes go straight to its RAM (`ram`); a hypervisor only notices faults.
        """
        first, last = ipa >> PAGE_SHIFT, (ipa + max(size, 1) - 1) >> PAGE_SHIFT
        ipas = _run(first << PAGE_SHIFT, last - first + 1)
        self._fault_in(ipas)
        for page in ipas.tolist():
            walk = self.stage2.walk(page)
            if walk.fault:
                raise Stage2Fault(page, Reason.UNMAPPED)
            if write and not walk.descriptor.writable:
                self._write_fault(page, walk.kind)

    def find(self, pa: int) -> Ipa | None:
        """IPA of the byte at `pa`: where the VM maps it, or where its RAM lies; None if it is not its own."""
        for region in (*self.regions, *self._removed):
            page = region.bank.frames.page(pa)
            if page is not None:
                mapped = self.stage2.walk(region.ipa(page)).pa
                if mapped is None or mapped != pa & ~PAGE_MASK:
                    elsewhere = self.stage2.find(pa)
                    if elsewhere:
                        return Ipa(elsewhere[0] + (pa & PAGE_MASK))
                return Ipa(region.ipa(page) + (pa & PAGE_MASK))
        return None

    def inject(self, interrupt: int) -> None:
        """Make a virtual interrupt pending; one that is pending already stays one."""
        self._pending[interrupt] = None
        self.injected += 1
        if self.on_interrupt is not None:
            self.on_interrupt()
        if self.on_kick is not None:
            self.on_kick()

    @property
    def pending(self) -> bool:
        """Whether an interrupt is pending."""
        return bool(self._pending)

    def acknowledge(self) -> int | None:
        """Take the interrupt that has been pending for longest; None if there is none."""
        interrupt = next(iter(self._pending), None)
        if interrupt is not None:
            del self._pending[interrupt]
        return interrupt

    def map_device(self, ipa: int, pa: int, pages: int) -> None:
        """Map device registers, such as the GIC's virtual CPU interface."""
        self.stage2.map(ipa, _run(pa, pages), PageKind.MMIO)

    def set_kind(self, ipa: int, kind: PageKind, *, pages: int = 1, page: int | None = None) -> None:
        """Change stage-2 entries of pages of this VM's RAM.

        `page` maps that page of the first region (and those that follow); otherwise what is mapped keeps
        its frames, and what is not mapped gets those that belong to its place in RAM. Raises ValueError
        where nothing is mapped and no RAM lies, and for a page that the region has not.
        """
        if kind is PageKind.NONE:
            self.stage2.unmap(ipa, pages)
        elif page is not None:
            bank = self.regions[0].bank
            if page + pages > bank.store.pages:
                raise ValueError(f"{self.name} has {bank.store.pages} pages, none with the number {page + pages - 1}")
            self.stage2.map(ipa, bank.frames.addresses(np.arange(page, page + pages)), kind)
        else:
            for at in range(ipa, ipa + (pages << PAGE_SHIFT), PAGE_SIZE):
                if self.stage2.walk(at).fault:
                    self.stage2.map(at, self._home(at), kind)
                else:
                    self.stage2.change(at, 1, kind)

    def map_frames_of(
        self,
        other: VirtualMachine,
        other_ipa: int,
        ipa: int,
        pages: int = 1,
        kind: PageKind = PageKind.RAM_RW,
    ) -> None:
        """Map frames that another VM has at `other_ipa`. None of the two may share them with OP-TEE then."""
        ipas = _run(other_ipa, pages)
        other._fault_in(ipas)
        pas: list[int] = []
        for page in ipas.tolist():
            pa = other.stage2.walk(page).pa
            if pa is None:
                raise Stage2Fault(page, Reason.UNMAPPED)
            pas.append(pa)
        self.stage2.map(ipa, np.array(pas, dtype=np.uint64), kind)

    def add_ram(self, base: int, bank: Bank) -> Region:
        """Give the VM the memory of a bank as RAM. Raises ValueError on an overlap."""
        region = Region(base, bank)
        self._add_region(region)
        return region

    def destroy(self) -> None:
        """Take away RAM and tables; banks that are still pinned stay part of physical memory."""
        self.alive = False
        for region in list(self.regions):
            self._remove_region(region)
        self.stage2.close()

    def _write_fault(self, ipa: int, kind: PageKind) -> None:
        """The guest wrote to a page that it cannot write to."""
        raise Stage2Fault(ipa, REFUSED_KINDS[kind])

    def _home(self, ipa: int) -> PageArray:
        place = self._place(ipa)
        if place is None:
            raise ValueError(f"{self.name} has no RAM at IPA {ipa:#x}")
        return place[0].bank.frames.addresses(np.array([place[1]]))


def _run(address: int, pages: int) -> PageArray:
    """Addresses of consecutive pages."""
    return np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(address)
