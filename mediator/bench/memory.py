"""Does memory grow with the number of calls? It must not: a mediator lives as long as its host."""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
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
WARM_UP: Final = 20
"""One warm-up call for so many that are counted."""
_PROGRESS_EVERY: Final = 5000


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes that Python objects and arrays hold more after `calls` calls; mediator pages that are out more."""

    calls: int
    bytes: int
    pages: int

    @property
    def met(self) -> bool:
        """Whether memory stayed flat."""
        return self.bytes < GROWTH_TARGET and self.pages == 0

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "calls": self.calls,
            "bytes": self.bytes,
            "pages": self.pages,
            "target": GROWTH_TARGET,
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
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        for regs in islice(rounds, calls // WARM_UP // len(mix) * len(mix)):
            stand.call(regs)
        before, pages = _held(), stand.machine.pages.allocated
        for done, regs in enumerate(islice(rounds, calls)):
            if done % _PROGRESS_EVERY == 0:
                progress(done, calls)
            stand.call(regs)
        return Growth(calls, _held() - before, stand.machine.pages.allocated - pages)
    finally:
        if not tracing:
            tracemalloc.stop()


def _held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
