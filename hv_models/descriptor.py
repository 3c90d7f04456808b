"""Stage-2 translation table descriptors of VMSAv8-64 with the 4 KiB granule.

Layout: Arm Architecture Reference Manual (DDI 0487), "VMSAv8-64 translation table format descriptors".
Bit 0 is "valid"; bit 1 tells a table (levels 1 and 2) or page (level 3) from a block. A leaf holds MemAttr
[5:2], S2AP [7:6], SH [9:8], AF [10], the output address [47:12], XN [54:53], and four bits for software
[58:55]. Software keeps there what the architecture has no word for: whose page it is, and whether a page is
write-protected for dirty logging only.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_SIZE, PageArray

IPA_BITS: Final = 39
"""Width of an IPA that three levels translate, starting with one table of level 1."""
ENTRIES: Final = 512
"""Descriptors in a table."""
LEVEL_SHIFT: Final = {1: 30, 2: 21, 3: 12}
"""Lowest IPA bit of the index into a table of each level."""
BLOCK_PAGES: Final = {1: ENTRIES * ENTRIES, 2: ENTRIES, 3: 1}
"""Pages that a leaf of each level covers."""

VALID: Final = 1 << 0
TABLE_OR_PAGE: Final = 1 << 1
MEMATTR: Final = 0xF << 2
S2AP_READ: Final = 1 << 6
S2AP_WRITE: Final = 1 << 7
ACCESS_FLAG: Final = 1 << 10
ADDRESS: Final = ((1 << 48) - 1) & ~0xFFF
EXECUTE_NEVER: Final = 1 << 54
LOGGED: Final = 1 << 55
GRANT: Final = 1 << 56
FOREIGN: Final = 1 << 57

_NORMAL_WRITE_BACK = 0xF << 2
_DEVICE_NGNRE = 0x1 << 2
_INNER_SHAREABLE = 3 << 8
_OUTER_SHAREABLE = 2 << 8


class PageKind(IntEnum):
    """What a stage-2 entry makes of a page."""

    NONE = 0
    """Not mapped."""
    RAM_RW = 1
    """Normal memory of the VM, read and write: the only kind that may be shared with OP-TEE."""
    RAM_RO = 2
    """Normal memory of the VM, read only."""
    MMIO = 3
    """Device memory."""
    GRANT_RW = 4
    """Memory that another Xen domain granted, read and write."""
    GRANT_RO = 5
    """Memory that another Xen domain granted, read only."""
    FOREIGN_RW = 6
    """Memory of another Xen domain, mapped by a privileged one."""


_NORMAL = VALID | ACCESS_FLAG | _NORMAL_WRITE_BACK | _INNER_SHAREABLE | S2AP_READ

LEAF_ATTRIBUTES: Final = {
    PageKind.RAM_RW: _NORMAL | S2AP_WRITE,
    PageKind.RAM_RO: _NORMAL,
    PageKind.MMIO: VALID | ACCESS_FLAG | _DEVICE_NGNRE | _OUTER_SHAREABLE | S2AP_READ | S2AP_WRITE | EXECUTE_NEVER,
    PageKind.GRANT_RW: _NORMAL | S2AP_WRITE | EXECUTE_NEVER | GRANT,
    PageKind.GRANT_RO: _NORMAL | EXECUTE_NEVER | GRANT,
    PageKind.FOREIGN_RW: _NORMAL | S2AP_WRITE | EXECUTE_NEVER | FOREIGN,
}
"""All bits of a leaf but the address and bit 1."""

_KIND_BITS = np.uint64(VALID | MEMATTR | S2AP_READ | S2AP_WRITE | ACCESS_FLAG | LOGGED | GRANT | FOREIGN)
_RAM_RW = np.uint64(LEAF_ATTRIBUTES[PageKind.RAM_RW]) & _KIND_BITS
_RAM_RW_LOGGED = np.uint64(LEAF_ATTRIBUTES[PageKind.RAM_RO] | LOGGED) & _KIND_BITS


class Descriptor(int):
    """One descriptor, readable."""

    __slots__ = ()

    @property
    def valid(self) -> bool:
        """Whether the walk goes on or ends well here."""
        return bool(self & VALID)

    @property
    def address(self) -> int:
        """Output address, or the address of the next table."""
        return self & ADDRESS

    @property
    def readable(self) -> bool:
        """S2AP[0]."""
        return bool(self & S2AP_READ)

    @property
    def writable(self) -> bool:
        """S2AP[1]: what the vCPU may do, which dirty logging takes away for a while."""
        return bool(self & S2AP_WRITE)

    @property
    def device(self) -> bool:
        """Whether MemAttr names one of the Device types."""
        return not self & 0xC << 2

    @property
    def accessed(self) -> bool:
        """The access flag; without it the first access faults."""
        return bool(self & ACCESS_FLAG)

    @property
    def logged(self) -> bool:
        """Whether the page is write-protected for dirty logging only."""
        return bool(self & LOGGED)

    @property
    def kind(self) -> PageKind:
        """What this leaf makes of its page."""
        writable = self.writable or self.logged
        if not self.valid or not self.readable:
            return PageKind.NONE
        if self.device:
            return PageKind.MMIO
        if self & FOREIGN:
            return PageKind.FOREIGN_RW
        if self & GRANT:
            return PageKind.GRANT_RW if writable else PageKind.GRANT_RO
        return PageKind.RAM_RW if writable else PageKind.RAM_RO

    def is_table(self, level: int) -> bool:
        """Whether it points to a table of the next level."""
        return self.valid and level < 3 and bool(self & TABLE_OR_PAGE)

    def is_leaf(self, level: int) -> bool:
        """Whether it is a block (level 1, 2) or page (level 3). The other code of level 3 is reserved."""
        return self.valid and bool(self & TABLE_OR_PAGE) == (level == 3)

    def describe(self, level: int) -> str:
        """The descriptor of a level in words."""
        if self.is_table(level):
            return f"table at PA {self.address:#x}"
        if not self.is_leaf(level):
            return "reserved" if self.valid else "invalid"
        access = ("r" if self.readable else "-") + ("w" if self.writable else "-")
        words = [
            "page" if level == 3 else "block",
            f"PA {self.address:#x}",
            f"S2AP {access}",
            "Device-nGnRE" if self.device else "Normal write-back",
            self.kind.name,
        ]
        if not self.accessed:
            words.append("AF clear")
        if self.logged:
            words.append("write-protected for dirty logging")
        return ", ".join(words)


def is_ram_rw(descriptors: PageArray) -> npt.NDArray[np.bool_]:
    """Which leaves are normal read-write RAM, those write-protected for dirty logging included."""
    kinds = descriptors & _KIND_BITS
    found: npt.NDArray[np.bool_] = (kinds == _RAM_RW) | (kinds == _RAM_RW_LOGGED)
    return found


RAMP: Final[PageArray] = np.arange(ENTRIES, dtype=np.uint64) * np.uint64(PAGE_SIZE)
"""Offsets of 512 consecutive pages."""


def join(descriptors: PageArray) -> int | None:
    """The block that stands for a whole run of page descriptors; 0 for a run of nothing, None for neither."""
    first, size = int(descriptors[0]), len(descriptors) * PAGE_SIZE
    if not first & VALID:
        return None if descriptors.any() else 0
    if first & ADDRESS & (size - 1) or int(descriptors[-1]) - first != size - PAGE_SIZE:
        return None
    if (np.diff(descriptors) != PAGE_SIZE).any():
        return None
    return first & ~TABLE_OR_PAGE


def split(block: Descriptor, level: int) -> PageArray:
    """The 512 leaves of the next level that say the same as a block."""
    steps = RAMP * np.uint64(BLOCK_PAGES[level + 1])
    return steps + np.uint64(block | TABLE_OR_PAGE if level == 2 else block)
