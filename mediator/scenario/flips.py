"""Guest memory that changes between two looks of the mediator: another vCPU of the guest writes there meanwhile."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_MASK, PAGE_SHIFT
from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.failures import Countdown
from mediator.shell import GuestMemoryCount


class FlippingMemory(GuestMemoryCount):
    """A VM's memory, with writes of the guest just before the nth time that the mediator looks at a page.

    To look is to read bytes of a page, or to pin it.
    """

    def __init__(self, vm: VirtualMachine) -> None:
        super().__init__(vm)
        self._flips: dict[int, list[tuple[Countdown, Callable[[], None]]]] = {}
        self.read = self._read
        self.load = self._load

    def flip(self, ipa: int, nth: int, write: Callable[[], None]) -> None:
        """Have `write` called just before the nth look, counted from 1 and from now, at the page of `ipa`."""
        countdown = Countdown()
        countdown.left = nth - 1
        self._flips.setdefault(ipa >> PAGE_SHIFT, []).append((countdown, write))

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory.pin`."""
        if self._flips:
            for ipa in ipas.tolist():
                self._look(ipa)
        return super().pin(ipas)

    def _look(self, ipa: int) -> None:
        for countdown, write in self._flips.get(ipa >> PAGE_SHIFT, ()):
            if countdown.due():
                write()

    def _read(self, ipa: int, size: int, *, writable: bool = False) -> bytes:
        if self._flips:
            self._look(ipa)
        return self.vm.read(ipa, size, writable=writable)

    def _load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        if self._flips:
            for pa in pinned.pas[offset >> PAGE_SHIFT : ((offset + size - 1) >> PAGE_SHIFT) + 1].tolist():
                ipa = self.vm.find(pa & ~PAGE_MASK)
                if ipa is not None:
                    self._look(ipa)
        return self.vm.load(pinned, offset, size)
