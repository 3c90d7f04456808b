"""The two ports of the core: what it needs of a guest's memory and of the secure world.

Anything that has these methods can stand behind them: the models of this repository, a recording, a VMM or
a secure world at the other end of a socket.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hv_models.memory import Ipa, Pa
from hv_models.stage2 import Pinned


class GuestMemory(Protocol):
    """One guest's memory, reached by IPA through that guest's stage-2 tables.

    Reads are always copies: there is deliberately no view, so nothing the guest changes afterwards can
    matter (rule R5). Every method raises `hv_models.stage2.Stage2Fault` where the guest has no such memory.
    """

    def read(self, ipa: Ipa, size: int, *, writable: bool = False) -> bytes:
        """Copy `size` bytes of one page of normal RAM; with `writable` only of read-write RAM."""
        ...

    def write_fields(self, ipa: Ipa, data: bytes, fields: Sequence[slice]) -> None:
        """Write these fields of `data`, which belongs at `ipa` in one page of read-write RAM, looked up once.

        Fields are slices of `data` with a start and a stop; what lies between them stays as it is.
        """
        ...

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """Translate and pin 4 KiB aligned pages in one step, all or nothing, one pin per mention (R6, R7)."""
        ...

    def unpin(self, pinned: Pinned) -> None:
        """Give back what one `pin` returned."""
        ...

    def load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        """Copy bytes of pinned pages, counted from the start of the first one."""
        ...

    def store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """Write fields of `data`, which belongs into pinned pages, `base` counted from the start of the first one."""
        ...

    def mark_dirty(self, pinned: Pinned) -> None:
        """Tell the hypervisor that the secure world may have written these pages (R27)."""
        ...


class SharedPage(Protocol):
    """A 4 KiB page of the mediator's own that the secure world can reach."""

    @property
    def pa(self) -> Pa:
        """Its physical address."""
        ...

    @property
    def view(self) -> memoryview:
        """Its 4096 bytes, writable."""
        ...

    @property
    def words(self) -> memoryview:
        """The same page as 512 u64."""
        ...


class SecureWorld(Protocol):
    """The secure world as the mediator sees it: registers in, registers out, pages shared by PA.

    The core only lends pages; the shell around it is what makes the call.
    """

    def call(self, regs: tuple[int, ...]) -> tuple[int, ...]:
        """Execute one SMC with x0..x7 and return x0..x3."""
        ...

    def lend(self) -> SharedPage | None:
        """Take a zeroed page from the mediator's pool; None if there is none left."""
        ...

    def take_back(self, page: SharedPage) -> None:
        """Return a page to the pool."""
        ...
