"""What OP-TEE prints when a TA panics: code, TA, its regions, and where it was.

Source: OP-TEE's console output (user TA panic and abort, dump by ldelf).
"""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from uuid import UUID

from hv_models.memory import PAGE_MASK
from optee.errors import TaPanic
from optee.normal_world import Window
from optee.parameters import Memref
from optee.ta_memory import Region

if TYPE_CHECKING:
    from optee.ta_context import Instance


@dataclass(frozen=True, slots=True)
class Frame:
    """One function on the way to where the TA died."""

    function: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class PanicReport:
    """The end of one TA instance."""

    vm_id: int
    thread: int
    ta: UUID
    name: str
    """Class of the TA in this model."""
    code: int
    reason: str
    regions: tuple[Region, ...]
    call_stack: tuple[Frame, ...]
    """Innermost first."""

    def text(self) -> str:
        """The lines on OP-TEE's console."""
        lines = [
            f"E/TC:{self.thread:02} 0 {self.reason}",
            f"E/LD:  Status of TA {self.ta}",
            "E/LD:   arch: aarch64",
        ]
        for number, region in enumerate(self.regions):
            lines.append(
                f"E/LD:  region {number:2}: va {region.va:#010x} pa {region.pa:#010x} "
                f"size {region.size:#08x} flags {region.flags} {region.what}".rstrip()
            )
        elf = next((region for region in self.regions if region.what == "[0]"), None)
        if elf is not None:
            lines.append(f"E/LD:   [0] {self.ta} @ {elf.va:#010x}")
        lines.append("E/LD:  Call stack:")
        lines += [f"E/LD:   {frame.function} at {frame.file}:{frame.line}" for frame in self.call_stack]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data: numbers, strings, lists and dictionaries."""
        return asdict(self) | {"ta": str(self.ta)}


def report_panic(vm_id: int, thread: int, instance: Instance, panic: TaPanic) -> PanicReport:
    """Describe a panic while the instance still has its memory."""
    regions: list[Region] = []
    if instance.memory is not None:
        regions += instance.memory.regions
        va = instance.memory.end_va
        for param in instance.params:
            if isinstance(param, Memref) and isinstance(param.buffer, Window) and param.capacity:
                at = param.buffer.start + param.offset
                first = param.buffer.pages[at >> 12]
                size = ((at & PAGE_MASK) + param.capacity + PAGE_MASK) & ~PAGE_MASK
                regions.append(Region(va, first, size, "rw--", "(param)"))
                va += size
    frames = [
        Frame(summary.name, PurePath(summary.filename).name, summary.lineno or 0)
        for summary in reversed(traceback.extract_tb(panic.__traceback__))
    ]
    own = type(instance.ta).__module__.rpartition(".")[2]
    depth = next((n for n, frame in enumerate(frames) if frame.function in ("invoke", "_open_entry")), None)
    return PanicReport(
        vm_id,
        thread,
        instance.uuid,
        f"{own}.{type(instance.ta).__qualname__}",
        panic.code,
        str(panic),
        tuple(regions),
        tuple(frames[:depth]),
    )
