"""Stats pseudo TA: what `xtest --stats` shows.

Source: OP-TEE's stats pseudo TA: commands, ids and names of the pools, struct pta_stats_alloc and pta_stats_ta.
"""

from __future__ import annotations

import struct
from uuid import UUID

from optee.abi.results import Result
from optee.memory.heap import Heap
from optee.memory.pool import Statistics as PoolStatistics
from optee.memory.ta_ram import TaRam
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, PseudoTa, Steps, TeeError, Value, command

_ALLOCATOR = struct.Struct("<32sQ6I")
"""struct pta_stats_alloc: name, sum of squares of the free blocks, then as in `optee.memory.heap.Statistics`."""
_TA = struct.Struct("<16sII32sQ6I")
"""struct pta_stats_ta: UUID, panicked, sessions, then struct pta_stats_alloc of the TA's heap."""
_POOLS = range(1, 6)
"""ALLOC_ID_HEAP, PUBLIC_DDR, TA_RAM, NEXUS_HEAP, RPMB."""
_NO_POOL = {2: "Public DDR (deprecated)", 5: "RPMB secure storage (no data)"}
_EMPTY = PoolStatistics(0, 0, 0, 0, 0, 0)


class Statistics(PseudoTa):
    """Pools of the core, what is allocated, TAs, and times."""

    uuid = UUID("d96a5b40-e2c7-b1af-8794-1002a5d5c61b")

    @command(1, ParamKind.VALUE_INPUT, ParamKind.MEMREF_OUTPUT)
    def allocations(self, tee: Tee, pool: Value, stats: Memref) -> None:
        """Counters of pool `a`, or of all for 0; with `b` they start anew."""
        if pool.a and pool.a not in _POOLS:
            raise TeeError(Result.BAD_PARAMETERS)
        wanted = [pool.a] if pool.a else list(_POOLS)
        stats.size = _ALLOCATOR.size * len(wanted)
        if stats.capacity < stats.size:
            raise TeeError(Result.SHORT_BUFFER)
        stats.put(b"".join(self._record(tee, number, reset=bool(pool.b)) for number in wanted))

    @staticmethod
    def _record(tee: Tee, number: int, *, reset: bool) -> bytes:
        partition = tee.thread.partition
        pools: dict[int, Heap | TaRam] = {1: partition.pools.heap, 3: partition.pools.ta_ram}
        if partition.world.config.virtualization:
            pools[4] = partition.world.nexus.heap
        pool = pools.get(number)
        if pool is None:
            name = _NO_POOL.get(number, "KHeap (disabled)")
            return _ALLOCATOR.pack(name.encode(), 0, *_EMPTY)
        squares = pool.free_squares & 0xFFFF_FFFF_FFFF_FFFF
        record = _ALLOCATOR.pack(pool.name.encode(), squares, *pool.statistics)
        if reset:
            pool.reset_statistics()
        return record

    @command(2)
    def leaks(self, tee: Tee) -> None:
        """Print on the console what is allocated in the core's heap."""
        partition = tee.thread.partition
        for allocation in partition.pools.heap.allocations():
            partition.world.log(f"buffer: {allocation.size} bytes {allocation.owner}")

    @command(3, ParamKind.MEMREF_OUTPUT)
    def tas(self, tee: Tee, stats: Memref) -> None:
        """One record for each user TA instance: panicked, sessions, heap (now, peak, size, failures)."""
        records = b"".join(
            _TA.pack(
                _guid(instance.uuid),
                instance.panicked,
                len(instance.live),
                b"heap",
                0,
                instance.heap_used,
                instance.heap_peak,
                instance.ta.data_size,
                instance.heap_failures,
                instance.heap_biggest_failure,
                instance.heap_used_at_failure,
            )
            for instance in tee.thread.partition.sessions.instances
            if not instance.initializing and not instance.ta.is_pseudo
        )
        stats.put(records)

    @command(4, ParamKind.VALUE_OUTPUT, ParamKind.VALUE_OUTPUT)
    def times(self, tee: Tee, ree: Value, system: Value) -> Steps[None]:
        """The normal world's clock and the counter, in seconds and milliseconds."""
        ree.a, nanoseconds = yield from tee.ree_time()
        ree.b = nanoseconds // 1_000_000
        system.a, system.b = divmod(tee.system_time(), 1000)


def _guid(uuid: UUID) -> bytes:
    """A TEE_UUID as it lies in memory: little endian fields."""
    return uuid.bytes_le
