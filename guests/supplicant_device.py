"""The kernel's side of a tee-supplicant: requests to it, and the memory it shares (Linux 6.1 optee/supp.c)."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import trio

from guests.memory import PageAllocator, allocate_buffer
from guests.shm import SharedMemory, SharedMemoryTable
from guests.uninterruptible import Uninterruptible
from hv_models.memory import GuestRam
from optee.abi.results import Result


class ValueParam:
    """A value of a request; the supplicant changes a, b, c of outputs."""

    __slots__ = ("a", "b", "c", "kind")

    def __init__(self, kind: int, a: int, b: int, c: int) -> None:
        self.kind = kind
        self.a = a
        self.b = b
        self.c = c


class MemoryParam:
    """A memory reference of a request: `size` bytes at `offset` of `shm`, which is None for NULL.

    The supplicant sets `size` of an output; direction: 1 in, 2 out, 3 both.
    """

    __slots__ = ("direction", "offset", "shm", "size")

    def __init__(self, direction: int, shm: SharedMemory | None, offset: int, size: int) -> None:
        self.direction = direction
        self.shm = shm
        self.offset = offset
        self.size = size

    def read(self) -> bytes:
        """Copy the bytes. Raises ValueError where they do not lie within the buffer."""
        return b"" if self.shm is None else self.shm.buffer.read(self.offset, self.size)

    def write(self, data: bytes) -> None:
        """Copy bytes in. Raises ValueError where they do not lie within the buffer."""
        if self.shm is not None:
            self.shm.buffer.write(data, self.offset)


RpcParam: TypeAlias = ValueParam | MemoryParam


class SupplicantMemory(Protocol):
    """What the kernel offers to the supplicant process."""

    def allocate(self, size: int) -> int:
        """Share memory of the process with the kernel; return its id. Raises OutOfGuestMemoryError."""
        ...

    def free(self, identifier: int) -> bool:
        """Give it up; False for an unknown id."""
        ...


class SupplicantProcess(Protocol):
    """A tee-supplicant. `guests.supplicant` has the usual one and its slow and misbehaving variants."""

    @property
    def pauses(self) -> bool:
        """Whether `pause` is to be awaited before each request."""
        ...

    def start(self, memory: SupplicantMemory) -> None:
        """The kernel's device was opened."""
        ...

    def stop(self) -> None:
        """The process ends: files are closed, and a `pause` returns at once."""
        ...

    async def pause(self, command: int) -> None:
        """Take the time that this request takes."""
        ...

    def process(self, command: int, params: Sequence[RpcParam]) -> int:
        """Answer one request, changing outputs in place; return a TEE_Result."""
        ...


class SupplicantDevice:
    """/dev/teepriv0: at most one process has it open; without one a request waits for one."""

    def __init__(
        self,
        ram: GuestRam,
        allocator: PageAllocator,
        shms: SharedMemoryTable,
        uninterruptible: Uninterruptible,
    ) -> None:
        self._ram = ram
        self._allocator = allocator
        self._shms = shms
        self._uninterruptible = uninterruptible
        self._process: SupplicantProcess | None = None
        self._opened = trio.Event()
        self._shared: dict[int, SharedMemory] = {}
        self._next = 1
        self.requests = 0

    @property
    def present(self) -> bool:
        """Whether a supplicant runs."""
        return self._process is not None

    def open(self, process: SupplicantProcess) -> None:
        """Start a supplicant. Raises ValueError (EBUSY) if one runs already."""
        if self._process is not None:
            raise ValueError("a supplicant runs already")
        self._process = process
        process.start(self)
        self._opened.set()

    def close(self) -> None:
        """End the supplicant: requests that it still has fail with COMMUNICATION, its own memory is freed."""
        process, self._process = self._process, None
        self._opened = trio.Event()
        if process is not None:
            process.stop()
        for identifier in list(self._shared):
            self.free(identifier)

    async def request(self, command: int, params: Sequence[RpcParam]) -> int:
        """Have a request answered. A signal ends only the wait for a supplicant that is not there."""
        self.requests += 1
        while self._process is None:
            await self._opened.wait()
        process = self._process
        if process.pauses:
            with self._uninterruptible.scope():
                await process.pause(command)
            if self._process is not process:
                return Result.COMMUNICATION
        return process.process(command, params)

    def allocate(self, size: int) -> int:
        """Share `size` bytes of the supplicant's memory (never registered: OP-TEE learns it by SHM_ALLOC)."""
        buffer = allocate_buffer(self._ram, self._allocator, size)
        identifier = self._next
        self._next += 1
        self._shared[identifier] = self._shms.add(buffer)
        return identifier

    def free(self, identifier: int) -> bool:
        """Drop the supplicant's own reference; False for an unknown id."""
        shm = self._shared.pop(identifier, None)
        if shm is not None:
            self._drop(shm)
        return shm is not None

    def take(self, identifier: int) -> SharedMemory | None:
        """Take a reference for OP-TEE; None for an id that the supplicant made up."""
        shm = self._shared.get(identifier)
        if shm is not None:
            shm.references += 1
        return shm

    def put(self, shm: SharedMemory) -> int:
        """Drop OP-TEE's reference; return the id, 0 if the supplicant has given it up already."""
        found = (identifier for identifier, shared in self._shared.items() if shared is shm)
        identifier = next(found, 0)
        self._drop(shm)
        return identifier

    def _drop(self, shm: SharedMemory) -> None:
        shm.references -= 1
        if not shm.references:
            self._shms.discard(shm)
            self._allocator.release(shm.buffer.pages)
