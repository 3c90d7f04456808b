"""What the memory manager counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class LevelStatistics:
    """Of one level: bytes and events since the guest began, but for `current` and `peak`."""

    allocated: int = 0
    """Bytes."""
    freed: int = 0
    """Bytes."""
    peak: int = 0
    """The most bytes at once."""
    allocations: int = 0
    releases: int = 0
    failures: int = 0
    """Allocations for which there was no room."""
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    """Entries that went before anybody dropped them."""

    @property
    def current(self) -> int:
        """Bytes now."""
        return self.allocated - self.freed

    @property
    def hit_rate(self) -> float | None:
        """Hits of all look-ups; None before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def took(self, size: int) -> None:
        """Count an allocation of so many bytes."""
        self.allocations += 1
        self.allocated += size
        self.peak = max(self.peak, self.current)

    def gave(self, size: int) -> None:
        """Count a release."""
        self.releases += 1
        self.freed += size

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        rate = self.hit_rate
        return asdict(self) | {"current": self.current, "hit_rate": None if rate is None else round(rate, 4)}


@dataclass(slots=True)
class CollectorStatistics:
    """Of the collector."""

    collections: int = 0
    """Rounds through all levels that were finished."""
    passes: int = 0
    """Portions of such rounds, each at an entry of a yielding call or where memory was short."""
    longest_pass: int = 0
    """The most entries that one pass looked at."""
    examined: int = 0
    bytes: int = 0
    """Bytes that became free in the levels."""
    nanoseconds: int = 0
