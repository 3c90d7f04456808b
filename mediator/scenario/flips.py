"""Guest memory that changes between two looks of the mediator, or is gone at one of them."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_MASK, PAGE_SHIFT
from hv_models.stage2 import Pinned, Reason, Stage2Fault
from hv_models.vm import VirtualMachine
from mediator.failures import Countdown
from mediator.shell import GuestMemoryCount


class FlippingMemory(GuestMemoryCount):
    """A VM's memory, with writes of the guest just before the nth time that the mediator looks at a page.

    To look is to read bytes of a page, or to pin it. `accesses` says which access fails, of whatever kind, as if the
    guest had taken the page away.
    """

    def __init__(self, vm: VirtualMachine) -> None:
        super().__init__(vm)
        self._flips: dict[int, list[tuple[Countdown, Callable[[], None]]]] = {}
        self.accesses = Countdown()
        self.read = self._read
        self.load = self._load
        self.write_fields = self._write_fields
        self.store_fields = self._store_fields

    def flip(self, ipa: int, nth: int, write: Callable[[], None]) -> None:
        """Have `write` called just before the nth look, counted from 1 and from now, at the page of `ipa`."""
        countdown = Countdown()
        countdown.left = nth - 1
        self._flips.setdefault(ipa >> PAGE_SHIFT, []).append((countdown, write))

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory.pin`."""
        self._reach(int(ipas[0]) if len(ipas) else 0)
        if self._flips:
            for ipa in ipas.tolist():
                self._look(ipa)
        return super().pin(ipas)

    def _look(self, ipa: int) -> None:
        for countdown, write in self._flips.get(ipa >> PAGE_SHIFT, ()):
            if countdown.due():
                write()

    def _reach(self, ipa: int) -> None:
        if self.accesses.due():
            raise Stage2Fault(ipa, Reason.UNMAPPED)

    def _write_fields(self, ipa: int, data: bytes, fields: Sequence[slice]) -> None:
        self._reach(ipa)
        self.vm.write_fields(ipa, data, fields)

    def _store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        self._reach(base)
        self.vm.store_fields(pinned, base, data, fields)

    def _read(self, ipa: int, size: int, *, writable: bool = False) -> bytes:
        self._reach(ipa)
        if self._flips:
            self._look(ipa)
        return self.vm.read(ipa, size, writable=writable)

    def _load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        self._reach(offset)
        if self._flips:
            for pa in pinned.pas[offset >> PAGE_SHIFT : ((offset + size - 1) >> PAGE_SHIFT) + 1].tolist():
                ipa = self.vm.find(pa & ~PAGE_MASK)
                if ipa is not None:
                    self._look(ipa)
        return self.vm.load(pinned, offset, size)
