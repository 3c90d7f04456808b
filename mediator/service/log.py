"""What the service logs of the core's events: at most so much for each guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from mediator.core.steps import LIMITS_CHANGED, POOL_CHANGED, Event
from optee.memory.pools import LowMemory

LINES_PER_SECOND: Final = 20
"""Lines that one guest can cause. Stops a hostile guest from filling the log, and from slowing the others down."""
_CHANGES: Final = frozenset({LIMITS_CHANGED, POOL_CHANGED})
"""What the host alone causes, and wants to find again: logged always, and not counted against a guest."""
_STRANGERS: Final = 0
"""No guest has this client id."""


class EventLog:
    """Logs events: errors and new quotas always, the others while `everything` says so. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float], everything: Callable[[], bool]) -> None:
        self._clock = clock
        self._everything = everything
        self._log = structlog.get_logger()
        self._since: dict[int, float] = {}
        self._lines: dict[int, int] = {}
        self._dropped: dict[int, int] = {}

    def __call__(self, event: Event) -> None:
        """Log one event, or count it as left out."""
        if event.level == "error":
            self._log.error(event.name, guest=event.vm, **event.detail)
        elif event.name in _CHANGES:
            self._log.info(event.name, guest=event.vm, **event.detail)
        elif self._everything() and self._room(event.vm):
            log = self._log.info if event.level == "info" else self._log.debug
            log(event.name, guest=event.vm, **event.detail)

    def memory_low(self, low: LowMemory) -> None:
        """Log that a pool of OP-TEE is four fifths taken, or has failed, for the first time."""
        counters = low.statistics
        self._log.warning(
            "memory_low",
            guest=low.guest,
            pool=low.pool,
            allocated=counters.allocated,
            size=counters.size,
            biggest_failure=counters.biggest_failure,
        )

    def link_ended(self, guest: str, why: str) -> None:
        """Log why a link of somebody else's VMM was ended; all of them together are bounded like one guest."""
        if self._room(_STRANGERS):
            self._log.warning("link_ended", guest=guest, why=why)

    def _room(self, guest: int) -> bool:
        now = self._clock()
        if now - self._since.get(guest, now - 1) >= 1:
            dropped = self._dropped.pop(guest, 0)
            if dropped:
                self._log.info("lines_left_out", guest=guest, lines=dropped)
            self._since[guest], self._lines[guest] = now, 0
        self._lines[guest] += 1
        if self._lines[guest] <= LINES_PER_SECOND:
            return True
        self._dropped[guest] = self._dropped.get(guest, 0) + 1
        return False
