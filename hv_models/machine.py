"""The machine: physical memory, the VMs on it, and the pages that hypervisor and mediator take for themselves.

Where things lie, by PA:

    0x100_0000_0000  frames of guests (`Layout`)
   0x6d64_6469_0000  stage-2 tables
   0x6d65_6469_0000  pages of the mediator

Everything below is a hole, so no address that a guest can name is a physical address of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from hv_models.frames import Interleaved, Layout
from hv_models.kvm import KvmVm, VmidAllocator
from hv_models.memory import PAGE_SIZE, Bank, Frames, Ipa, Pa, PageStore, PhysicalFault, PhysicalMemory
from hv_models.pages import PagePool
from hv_models.region import Region
from hv_models.sharing import FrameSharing
from hv_models.stage2 import Stage2
from hv_models.vm import VirtualMachine
from hv_models.xen import XenVm
from optee.abi.smc import VmId

TABLES_BASE: Final = 0x6D64_6469_0000
MEDIATOR_BASE: Final = 0x6D65_6469_0000
"""First PA of the mediator's pages: no number that anybody writes down by chance, so that one in guest memory is an
address that got out. It is above every frame that a guest can have, also those of vector files
(whose mediator pages lie at 0x10_0000_0000 and above)."""

RAM_BASE: Final = Ipa(0x4000_0000)
"""Where a guest's RAM starts by default, as on QEMU's virt board and in Xen's guest memory map."""
DEFAULT_RAM: Final = 256 << 20
"""Bytes of RAM of a VM: enough for a Linux guest with OP-TEE's driver; only what is touched is committed."""
DEFAULT_VCPUS: Final = 2
"""Two, so that calls of one VM can overlap."""
MAX_CLIENT_ID: Final = 0xFFFF
"""OP-TEE compares 16 bits of a7."""

GIC_PA: Final = 0x0804_0000
"""Where the board has the GIC's virtual CPU interface, which guests see as their CPU interface."""
GIC_PAGES: Final = 2
KVM_GIC_IPA: Final = Ipa(0x0801_0000)
"""GICv2 CPU interface of QEMU's virt board."""
XEN_GIC_IPA: Final = Ipa(0x0300_2000)
"""GICv2 CPU interface in Xen's guest memory map (GUEST_GICC_BASE)."""


class RamBlock(NamedTuple):
    """A piece of RAM to give to a VM."""

    base: int
    """First IPA, page aligned."""
    size: int
    """Bytes, whole pages."""
    store: PageStore | None = None
    """Memory that exists already, such as another process's; made new if None."""
    frames: Frames | None = None
    """Where it lies physically; the machine's layout decides if None."""


class MediatorPages(PagePool):
    """Pages for shadow buffers, page lists and RPC arguments, in an address range of their own."""

    def __init__(self, memory: PhysicalMemory, *, fill: int = 0) -> None:
        super().__init__(memory, "mediator", MEDIATOR_BASE, fill=fill)


