"""What all pools of memory have in common: who holds what, counters as OP-TEE's statistics have them, and failure.

Source: OP-TEE's stats pseudo TA (struct malloc_stats).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from optee.abi.results import Result
from optee.errors import TeeError

LOW: Final = 0.8
"""Part of a pool that may be taken before `on_low` is told."""


class Owner(NamedTuple):
    """Who holds memory, as the leak report says it."""

    what: str
    """Kind of object: "session", "RSA key", ..."""
    guest: int
    """Client id; 0 for the nexus, which is no guest's."""
    session: int | None = None
    """Id of the session that it was allocated for."""

    def __str__(self) -> str:
        session = "" if self.session is None else f", session {self.session}"
        return f"{self.what} of guest {self.guest}{session}"


SIZER: Final = Owner("size", 0)
"""Of what arithmetic takes from a heap that nobody uses."""


class Allocation(NamedTuple):
    """A block that is allocated."""

    address: int
    size: int
    """Bytes, header included."""
    owner: Owner


class Statistics(NamedTuple):
    """What OP-TEE counts for each pool (struct malloc_stats). All but `failed` are bytes."""

    allocated: int
    max_allocated: int
    """The most that was ever allocated."""
    size: int
    failed: int
    """Allocations that failed."""
    biggest_failure: int
    """The most that was asked for in vain."""
    allocated_at_biggest_failure: int


class Pool:
    """`size` bytes of which allocations are taken; how they are placed is the business of its kinds."""

    __slots__ = (
        "_allocated_at_biggest_failure",
        "_biggest_failure",
        "_failed",
        "_low_mark",
        "_used",
        "allocated",
        "max_allocated",
        "name",
        "on_low",
        "size",
    )

    def __init__(self, size: int, name: str) -> None:
        self.name = name
        """As OP-TEE's statistics call the pool."""
        self.size = size
        """Bytes."""
        self.on_low: Callable[[Pool], None] | None = None
        """Told once when four fifths are taken, or when an allocation fails."""
        self._low_mark = size * LOW
        self.allocated = 0
        """Bytes allocated now, headers included."""
        self.max_allocated = 0
        self._used: dict[int, tuple[int, Owner]] = {}
        self._failed = self._biggest_failure = self._allocated_at_biggest_failure = 0

    def _take(self, address: int, size: int, owner: Owner) -> None:
        """Write down what was allocated."""
        self._used[address] = size, owner
        self.allocated += size
        if self.allocated > self.max_allocated:
            self.max_allocated = self.allocated
            if self.allocated > self._low_mark:
                self._tell()

    def _failure(self, size: int) -> TeeError:
        """Count that there was no room for `size` bytes: what to raise."""
        self._failed += 1
        if size > self._biggest_failure:
            self._biggest_failure = size
            self._allocated_at_biggest_failure = self.allocated
        self._tell()
        return TeeError(Result.OUT_OF_MEMORY)

    def _tell(self) -> None:
        told, self.on_low = self.on_low, None
        self._low_mark = self.size
        if told is not None:
            told(self)

    @property
    def statistics(self) -> Statistics:
        """The pool's counters."""
        failed = self._failed, self._biggest_failure, self._allocated_at_biggest_failure
        return Statistics(self.allocated, self.max_allocated, self.size, *failed)

    def reset_statistics(self) -> None:
        """Start counting anew; what is allocated stays."""
        self.max_allocated = self.allocated
        self._failed = self._biggest_failure = self._allocated_at_biggest_failure = 0

    def allocations(self) -> list[Allocation]:
        """Everything that is allocated, by address."""
        return [Allocation(address, *self._used[address]) for address in sorted(self._used)]
