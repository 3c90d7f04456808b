"""A partition: everything that OP-TEE keeps for one guest.

Source: OP-TEE core behaviour, section 1. Physical memory pools and the list of partitions are shared; all
the rest is banked, so guests never compete for threads, heap, sessions or cookies.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from optee.abi.smc import VmId
from optee.memory.pool import Allocation
from optee.memory.pools import GuestPools
from optee.sessions import Sessions
from optee.shared_memory import SharedMemoryTable
from optee.storage.guest_storage import GuestStorage
from optee.threads import Thread, ThreadState
from optee.wait_queue import Mutex

if TYPE_CHECKING:
    from optee.secure_world import SecureWorld


class Partition:
    """The state of one guest."""

    def __init__(self, world: SecureWorld, vm_id: VmId, pools: GuestPools) -> None:
        config = world.config
        self.world = world
        self.vm_id = vm_id
        self.pools = pools
        """Heap, TA RAM and translation tables of this guest."""
        self.threads = [Thread(self, index) for index in range(config.threads)]
        self.shared_memory = SharedMemoryTable(world.normal_world, pools)
        self.sessions = Sessions(self)
        self.storage = GuestStorage(config, world.random.randbytes, pools.heap, vm_id)
        self.scratch_pool = Mutex()
        """Held while a thread works with big numbers: 46 KiB, enough for one at a time."""
        self.shm_cache = False
        """RPC arguments outlive their calls (ENABLE_SHM_CACHE)."""
        self.notifications = 0
        """Bitmap of asynchronous notification values that are pending."""
        self.notifications_started = False
        self.runtime = Mutex()
        self.runtime_ready = False
        """The first yielding call of a guest initialises the TEE's runtime."""

    def free_thread(self) -> Thread | None:
        """The free thread with the lowest index."""
        for thread in self.threads:
            if not thread.state:
                return thread
        return None

    def threads_held(self) -> int:
        """Threads that are not FREE."""
        return sum(thread.state is not ThreadState.FREE for thread in self.threads)

    def destroy(self) -> list[Allocation]:
        """Forget everything; suspended calls end without a word.

        Returns what is left of the guest's memory although nobody holds it; nothing for a guest that was cut off, of
        which everything goes at once.
        """
        orderly = not (self.threads_held() or self.sessions.open or any(True for _ in self.shared_memory))
        for thread in self.threads:
            steps, thread.steps = thread.steps, None
            thread.state = ThreadState.FREE
            if steps is not None:
                with suppress(RuntimeError):  # a TA that suspends again on its way out
                    steps.close()
        for instance in self.sessions.instances:
            orderly = orderly and not instance.handles
            instance.free_memory()
        if self.storage.memory is not None:
            self.storage.memory.close()
        if not orderly:
            return []
        if self.storage.memory is not None:  # what it caches is not lost
            self.storage.memory.reclaim(self.pools.heap.size)
        return self.pools.left()