class Machine:
    """A host with VMs of either flavour on it. `fill` is the byte that fresh mediator pages hold."""

    def __init__(self, layout: Layout | None = None, *, fill: int = 0) -> None:
        self.memory = PhysicalMemory()
        self.pages = MediatorPages(self.memory, fill=fill)
        self.vms: dict[VmId, VirtualMachine] = {}
        """Live VMs by client id."""
        self._layout: Layout = layout if layout is not None else Interleaved()
        self.tables = PagePool(self.memory, "stage-2 tables", TABLES_BASE)
        self._sharing = FrameSharing(self.memory)
        self._vmids = VmidAllocator()
        self._owners: dict[Bank, VirtualMachine] = {}
        self._chosen: set[Frames] = set()
        self._last_id = 0

    def create_kvm(
        self,
        name: str,
        ram: int | Sequence[RamBlock] = DEFAULT_RAM,
        vcpus: int = DEFAULT_VCPUS,
        *,
        client_id: int | None = None,
    ) -> KvmVm:
        """Make a KVM VM; its client id is the next free one unless given. Raises ValueError."""
        number = self._client_id(client_id)
        vm = KvmVm(name, number, self.memory, self._stage2(), vcpus, self._release, self._vmids)
        self._start(vm, ram, KVM_GIC_IPA)
        return vm

    def create_xen(
        self,
        name: str,
        ram: int | Sequence[RamBlock] = DEFAULT_RAM,
        vcpus: int = DEFAULT_VCPUS,
        *,
        domain: int | None = None,
        build: bool = True,
    ) -> XenVm:
        """Make a Xen domain; its client id is the domain id + 1. Without `build`, `XenVm.build` is still to be done.

        Raises ValueError.
        """
        number = self._client_id(None if domain is None else domain + 1)
        vm = XenVm(name, number, self.memory, self._stage2(), vcpus, self._release)
        self._start(vm, ram, XEN_GIC_IPA)
        if build:
            for _ in vm.build():
                pass
        return vm

    def add_ram(self, vm: VirtualMachine, block: RamBlock) -> Region:
        """Give a VM more RAM. Raises ValueError if it overlaps, or if the memory is another VM's."""
        bank = self._bank(vm, block)
        try:
            return vm.add_ram(block.base, bank)
        except ValueError:
            self._release(bank)
            raise

    def destroy(self, vm: VirtualMachine, *, force: bool = False) -> None:
        """End a VM. Raises ValueError while pages of it are pinned, unless forced.

        After a forced end the pinned pages stay part of physical memory until they are unpinned.
        """
        if self.vms.get(vm.client_id) is not vm:
            raise ValueError(f"{vm.name} is not a VM of this machine")
        pins = vm.pins
        if pins and not force:
            raise ValueError(f"{vm.name} still has {pins} references on its pages")
        del self.vms[vm.client_id]
        vm.destroy()

    def find(self, pa: int) -> tuple[VirtualMachine, Ipa] | None:
        """The VM whose RAM is at `pa`, and the IPA there; None for what is not RAM of a live VM."""
        try:
            bank, _ = self.memory.find(pa)
        except PhysicalFault:
            return None
        vm = self._owners.get(bank)
        ipa = vm.find(pa) if vm is not None and vm.alive else None
        return None if vm is None or ipa is None else (vm, ipa)

    def describe(self, pa: int) -> str:
        """What is at a physical address, in words."""
        found = self.find(pa)
        if found is not None:
            return f"IPA {found[1]:#x} of {found[0].name}"
        try:
            bank, page = self.memory.find(pa)
        except PhysicalFault:
            return "no memory"
        return f"page {page} of {bank.name}"

    def pins(self) -> dict[VmId, int]:
        """Sum of references per live VM."""
        return {client_id: vm.pins for client_id, vm in self.vms.items()}

    def pinned_frames(self) -> dict[Pa, int]:
        """References per frame, of the frames that have any, those of dead VMs included."""
        return {bank.frames.address(page): n for bank in self.memory.banks for page, n in bank.pinned().items()}

    def close(self) -> None:
        """End all VMs and give all memory back."""
        for vm in list(self.vms.values()):
            self.destroy(vm, force=True)
        for bank in self.memory.banks:
            self.memory.remove(bank)
            bank.store.close()

    def _client_id(self, wanted: int | None) -> VmId:
        if wanted is None:
            after = (self._last_id + step for step in range(MAX_CLIENT_ID))
            wanted = next((n % MAX_CLIENT_ID + 1 for n in after if n % MAX_CLIENT_ID + 1 not in self.vms), None)
            if wanted is None:
                raise ValueError("all client ids are in use")
        if not 0 < wanted <= MAX_CLIENT_ID:
            raise ValueError(f"client id {wanted} is not in 1..{MAX_CLIENT_ID}")
        if wanted in self.vms:
            raise ValueError(f"client id {wanted} is that of {self.vms[VmId(wanted)].name}")
        self._last_id = wanted
        return VmId(wanted)

    def _stage2(self) -> Stage2:
        return Stage2(self.memory, self.tables, self._sharing)

    def _start(self, vm: VirtualMachine, ram: int | Sequence[RamBlock], gic: Ipa) -> None:
        try:
            for block in [RamBlock(RAM_BASE, ram)] if isinstance(ram, int) else ram:
                self.add_ram(vm, block)
        except ValueError:
            vm.destroy()
            raise
        if not any(region.overlaps(gic, GIC_PAGES * PAGE_SIZE) for region in vm.regions):
            vm.map_device(gic, GIC_PA, GIC_PAGES)
        self.vms[vm.client_id] = vm

    def _bank(self, vm: VirtualMachine, block: RamBlock) -> Bank:
        pages, rest = divmod(block.size, PAGE_SIZE)
        if pages <= 0 or rest:
            raise ValueError(f"{vm.name}: RAM of {block.size} bytes is not whole pages")
        store = block.store if block.store is not None else PageStore(vm.name, pages)
        for bank, owner in self._owners.items():
            if owner is not vm and store.file is not None and bank.store.file == store.file:
                raise ValueError(f"{vm.name}: this memory is that of {owner.name}")
        frames = block.frames
        if frames is None:
            frames = self._layout.allocate(pages)
            self._chosen.add(frames)
        bank = Bank(vm.name, store, frames)
        self.memory.add(bank)
        self._owners[bank] = vm
        return bank

    def _release(self, bank: Bank) -> None:
        self.memory.remove(bank)
        del self._owners[bank]
        bank.store.close()
        if bank.frames in self._chosen:
            self._chosen.remove(bank.frames)
            self._layout.release(bank.frames)
