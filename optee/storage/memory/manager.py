"""The memory manager of one guest: its levels, all charged to the core's heap, and the record of what they did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Protocol

from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.storage.memory.blocks import BlockCache
from optee.storage.memory.buffers import CLASSES, Buffers
from optee.storage.memory.collector import PASS_BOUND, Collector
from optee.storage.memory.lru import Clock
from optee.storage.memory.nodes import NodeCache
from optee.storage.memory.objects import ObjectCache
from optee.storage.memory.pool import Pool
from optee.storage.memory.rpc_buffers import RpcBuffers
from optee.storage.memory.rpmb import RpmbCache
from optee.storage.memory.statistics import LevelStatistics
from optee.storage.options import StorageOptions

_OWNER: Final = "storage memory"
_STAGING: Final = (4, 4, 2)
"""Buffers of each size class beside the cached blocks: what one operation needs at once, for two operations."""


class OpenFile(Protocol):
    """A file that a handle has open."""

    alone: bool


class MemoryManager:
    """Levels by name, their collector and their statistics."""

    def __init__(self, options: StorageOptions, heap: Heap, guest: int) -> None:
        self.options = options
        self.clock = Clock()
        self._heap = heap
        owner = Owner(_OWNER, guest)
        reserve = heap.size * options.gc_memory_threshold // 100
        places = bool(options.leak_detection)
        small, blocks, large = _STAGING
        limits = (small, blocks + options.block_cache_size, large)
        self.buffers = Buffers(heap, owner, limits, reserve=reserve, places=places)
        self.blocks = BlockCache(self.clock, options.block_cache_size, self.buffers)
        self.nodes = NodeCache(self.clock, heap, owner, options.htree_node_count, reserve=reserve, places=places)
        self.objects = ObjectCache(self.clock, heap, owner, options.object_cache_size, reserve=reserve, places=places)
        self.rpmb = RpmbCache(self.clock, heap, owner, options.rpmb_fs_cache_entries, reserve=reserve, places=places)
        self.rpc_buffers = RpcBuffers(self.clock, options.rpc_buffer_count)
        phases = (
            self.objects.collect,
            self.blocks.collect,
            self.nodes.collect,
            self.rpmb.collect,
            self._collect_buffers,
            self._coalesce,
        )
        self.collector = Collector(
            self.clock, heap, phases, self._freed, interval=options.gc_interval_ms, reserve=reserve
        )
        self.open_files: dict[str, list[OpenFile]] = {}
        """By name."""
        self.returned = 0
        """Bytes of slabs that the collector gave back to the heap."""
        heap.reclaim = self.reclaim

    @property
    def _pools(self) -> dict[str, Pool]:
        sizes = {f"{size >> 10} KiB buffers": pool for size, pool in zip(CLASSES, self.buffers.pools, strict=True)}
        return {**sizes, "nodes": self.nodes.pool, "objects": self.objects.pool, "rpmb": self.rpmb.pool}

    def reclaim(self, size: int) -> bool:
        """The heap could not give `size` bytes: let everything go that can, until it can."""
        for _ in range(2):  # the first round may have begun before memory was short
            while True:
                ended = self.collector.run(lambda: True)
                if self._heap.largest_free >= size:
                    return True
                if ended:
                    break
        return False

    def closed(self, name: str, file: OpenFile) -> None:
        """A file is not open any more, if it was."""
        files = self.open_files.get(name, [])
        if file in files:
            files.remove(file)
            if not files:
                del self.open_files[name]

    def _collect_buffers(self, budget: int, before: int, short: Callable[[], bool]) -> tuple[int, bool]:
        return min(self.rpc_buffers.collect(self.clock.now + 1 if short() else before), budget), True

    def _coalesce(self, budget: int, before: int, short: Callable[[], bool]) -> tuple[int, bool]:
        looked = 0
        for pool in self._pools.values():
            slabs, gained = pool.trim(budget - looked, keep=0 if short() else 1)
            looked += slabs
            self.returned += gained
        return looked, looked < budget

    def _freed(self) -> int:
        levels = (self.objects, self.blocks, self.nodes, self.rpmb)
        return sum(level.statistics.freed for level in levels)

    @property
    def levels(self) -> dict[str, LevelStatistics]:
        """Statistics of each level by name."""
        return {
            "objects": self.objects.statistics,
            "blocks": self.blocks.statistics,
            "nodes": self.nodes.statistics,
            "rpmb": self.rpmb.statistics,
            "rpc_buffers": self.rpc_buffers.statistics,
        }

    @property
    def charged(self) -> int:
        """Bytes of the core's heap."""
        pools = self.nodes.pool, self.objects.pool, self.rpmb.pool
        return self.buffers.charged + sum(pool.charged for pool in pools)

    @property
    def bound(self) -> int:
        """The most that `charged` can be, by the configured sizes."""
        return sum(pool.bound for pool in self._pools.values())

    def numbers(self) -> dict[str, int]:
        """The record in short: bytes, entries of each level now, and sums over all levels."""
        levels, collected = self.levels.values(), self.collector.statistics
        return {
            "charged": self.charged,
            "bound": self.bound,
            "objects": len(self.objects),
            "blocks": len(self.blocks),
            "nodes": len(self.nodes.pool),
            "rpc_buffers": len(self.rpc_buffers),
            "hits": sum(level.hits for level in levels),
            "misses": sum(level.misses for level in levels),
            "evictions": sum(level.evictions for level in levels),
            "collections": collected.collections,
            "longest_pass": collected.longest_pass,
            "collected": collected.bytes,
            "wrong_releases": self.wrong_releases,
        }

    @property
    def wrong_releases(self) -> int:
        """Double and foreign ones, which were ignored."""
        pools = self._pools.values()
        return self.buffers.double_releases + sum(pool.double_releases + pool.foreign_releases for pool in pools)

    def held(self) -> dict[str, int]:
        """Places of allocation of what is held now, and how many; empty without leak detection."""
        found: Counter[str] = Counter()
        for pool in self._pools.values():
            found.update((pool.places or {}).values())
        found.update((self.buffers.direct_places or {}).values())
        return dict(found)

    def clear(self) -> None:
        """Let go everything that nobody uses."""
        self.objects.clear()
        self.blocks.clear()
        self.nodes.clear()
        self.rpmb.clear()
        self.rpc_buffers.give_up()

    def close(self) -> None:
        """Give the heap back everything that nobody uses: the guest ends."""
        self.clear()
        for pool in self._pools.values():
            pool.trim(pool.limit, keep=0)

    def as_data(self) -> dict[str, Any]:
        """The record, for JSON."""
        pools = self._pools
        return {
            "options": self.options.as_data(),
            "charged": self.charged,
            "bound": self.bound,
            "levels": {
                **{name: statistics.as_data() for name, statistics in self.levels.items()},
                **{name: pool.statistics.as_data() for name, pool in pools.items() if "buffers" in name},
                "direct buffers": self.buffers.direct.as_data(),
            },
            "fragmentation": {name: round(pool.fragmentation, 4) for name, pool in pools.items()},
            "blocks_filled": self.blocks.filled,
            "blocks_written": self.blocks.written_back,
            "bytes_copied": self.blocks.copied,
            "returned": self.returned,
            "double_releases": sum(pool.double_releases for pool in pools.values()) + self.buffers.double_releases,
            "foreign_releases": sum(pool.foreign_releases for pool in pools.values()),
            "collector": asdict(self.collector.statistics) | {"bound": PASS_BOUND},
            "held": self.held(),
        }
