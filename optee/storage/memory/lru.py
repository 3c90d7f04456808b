"""Entries of which the least recently used one goes first, and never one that somebody uses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from optee.storage.memory.statistics import LevelStatistics

K = TypeVar("K")


class Clock:
    """The machine's counter in milliseconds, as of the last entry of a yielding call."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class Entry:
    """What a level keeps."""

    __slots__ = ("references", "used")

    def __init__(self) -> None:
        self.references = 0
        """Users; with any the entry stays."""
        self.used = 0
        """When it was last looked up, in milliseconds."""


E = TypeVar("E", bound=Entry)


class Lru(Generic[K, E]):
    """A level: at most `capacity` entries by key."""

    def __init__(self, clock: Clock, capacity: int, statistics: LevelStatistics) -> None:
        self.capacity = capacity
        self.statistics = statistics
        self._clock = clock
        self._entries: OrderedDict[K, E] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: K) -> E | None:
        """An entry, which thereby is the most recently used one."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.used = self._clock.now
            self._entries.move_to_end(key)
        return entry

    def insert(self, key: K, entry: E) -> None:
        """Keep an entry; one that had its key goes. The caller has seen to it that there is room."""
        self.discard(key)
        entry.used = self._clock.now
        self._entries[key] = entry

    def discard(self, key: K) -> None:
        """Forget an entry, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._drop(entry)

    def make_room(self) -> bool:
        """Let the least recently used entry go that nobody uses; False if all are in use."""
        for key, entry in self._entries.items():
            if not entry.references:
                self._evict(key)
                return True
        return False

    def collect(self, budget: int, before: int, short: Callable[[], bool]) -> tuple[int, bool]:
        """Let entries go that were last used before that time, or while memory is `short`.

        Looks at `budget` entries at most: how many it was, and whether the level is done with.
        """
        examined = 0
        for _ in range(len(self._entries)):
            if examined == budget:
                return examined, False
            key, entry = next(iter(self._entries.items()))
            if entry.used >= before and not short():
                break
            examined += 1
            if entry.references:
                self._entries.move_to_end(key)
            else:
                self._evict(key)
        return examined, True

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._entries):
            self.discard(key)

    def _evict(self, key: K) -> None:
        self.statistics.evictions += 1
        self.discard(key)

    def _drop(self, entry: E) -> None:
        """An entry is gone: release its memory."""
