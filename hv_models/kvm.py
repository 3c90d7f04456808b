"""The KVM flavour: memory slots, pages that fault in on first touch, dirty logging, rolling VMIDs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from hv_models.memory import PAGE_MASK, PAGE_SHIFT, Bank, Gfn, PageArray, PhysicalMemory
from hv_models.region import Region
from hv_models.smccc import KVM
from hv_models.stage2 import PageKind, Stage2, Stage2Fault
from hv_models.vm import VirtualMachine
from hv_models.walk import REFUSED_KINDS
from optee.abi.smc import VmId

HW_VMID_BITS: Final = 8
"""Bits of VTTBR_EL2.VMID without FEAT_VMID16."""


class VmidAllocator:
    """Hardware VMIDs: tags of TLB entries, of which there are too few for every VM to keep one.

    When they run out, a new generation begins and all VMs get new ones as they run next. Hence a hardware
    VMID says nothing about identity, and OP-TEE's client id must be another number.
    """

    def __init__(self, bits: int = HW_VMID_BITS) -> None:
        self._limit = 1 << bits
        self._next = 1
        self.generation = 1

    def allocate(self) -> tuple[int, int]:
        """The next VMID, with the generation in which it holds. 0 is the host's."""
        if self._next == self._limit:
            self._next = 1
            self.generation += 1
        self._next += 1
        return self.generation, self._next - 1


class KvmVm(VirtualMachine):
    """A VM under KVM. Its stage-2 tables start empty; a page of a memory slot is mapped when it is touched."""

    hypervisor = KVM

    def __init__(
        self,
        name: str,
        client_id: VmId,
        memory: PhysicalMemory,
        stage2: Stage2,
        vcpus: int,
        release: Callable[[Bank], None],
        vmids: VmidAllocator,
    ) -> None:
        super().__init__(name, client_id, memory, stage2, vcpus, release)
        self._vmids = vmids
        self._vmid = 0, 0

    @property
    def hw_vmid(self) -> int:
        """VTTBR_EL2.VMID that the VM runs under now. It changes when the host's VMIDs roll over."""
        if self._vmid[0] != self._vmids.generation:
            self._vmid = self._vmids.allocate()
        return self._vmid[1]

    def add_ram(self, base: int, bank: Bank) -> Region:
        """Give the VM a memory slot (KVM_SET_USER_MEMORY_REGION). Raises ValueError on an overlap."""
        slot = super().add_ram(base, bank)
        if any(other.dirty is not None for other in self.regions):
            slot.dirty = np.zeros(slot.pages, dtype=np.bool_)
        return slot

    def remove_slot(self, slot: Region) -> None:
        """Take RAM away; the guest's next access faults. Pages that are pinned stay where they are."""
        self._remove_region(slot)

    def start_dirty_logging(self) -> None:
        """Begin to record writes (KVM_MEM_LOG_DIRTY_PAGES): pages become read-only until the guest writes.

        To the mediator they are read-write RAM as before.
        """
        for slot in self.regions:
            slot.dirty = np.zeros(slot.pages, dtype=np.bool_)
            self.stage2.protect_for_logging(slot.addresses())

    def stop_dirty_logging(self) -> None:
        """End recording and give the guest write access back."""
        for slot in self.regions:
            slot.dirty = None
            self.stage2.unprotect_logged(slot.addresses())

    def dirty_pages(self) -> list[Gfn]:
        """Pages written since the log was last read, ascending; they are write-protected again."""
        found: list[Gfn] = []
        for slot in self.regions:
            if slot.dirty is not None:
                pages = np.flatnonzero(slot.dirty)
                slot.dirty[pages] = False
                found += (Gfn(gfn) for gfn in (pages + (slot.base >> PAGE_SHIFT)).tolist())
                self.stage2.protect_for_logging(slot.addresses()[pages])
        return sorted(found)

    def _fault_in(self, ipas: PageArray) -> bool:
        faulted = False
        for slot in self.regions:
            inside = ipas[(ipas >= np.uint64(slot.base)) & (ipas < np.uint64(slot.end))]
            pages = inside & ~np.uint64(PAGE_MASK)
            pages = pages[self.stage2.lookup(pages) == 0]
            if len(pages):
                index = (pages - slot.base_word) >> np.uint64(PAGE_SHIFT)
                logged = slot.dirty is not None
                frames = slot.bank.frames.addresses(index.view(np.int64))
                self.stage2.map_scattered(pages, frames, logged=logged)
                faulted = True
        return faulted

    def _write_fault(self, ipa: int, kind: PageKind) -> None:
        if kind is not PageKind.RAM_RW:
            raise Stage2Fault(ipa, REFUSED_KINDS[kind])
        self.stage2.unprotect_logged(np.array([ipa], dtype=np.uint64))
        for slot in self.regions:
            index = slot.index(ipa)
            if index is not None and slot.dirty is not None:
                slot.dirty[index] = True
