"""Secure threads: each is a generator that runs, sleeps in the normal world, or is free.

Source: OP-TEE core behaviour, sections 3 and 4.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from optee.steps import Steps

if TYPE_CHECKING:
    from optee.normal_world import Window
    from optee.partition import Partition
    from optee.shared_memory import SharedMemory


class ThreadState(IntEnum):
    """FREE -> ACTIVE -> (SUSPENDED <-> ACTIVE)* -> FREE."""

    FREE = 0
    ACTIVE = 1
    SUSPENDED = 2


class Thread:
    """One of the CFG_NUM_THREADS threads of a guest."""

    __slots__ = (
        "in_rpc",
        "index",
        "partition",
        "payloads",
        "recursion",
        "rpc_argument",
        "rpc_buffer",
        "state",
        "steps",
    )

    def __init__(self, partition: Partition, index: int) -> None:
        self.partition = partition
        self.index = index
        self.state = ThreadState.FREE
        self.steps: Steps[int] | None = None
        self.in_rpc = False
        """Suspended by an RPC of its own, not by a foreign interrupt."""
        self.rpc_argument: Window | None = None
        """Where the RPC argument is: behind the message, or in `rpc_buffer`."""
        self.rpc_buffer: SharedMemory | None = None
        """The RPC argument got by RPC ALLOC; the SHM cache keeps it over the end of the call."""
        self.payloads: dict[str, SharedMemory] = {}
        """RPC payload buffers by user (file system, ...): they grow, and go at the end of the call."""
        self.recursion = 0
        """TA to TA calls inside each other."""
