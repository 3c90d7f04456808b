"""Does memory grow with the number of calls? It must not: a mediator lives as long as its host."""

import gc
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from mediator.bench.stand import (
    LARGE_COOKIE,
    SMALL_PAGES,
    Stand,
    buffer_call,
    fast_call,
    register_call,
    unregister_call,
    value_call,
)

GROWTH_TARGET: Final = 1 << 20
"""Bytes by which 200 000 calls may let the process grow."""
WARM_UP: Final = 10
"""One warm-up call for so many that are counted."""
_PROGRESS_EVERY: Final = 5000
_STATM: Final = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class Growth:
    """What `calls` calls left behind: bytes of resident memory, Python's memory blocks, mediator pages."""

    calls: int
    bytes: int
    blocks: int
    pages: int

    @property
    def target(self) -> int:
        """Bytes that they may leave behind."""
        return GROWTH_TARGET

    @property
    def met(self) -> bool:
        """Whether memory stayed flat."""
        return self.bytes < self.target and self.pages == 0

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "calls": self.calls,
            "bytes": self.bytes,
            "blocks": self.blocks,
            "pages": self.pages,
            "target": self.target,
            "met": self.met,
        }


def growth(stand: Stand, calls: int, progress: Callable[[int, int], None]) -> Growth:
    """Make `calls` calls of all kinds after a warm-up, and count what is left of them."""
    mix = [
        fast_call(),
        value_call(stand),
        buffer_call(stand),
        register_call(stand, SMALL_PAGES, LARGE_COOKIE),
        unregister_call(stand, LARGE_COOKIE),
    ]
    for regs in mix:
        stand.succeeds(regs)
    rounds = cycle(mix)
    for regs in islice(rounds, calls // WARM_UP // len(mix) * len(mix)):
        stand.call(regs)
    before = _held(stand)
    for done, regs in enumerate(islice(rounds, calls // len(mix) * len(mix))):
        if done % _PROGRESS_EVERY == 0:
            progress(done, calls)
        stand.call(regs)
    resident, blocks, pages = (now - then for now, then in zip(_held(stand), before, strict=True))
    return Growth(calls, resident, blocks, pages)


def _held(stand: Stand) -> tuple[int, int, int]:
    gc.collect()
    return _resident(), sys.getallocatedblocks(), stand.machine.pages.allocated


def _resident() -> int:
    """Bytes of this process in memory now; where the system does not say, the most there ever were."""
    if _STATM.exists():
        return int(_STATM.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
