"""A partition: everything that OP-TEE keeps for one guest.

Source: OP-TEE core behaviour, section 1. Physical memory pools and the list of partitions are shared; all
the rest is banked, so guests never compete for threads, heap, sessions or cookies.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from optee.abi.smc import VmId
from optee.memory.heap import Heap
from optee.sessions import Sessions
from optee.shared_memory import SharedMemoryTable
from optee.storage.guest_storage import GuestStorage
from optee.ta_memory import TaRam
from optee.threads import Thread, ThreadState
from optee.wait_queue import Mutex

if TYPE_CHECKING:
    from optee.secure_world import SecureWorld


class Partition:
    """The state of one guest."""

    def __init__(self, world: SecureWorld, vm_id: VmId, ta_ram: TaRam) -> None:
        config = world.config
        self.world = world
        self.vm_id = vm_id
        self.ta_ram = ta_ram
        self.heap = Heap(config.core_heap_size)
        """The core's heap of this guest (CFG_CORE_HEAP_SIZE)."""
        self.threads = [Thread(self, index) for index in range(config.threads)]
        self.shared_memory = SharedMemoryTable(world.normal_world, config.core_heap_size)
        self.sessions = Sessions(self)
        self.storage = GuestStorage(config, world.random.randbytes, self.heap, vm_id)
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

    def destroy(self) -> None:
        """Forget everything; suspended calls end without a word."""
        for thread in self.threads:
            steps, thread.steps = thread.steps, None
            thread.state = ThreadState.FREE
            if steps is not None:
                with suppress(RuntimeError):  # a TA that suspends again on its way out
                    steps.close()
        for instance in self.sessions.instances:
            if instance.memory is not None:
                instance.memory.free()
                instance.memory = None
