"""Walking the stage-2 tables: what each level says about an address, and why an access is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hv_models.descriptor import BLOCK_PAGES, ENTRIES, IPA_BITS, LEVEL_SHIFT, Descriptor, PageKind
from hv_models.memory import PAGE_SIZE, Ipa, Pa, PageArray, PhysicalFault


class Reason(StrEnum):
    """Why an access of the mediator to guest memory is refused."""

    NULL = "address 0 means NULL to OP-TEE"
    UNALIGNED = "not page aligned"
    CROSSES_PAGE = "crosses a page boundary"
    UNMAPPED = "not mapped"
    READ_ONLY = "read-only memory"
    DEVICE = "device memory"
    GRANT = "memory granted by another domain"
    FOREIGN = "memory of another domain"
    SHARED = "another VM maps the same frame"
    HOLE = "no memory behind the mapping"


REFUSED_KINDS: Final = {
    PageKind.NONE: Reason.UNMAPPED,
    PageKind.RAM_RO: Reason.READ_ONLY,
    PageKind.MMIO: Reason.DEVICE,
    PageKind.GRANT_RW: Reason.GRANT,
    PageKind.GRANT_RO: Reason.GRANT,
    PageKind.FOREIGN_RW: Reason.FOREIGN,
}
"""Why a page of each kind but RAM_RW may not be shared."""


class Stage2Fault(Exception):
    """A guest address that cannot be used as was asked."""

    def __init__(self, ipa: int, reason: Reason) -> None:
        super().__init__(f"IPA {ipa:#x}: {reason}")
        self.ipa = Ipa(ipa)
        self.reason = reason


class WalkFault(StrEnum):
    """How a walk of the tables ends badly (Arm ARM, "MMU faults")."""

    TRANSLATION = "translation fault"
    ACCESS_FLAG = "access flag fault"
    EXTERNAL_ABORT = "external abort on translation table walk"


@dataclass(frozen=True, slots=True)
class Step:
    """One descriptor that a walk fetched."""

    level: int
    table: Pa
    index: int
    descriptor: Descriptor

    def __str__(self) -> str:
        return (
            f"level {self.level}: table {self.table:#x}[{self.index}] = {self.descriptor:#018x}, "
            f"{self.descriptor.describe(self.level)}"
        )


@dataclass(frozen=True, slots=True)
class Walk:
    """The way of one address through the tables. Its text has a line per level and one for the result."""

    ipa: Ipa
    steps: tuple[Step, ...]
    fault: WalkFault | None
    fault_level: int | None

    @property
    def descriptor(self) -> Descriptor:
        """The leaf; 0 where there is none."""
        return Descriptor(0) if self.fault else self.steps[-1].descriptor

    @property
    def kind(self) -> PageKind:
        """What the page is to the VM."""
        return self.descriptor.kind

    @property
    def pages(self) -> int:
        """Pages that the leaf covers: 1, 512 or 262144."""
        return BLOCK_PAGES[self.steps[-1].level]

    @property
    def pa(self) -> Pa | None:
        """Physical address of the very byte; None after a fault."""
        if self.fault:
            return None
        return Pa(self.descriptor.address | (self.ipa & (self.pages * PAGE_SIZE - 1)))

    def __str__(self) -> str:
        lines = [f"IPA {self.ipa:#x}", *(f"  {step}" for step in self.steps)]
        if self.fault:
            lines.append(f"  {self.fault}, level {self.fault_level}")
        else:
            lines.append(f"  PA {self.pa:#x} {self.kind.name}")
        return "\n".join(lines)


def walk(root: Pa, fetch: Callable[[int], PageArray], ipa: int) -> Walk:
    """Translate one address as the hardware does, from the level 1 table at `root`.

    `fetch` gives the 512 descriptors of the table at a PA, or raises PhysicalFault.
    """
    steps: list[Step] = []
    if not 0 <= ipa < 1 << IPA_BITS:
        return Walk(Ipa(ipa), (), WalkFault.TRANSLATION, 0)
    table = root
    level = 1
    while True:
        index = (ipa >> LEVEL_SHIFT[level]) % ENTRIES
        try:
            descriptor = Descriptor(fetch(table)[index])
        except PhysicalFault:
            return Walk(Ipa(ipa), tuple(steps), WalkFault.EXTERNAL_ABORT, level)
        steps.append(Step(level, table, index, descriptor))
        if not descriptor.is_table(level):
            break
        table = Pa(descriptor.address)
        level += 1
    fault = None
    if not descriptor.is_leaf(level):
        fault = WalkFault.TRANSLATION
    elif not descriptor.accessed:
        fault = WalkFault.ACCESS_FLAG
    return Walk(Ipa(ipa), tuple(steps), fault, level if fault else None)
