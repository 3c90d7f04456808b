"""The mediator's own end of a simulated machine: its pages, and what the checker counts there."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from hv_models.machine import MEDIATOR_BASE, Machine
from hv_models.memory import PAGE_SIZE, PageArray
from hv_models.vm import VirtualMachine
from mediator.core.ledger import Ledger, Limits
from mediator.core.ports import SharedPage
from optee.abi.smc import VmId


class Host:
    """A machine's mediator pages as the core's `SecureWorld` port wants them, but for the call itself.

    Implements `mediator.invariants.Host` as well.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # Every call needs pages, so these two are the pool's own functions, with nothing between.
        self.lend: Callable[[], SharedPage | None] = machine.pages.allocate
        """See `SecureWorld.lend`; a subclass whose pages run out puts another in its place."""
        self.take_back = cast("Callable[[SharedPage], None]", machine.pages.release)
        """See `SecureWorld.take_back`."""
        self._changes = -1
        self._addresses: list[tuple[int, int]] = []

    def call(self, regs: tuple[int, ...]) -> tuple[int, ...]:
        """Overridden where a secure world stands behind; a scripted one answers by itself."""
        raise NotImplementedError

    def ledger(self, limits: Limits) -> Ledger:
        """Books for a new guest; overridden where records of it shall fail to be made."""
        return Ledger(limits)

    def pins(self, vm: int) -> Mapping[int, int]:
        """References per physical page of a VM."""
        found = self.machine.vms.get(VmId(vm))
        return {} if found is None else pins_by_frame(found)

    def pin_count(self, vm: int) -> int:
        """Sum of the same."""
        found = self.machine.vms.get(VmId(vm))
        return 0 if found is None else found.pins

    def outside_ram(self, vm: int, pas: PageArray) -> PageArray:
        """Those of the addresses at which no page of the VM's RAM lies."""
        found = self.machine.vms.get(VmId(vm))
        for region in () if found is None else found.regions:
            pas = pas[region.bank.frames.find(pas) < 0]
            if not len(pas):
                break
        return pas

    def frame(self, pa: int) -> memoryview:
        """The mediator's page at a physical address; KeyError for any other."""
        if pa not in self.machine.pages:
            raise KeyError(pa)
        return self.machine.memory.frame(pa)

    def own_address_in_ram(self, vm: int) -> tuple[int, int] | None:
        """The first word of a VM's RAM that is the address of a mediator's page, with its IPA; None if none is."""
        first, end = np.uint64(MEDIATOR_BASE), np.uint64(MEDIATOR_BASE + self.machine.pages.capacity * PAGE_SIZE)
        found = self.machine.vms.get(VmId(vm))
        for region in () if found is None else found.regions:
            store = region.bank.store
            for pages in store.touched():
                words = store.words[pages.start : pages.stop].reshape(-1)
                hits = np.flatnonzero((words >= first) & (words < end))
                if len(hits):
                    return region.base + pages.start * PAGE_SIZE + int(hits[0]) * 8, int(words[hits[0]])
        return None

    def host_addresses(self) -> Sequence[tuple[int, int]]:
        """Where the mediator's pages and the frames of guests lie; a guest can name none of these."""
        memory = self.machine.memory
        if memory.changes != self._changes:
            self._changes = memory.changes
            self._addresses = [(bank.frames.base, bank.frames.end) for bank in memory.banks]
        return self._addresses


def pins_by_frame(vm: VirtualMachine) -> dict[int, int]:
    """References per physical page of a VM's RAM, counted where the hypervisor keeps them."""
    pins: Counter[int] = Counter()
    for region in vm.regions:
        bank = region.bank
        for page, count in bank.pinned().items():
            pins[bank.frames.address(page)] += count
    return pins
