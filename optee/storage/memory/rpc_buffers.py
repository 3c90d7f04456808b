"""Payload buffers of the normal world that outlive a call, so that the next one need not ask for them.

They are the guest's memory: they go back with its last session, when an RPC through one of them failed (its
tee-supplicant may be another one now), and when the collector finds them unused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optee.storage.memory.lru import Clock
from optee.storage.memory.statistics import LevelStatistics

if TYPE_CHECKING:
    from optee.shared_memory import SharedMemory


class RpcBuffers:
    """Up to `limit` buffers that no thread uses."""

    def __init__(self, clock: Clock, limit: int) -> None:
        self.limit = limit
        self.statistics = LevelStatistics()
        self._clock = clock
        self._kept: list[SharedMemory] = []
        self._surplus: list[SharedMemory] = []
        self._used = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._surplus)

    def take(self, size: int) -> SharedMemory | None:
        """The smallest kept buffer of at least `size` bytes."""
        fitting = [shm for shm in self._kept if shm.size >= size]
        if not fitting:
            self.statistics.misses += 1
            return None
        shm = min(fitting, key=lambda shm: shm.size)
        self._kept.remove(shm)
        self.statistics.hits += 1
        self.statistics.gave(shm.size)
        self._used = self._clock.now
        return shm

    def keep(self, shm: SharedMemory) -> bool:
        """Keep a buffer that a call is done with, instead of a smaller one where there are enough."""
        if not self.limit:
            return False
        self._kept.append(shm)
        self.statistics.took(shm.size)
        self._used = self._clock.now
        if len(self._kept) > self.limit:
            self._give_up(min(self._kept, key=lambda shm: shm.size))
        return True

    def give_up(self) -> None:
        """Let all go, at the end of the call."""
        for shm in list(self._kept):
            self._give_up(shm)

    def collect(self, before: int) -> int:
        """Let them go if none was used since: how many."""
        count = len(self._kept) if self._used < before else 0
        if count:
            self.give_up()
        return count

    def surplus(self) -> SharedMemory | None:
        """One to be freed now."""
        return self._surplus.pop() if self._surplus else None

    def _give_up(self, shm: SharedMemory) -> None:
        self._kept.remove(shm)
        self.statistics.gave(shm.size)
        self.statistics.evictions += 1
        self._surplus.append(shm)
