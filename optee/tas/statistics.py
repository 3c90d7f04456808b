"""Stats pseudo TA: what `xtest --stats` shows, as far as the model counts it.

TA_STATS and GET_TIME answer; statistics of allocators (1) and leaks (2) answer NOT_SUPPORTED as in a build
without CFG_WITH_STATS, until core memory is modelled.
"""

from __future__ import annotations

import struct
from uuid import UUID

from optee.abi.results import Result
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, PseudoTa, Steps, TeeError, Value, command

_TA = struct.Struct("<16sII32sQ6I")
"""struct pta_stats_ta: UUID, panicked, sessions, then struct pta_stats_alloc of the TA's heap."""


class Statistics(PseudoTa):
    """TA_STATS and GET_TIME."""

    uuid = UUID("d96a5b40-e2c7-b1af-8794-1002a5d5c61b")

    @command(1, ParamKind.VALUE_INPUT, ParamKind.MEMREF_OUTPUT)
    def allocations(self, tee: Tee, pool: Value, stats: Memref) -> None:
        """Not built in."""
        raise TeeError(Result.NOT_SUPPORTED)

    @command(2)
    def leaks(self, tee: Tee) -> None:
        """Not built in."""
        raise TeeError(Result.NOT_SUPPORTED)

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
