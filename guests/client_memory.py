"""Shared memory as a client sees it.

Source: GlobalPlatform TEE Client API Specification 1.0, section 4.3 (TEEC_SharedMemory).
"""

from collections.abc import Callable
from enum import IntEnum
from types import TracebackType
from typing import Self

import trio

from guests.driver import Driver
from guests.shm import SharedMemory as KernelMemory


class Direction(IntEnum):
    """Which way data goes, as the client sees it."""

    INPUT = 1
    OUTPUT = 2
    INOUT = 3


class SharedMemory:
    """A buffer that the client and TAs share, allocated or registered (TEEC_SharedMemory)."""

    def __init__(
        self,
        driver: Driver,
        forget: Callable[["SharedMemory"], None],
        shm: KernelMemory,
        size: int,
        direction: Direction,
        *,
        allocated: bool,
    ) -> None:
        self._driver = driver
        self._forget = forget
        self._shm: KernelMemory | None = shm
        self._allocated = allocated
        self._users = 0
        self._unused: trio.Event | None = None
        """Set when nobody uses it any more; there is one once somebody waits for that."""
        self.direction = direction
        self.size = size

    @property
    def kernel_memory(self) -> KernelMemory:
        """The driver's object. Raises ValueError after `release`."""
        if self._shm is None:
            raise ValueError("this shared memory has been released")
        return self._shm

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy bytes out; to the end unless `size` says less. Raises ValueError outside the buffer."""
        return self.kernel_memory.buffer.read(offset, self.size - offset if size is None else size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Copy bytes in. Raises ValueError outside the buffer."""
        self.kernel_memory.buffer.write(data, offset)

    def begin_use(self) -> None:
        """Keep the memory until `end_use`: an operation names it."""
        self._users += 1

    def end_use(self) -> None:
        """Note that an operation is over."""
        self._users -= 1
        if not self._users and self._unused is not None:
            self._unused.set()

    async def release(self) -> None:
        """Take the memory back (TEEC_ReleaseSharedMemory): waits for operations that use it; twice is allowed.

        As in Linux, whose operations hold references: UNREGISTER_SHM is sent when none is left. Its cookie may be
        another buffer's at once.
        """
        shm, self._shm = self._shm, None
        if shm is None:
            return
        self._forget(self)
        driver = self._driver
        if self._users:
            self._unused = trio.Event()
            with driver.uninterruptible.scope():
                await self._unused.wait()
        await driver.uninterruptible.finish(lambda: driver.unregister(shm))
        if self._allocated:
            driver.allocator.release(shm.buffer.pages)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release()
