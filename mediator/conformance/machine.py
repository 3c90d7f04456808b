"""The machine of a vector file: domains with the stated frames, flips and allocation faults on demand."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from hv_models.descriptor import IPA_BITS
from hv_models.machine import MEDIATOR_BASE, Machine, RamBlock
from hv_models.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Frames
from hv_models.stage2 import PageKind, Pinned, Stage2Fault
from hv_models.vm import VirtualMachine
from mediator.conformance.vectors import AllocFault, Domain, Flip, MemoryWrite, P2m
from mediator.core.ledger import Ledger, Limits, OverLimit
from mediator.core.ports import SharedPage
from mediator.failures import Countdown, FaultyLedger
from mediator.host import Host
from optee.abi.message import HEADER, HEADER_SIZE, MAX_PARAMS

POISON: Final = 0xA5
"""What a fresh page of the observed mediator's heap holds."""
_KINDS: Final = {
    "ram_rw": PageKind.RAM_RW,
    "ram_ro": PageKind.RAM_RO,
    "mmio": PageKind.MMIO,
    "grant_rw": PageKind.GRANT_RW,
    "grant_ro": PageKind.GRANT_RO,
    "foreign_rw": PageKind.FOREIGN_RW,
    "none": PageKind.NONE,
}


class VectorMemory:
    """A domain's memory as the mediator reaches it, with flips just before look-ups.

    resuming: the guest answers an RPC. The rest is what was met since `begin`: a page list with an unaligned address,
    a page at IPA 0, a reply that could not be read or changed before a second look, IPAs that could not be written;
    and `message`, the bytes of the message or reply that were read.
    """

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        self.flips: dict[int, list[tuple[Countdown, Flip]]] = {}
        self.resuming = self.unaligned = self.null = self.unreadable = self.changed_between = False
        self.unwritable: list[int] = []
        self.message: bytes | None = None

    def begin(self, *, resuming: bool) -> None:
        """A call of the guest begins."""
        self.resuming = resuming
        self.unaligned = self.null = self.unreadable = self.changed_between = False
        self.unwritable.clear()
        self.message = None

    @property
    def flipping(self) -> bool:
        """Whether a flip has not happened yet."""
        return any(countdown.left >= 0 for waiting in self.flips.values() for countdown, _ in waiting)

    def look_up(self, gfn: int) -> bool:
        """Count a stage-2 look-up of a page; flips that wait for it happen now. Whether any did."""
        happened = False
        for countdown, flip in self.flips.get(gfn, ()):
            if countdown.due():
                happened = True
                value = flip.value & (1 << 8 * flip.size) - 1
                poke(self.vm, (gfn << PAGE_SHIFT) + flip.offset, value.to_bytes(flip.size, "little"))
        return happened

    def read(self, ipa: int, size: int, *, writable: bool = False) -> bytes:
        """See `GuestMemory`. The recorded mediator looks twice at an RPC reply, at its header and at the whole."""
        self.look_up(ipa >> PAGE_SHIFT)
        reply = self.resuming and not writable
        try:
            data = self.vm.read(ipa, size, writable=writable)
        except Stage2Fault:
            self.unreadable |= reply
            raise
        if not writable:
            self.message = data
        if reply and HEADER.unpack(self.vm.read(ipa, HEADER_SIZE))[7] <= MAX_PARAMS:
            self.changed_between |= self.look_up(ipa >> PAGE_SHIFT)
        return data

    def write_fields(self, ipa: int, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory`."""
        self.look_up(ipa >> PAGE_SHIFT)
        try:
            self.vm.write_fields(ipa, data, fields)
        except Stage2Fault:
            self.unwritable.append(ipa)
            raise

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory`. Pages are looked up one after the other, to the first that cannot be had."""
        self.unaligned |= bool(np.any(ipas & np.uint64(PAGE_MASK)))
        self.null |= not ipas.all()
        if self.flips:
            for number, ipa in enumerate(ipas.tolist()):
                self.look_up(ipa >> PAGE_SHIFT)
                self.vm.unpin(self.vm.pin(ipas[number : number + 1]))
        return self.vm.pin(ipas)

    def unpin(self, pinned: Pinned) -> None:
        """See `GuestMemory`."""
        self.vm.unpin(pinned)

    def load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        """See `GuestMemory`."""
        return self.vm.load(pinned, offset, size)

    def store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory`."""
        self.vm.store_fields(pinned, base, data, fields)

    def mark_dirty(self, pinned: Pinned) -> None:
        """See `GuestMemory`."""
        self.vm.mark_dirty(pinned)


def poke(vm: VirtualMachine, address: int, data: bytes) -> None:
    """Change guest bytes whatever the type of their page is: what the guest's own vCPU or a device does.

    The frame that is mapped there is meant, or the RAM that belongs to the address if none is.
    """
    while data:
        room = PAGE_SIZE - (address & PAGE_MASK)
        part, data = data[:room], data[room:]
        pa = vm.stage2.walk(address).pa if address < 1 << IPA_BITS else None
        for region in vm.regions:
            page = None if pa is None else region.bank.frames.page(pa)
            if page is not None:
                offset = address & PAGE_MASK
                region.bank.page_view(page)[offset : offset + len(part)] = part
            elif pa is None and region.index(address) is not None:
                offset = address - region.base
                region.bank.page_view(offset >> PAGE_SHIFT)[offset & PAGE_MASK :][: len(part)] = part
        address += len(part)


class VectorMachine(Host):
    """Domains, and the mediator's heap; everything a vector does to the machine."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        super().__init__(Machine())
        self.described = {domain.id: domain for domain in domains}
        self.vms: dict[int, VirtualMachine] = {}
        self.memories: dict[int, VectorMemory] = {}
        self.pages = Countdown()
        self.objects = Countdown()
        self.lend = self._lend
        self._common = domains[0] if domains else Domain(id=0)
        for domain in domains:
            self.memory(domain.id)

    def close(self) -> None:
        """Give back all memory."""
        self.machine.close()

    def memory(self, domain: int) -> VectorMemory:
        """A domain's memory; a domain that was not described has 64 pages, the common base and permutation."""
        memory = self.memories.get(domain)
        if memory is None:
            described = self.described.get(domain)
            if described is None:
                described = Domain(id=domain, npages=64, base_gfn=self._common.base_gfn, perm=self._common.perm)
            self.described[domain] = described
            vm = self.machine.create_xen(
                f"dom-{domain}",
                [
                    RamBlock(
                        described.base_gfn << PAGE_SHIFT,
                        described.npages << PAGE_SHIFT,
                        frames=Frames((domain + 8) << 32, described.npages, permutation=described.perm),
                    )
                ],
                domain=domain,
            )
            memory = VectorMemory(vm)
            self.vms[domain] = vm
            self.memories[domain] = memory
        return memory

    # The secure world's port of the core, with faults

    def _lend(self) -> SharedPage | None:
        """See `SecureWorld.lend`."""
        return None if self.pages.due() else self.machine.pages.allocate()

    def ledger(self, limits: Limits) -> Ledger:
        """See `Host`: records can fail to be allocated."""
        if self.objects.due():
            raise OverLimit("memory")
        return FaultyLedger(limits, self.objects)

    def host_addresses(self) -> Sequence[tuple[int, int]]:
        """Only the mediator's pages: the frames of a vector's domains have addresses that a guest may name."""
        return [(first, end) for first, end in super().host_addresses() if first >= MEDIATOR_BASE]

    # Steps that are no calls

    def write(self, domain: int, write: MemoryWrite) -> None:
        """Bytes that the guest wrote before its call."""
        poke(self.memory(domain).vm, write.ipa, write.hex + bytes(write.zeros_after))

    def p2m(self, step: P2m) -> None:
        """A change of a stage-2 entry."""
        vm = self.memory(step.domain).vm
        described = self.described[step.domain]
        if step.page_index is None and not 0 <= step.gfn - described.base_gfn < described.npages:
            return  # there is no page to give another type to: look-ups fail before and after
        if step.gfn >> IPA_BITS - PAGE_SHIFT or (step.page_index or 0) >= described.npages:
            return  # no such address, or no such page
        vm.set_kind(step.gfn << PAGE_SHIFT, _KINDS[step.type], page=step.page_index)

    def flip(self, step: Flip) -> None:
        """Memory that will change; look-ups count from now on."""
        countdown = Countdown()
        countdown.left = step.nth_lookup
        self.memory(step.domain).flips.setdefault(step.gfn, []).append((countdown, step))

    def alloc_fault(self, step: AllocFault) -> None:
        """Allocations that will fail; both counts start now."""
        self.pages.left = step.heap_page_alloc_nth
        self.objects.left = step.xzalloc_nth

    @property
    def failing(self) -> bool:
        """Whether an allocation is to fail yet."""
        return self.pages.left >= 0 or self.objects.left >= 0

    # For the comparison and the checker

    def image(self, domain: int) -> bytes:
        """All bytes of a domain's RAM, page by page."""
        return b"".join(ram.read(ram.base, ram.size) for ram in self.vms[domain].ram)

    def restore(self, domain: int, image: bytes) -> None:
        """Give a domain's RAM these bytes."""
        at = 0
        for ram in self.vms[domain].ram:
            ram.write(ram.base, image[at : at + ram.size])
            at += ram.size

    def gfn_pins(self, domain: int) -> dict[int, int]:
        """References by guest frame."""
        return {int(gfn): count for gfn, count in self.vms[domain].pinned().items()}

    def owner(self, pa: int) -> tuple[int, int] | None:
        """Domain and guest frame of a physical address."""
        for domain, vm in self.vms.items():
            ipa = vm.find(pa)
            if ipa is not None:
                return domain, ipa >> PAGE_SHIFT
        return None
