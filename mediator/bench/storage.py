"""Secure storage from a client to the guest's files and back: RPC round trips and time, without and with caches."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from shutil import copytree
from statistics import median
from time import perf_counter_ns
from typing import Any, Final

import trio

from guests import Direction, Guest, Partial, Session, SharedMemory, Supplicant, Temporary, Value, Values
from mediator.board import Board
from mediator.core.policy import Policy
from optee.config import Config
from optee.storage.layout import BLOCK_SIZE
from optee.storage.options import OPTEE, StorageMemory, StorageOptions
from optee.storage.registry import DataFlag
from optee.tas.secure_storage_test import StorageTest

STORAGE: Final = "storage"
KIB: Final = 1024
LARGEST: Final = 1024 * KIB
"""Bytes of the large object; fewer batches make it smaller."""
OBJECTS: Final = 100
"""Objects that are enumerated; fewer batches make it fewer."""
WORTH: Final = 0.9
"""The advice is the smallest size that saves so much of what the best one saves."""
_PER_BATCH: Final = 16 * KIB
_ROUNDS: Final = 32
_WRITES: Final = 2  # in each round of a point of the sweep: committed writes of 1 KiB
_HOT_READS: Final = 8
_SMALL_OBJECTS: Final = 20
_FLAGS: Final = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META
_PRIVATE: Final = 1
_IN, _OUT = Direction.INPUT, Direction.OUTPUT
_MANAGED: Final = StorageOptions(StorageMemory.MANAGED)

Step = Callable[["Client"], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operation took: RPC round trips, and microseconds (the median)."""

    name: str
    what: str
    memory: str
    rpcs: float
    us: float


@dataclass(frozen=True, slots=True)
class Point:
    """One size of one level: bytes charged to the core's heap at the end, RPC round trips of each pattern of use."""

    option: str
    size: int
    charged: int
    rpcs: dict[str, int]


@dataclass(frozen=True, slots=True)
class Advice:
    """The smallest size of a level worth having for a pattern of use; `saved`: share of the RPCs without the level."""

    option: str
    pattern: str
    size: int
    charged: int
    saved: float

    def __str__(self) -> str:
        if not self.size:
            return f"{self.pattern}: {self.option}=0, it saves nothing"
        return (
            f"{self.pattern}: {self.option}={self.size} saves {self.saved:.0%} of the RPCs "
            f"for {self.charged // KIB} KiB of heap"
        )


@dataclass(slots=True)
class StorageBench:
    """All that was measured. `rounds`: how often operations were repeated that are quick."""

    object_bytes: int
    objects: int
    rounds: int
    costs: list[Cost] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    """Record of the memory manager after all operations."""
    sweep: list[Point] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)

    @property
    def hit_rates(self) -> dict[str, float]:
        """Of each level that was asked."""
        rates = {name: level["hit_rate"] for name, level in self.statistics["levels"].items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def of(self, name: str, memory: str) -> Cost:
        """One of the costs."""
        return next(cost for cost in self.costs if (cost.name, cost.memory) == (name, memory))

    def saved(self, name: str) -> float:
        """Share of the RPC round trips that `managed` saves."""
        plain = self.of(name, StorageMemory.OPTEE).rpcs
        return 1 - self.of(name, StorageMemory.MANAGED).rpcs / plain if plain else 0.0

    def faster(self, name: str) -> float:
        """How many times faster `managed` is."""
        return self.of(name, StorageMemory.OPTEE).us / self.of(name, StorageMemory.MANAGED).us

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "object_bytes": self.object_bytes,
            "objects": self.objects,
            "operations": [
                asdict(cost) | {"rpcs": round(cost.rpcs, 2), "us": round(cost.us, 1)} for cost in self.costs
            ],
            "gains": [
                {"name": name, "rpcs_saved": round(self.saved(name), 4), "times_faster": round(self.faster(name), 2)}
                for name in dict.fromkeys(cost.name for cost in self.costs)
            ],
            "hit_rates": self.hit_rates,
            "statistics": self.statistics,
            "sweep": [asdict(point) for point in self.sweep],
            "advice": [asdict(advice) | {"saved": round(advice.saved, 4)} for advice in self.advice],
        }


class Client:
    """A session with the storage test TA, shared memory for the data, and what the guest counted."""

    def __init__(self, guest: Guest, session: Session, memory: SharedMemory) -> None:
        self._guest = guest
        self._session = session
        self._memory = memory

    @property
    def rpcs(self) -> int:
        """RPC commands so far."""
        return self._guest.driver.statistics().rpc_commands

    async def create(self, name: bytes, data: bytes, flags: int = _FLAGS | DataFlag.OVERWRITE) -> int:
        """Create an object: its handle."""
        place = Value(0, _PRIVATE, direction=_IN)
        outputs = await self._session.invoke(4, _bytes(name), Value(flags), place, _bytes(data))
        return _second(outputs[1])

    async def open(self, name: bytes) -> int:
        """Open an object: its handle."""
        outputs = await self._session.invoke(0, _bytes(name), Value(_FLAGS), Value(_PRIVATE, 0, direction=_IN))
        return _second(outputs[1])

    async def close(self, handle: int) -> None:
        """Close a handle."""
        await self._session.invoke(1, Value(handle, direction=_IN))

    async def seek(self, handle: int, offset: int) -> None:
        """Go to a place."""
        await self._session.invoke(5, Value(handle, offset, direction=_IN), Value(0, direction=_IN))

    async def read(self, handle: int, size: int) -> None:
        """Read so many bytes."""
        await self._session.invoke(2, Partial(self._memory, 0, size, _OUT), Value(handle))

    async def write(self, handle: int, data: bytes) -> None:
        """Write, and commit."""
        self._memory.write(data)
        await self._session.invoke(3, Partial(self._memory, 0, len(data), _IN), Value(handle, direction=_IN))

    async def read_inside(self, handle: int, size: int, piece: int) -> None:
        """Let the TA read so many bytes in pieces."""
        await self._session.invoke(26, Value(handle, direction=_IN), Value(size, piece, direction=_IN))

    async def write_inside(self, handle: int, size: int, piece: int) -> None:
        """Let the TA write so many bytes in pieces, each committed."""
        await self._session.invoke(27, Value(handle, direction=_IN), Value(size, piece, direction=_IN))

    async def enumerate(self, count: int) -> None:
        """Go through all objects of the TA, of which there are `count`."""
        number = _first((await self._session.invoke(9, Value(direction=_OUT)))[0])
        await self._session.invoke(12, Value(number, _PRIVATE, direction=_IN))
        for _ in range(count):
            name = Temporary(size=64, direction=_OUT)
            await self._session.invoke(13, Value(number, direction=_IN), Value(direction=_OUT), name)
        await self._session.invoke(10, Value(number, direction=_IN))


def _bytes(data: bytes) -> Temporary:
    return Temporary(data, direction=_IN)


def _first(output: object) -> int:
    assert isinstance(output, Values)
    return output.a


def _second(output: object) -> int:
    assert isinstance(output, Values)
    return output.b


@asynccontextmanager
async def _client(policy: Policy, options: StorageOptions, directory: Path) -> AsyncIterator[tuple[Board, Client]]:
    async with (
        Board(policy, Config(storage=options), check=False) as board,
        board.guest("kvm", supplicant=Supplicant(storage=directory)) as guest,
        guest.context() as context,
        await context.open_session(StorageTest.uuid) as session,
        await context.allocate(LARGEST) as memory,
    ):
        yield board, Client(guest, session, memory)


def measure_storage(policy: Policy, batches: int) -> StorageBench:
    """Measure all of it, on boards of their own with real files."""
    size = min(LARGEST, batches * _PER_BATCH)
    done = StorageBench(size, max(2, min(OBJECTS, batches)), min(_ROUNDS, batches))

    async def main(root: Path) -> None:
        await _prepare(policy, root / "prepared", done)
        for options in (OPTEE, _MANAGED):
            directory = root / options.memory
            copytree(root / "prepared", directory)
            async with _client(policy, options, directory) as (board, client):
                await _operations(done, str(options.memory), client)
                if options is _MANAGED:
                    (vm,) = board.machine.vms.values()
                    memory = board.model.storage_memory(vm.client_id)
                    assert memory is not None
                    done.statistics = memory.as_data()
        await _sweep(policy, root, done)

    with tempfile.TemporaryDirectory(prefix="mediator-bench-") as name:
        trio.run(main, Path(name))
    done.advice = advise(done.sweep)
    return done


async def _prepare(policy: Policy, directory: Path, done: StorageBench) -> None:
    """Make a store with the large object and the small ones, which either mode then opens."""
    async with _client(policy, _MANAGED, directory) as (_, client):
        await client.close(await client.create(b"large", bytes(done.object_bytes)))
        for number in range(1, done.objects):
            await client.close(await client.create(b"object %d" % number, b"data"))


async def _operations(done: StorageBench, memory: str, client: Client) -> None:
    size = done.object_bytes

    async def measured(name: str, what: str, step: Step, rounds: int = done.rounds, per: int = 1) -> None:
        taken, before = [], client.rpcs
        for _ in range(rounds):
            start = perf_counter_ns()
            await step(client)
            taken.append((perf_counter_ns() - start) / 1000 / per)
        done.costs.append(Cost(name, what, memory, (client.rpcs - before) / rounds / per, median(taken)))

    async def create(client: Client) -> None:
        await client.close(await client.create(b"fresh", bytes(KIB)))

    async def reopen(client: Client) -> None:
        await client.close(await client.open(b"large"))

    async def read(client: Client) -> None:
        handle = await client.open(b"large")
        await client.read(handle, size)
        await client.close(handle)

    async def read_on(client: Client) -> None:
        handle = await client.open(b"large")
        for _ in range(size // KIB):
            await client.read(handle, KIB)
        await client.close(handle)

    async def rewrite(client: Client) -> None:
        handle = await client.open(b"large")
        for number in range(size // KIB):
            await client.write(handle, bytes([number & 255]) * KIB)
        await client.close(handle)

    async def read_inside(client: Client) -> None:
        handle = await client.open(b"large")
        await client.read_inside(handle, size, KIB)
        await client.close(handle)

    async def write_inside(client: Client) -> None:
        handle = await client.open(b"large")
        await client.write_inside(handle, size, KIB)
        await client.close(handle)

    whole = f"{size // KIB} KiB"
    await measured("read-first", f"open, read {whole}, close, for the first time", read, rounds=1)
    await measured("open", f"open and close an object of {whole}", reopen)
    await measured("read-again", f"open, read {whole}, close, again", read)
    await measured("read-again-1k", f"the same in pieces of 1 KiB, each of {whole}", read_on, 1, size // KIB)
    await measured("rewrite", f"write 1 KiB and commit, each of {whole}", rewrite, 1, size // KIB)
    await measured("read-inside", f"xtest benchmark 1002: one call, {whole} read in pieces of 1 KiB", read_inside, 1)
    await measured(
        "write-inside", f"xtest benchmark 1001: one call, {whole} written so, each committed", write_inside, 1
    )
    await measured("enumerate", f"enumerate {done.objects} objects", lambda client: client.enumerate(done.objects), 1)
    await measured("create", "create an object of 1 KiB, over one of that name", create)


async def _sweep(policy: Policy, root: Path, done: StorageBench) -> None:
    blocks = done.object_bytes // BLOCK_SIZE + 1
    wide = blocks + 64
    sizes = {
        "CFG_BLOCK_CACHE_SIZE": {0, *(max(1, blocks * part // 8) for part in (1, 2, 4, 6)), blocks + 4, wide},
        "CFG_TEE_POBJ_CACHE_SIZE": {0, 1, 2, _SMALL_OBJECTS // 2, _SMALL_OBJECTS + 1},
        "CFG_HTREE_NODE_COUNT": {0, blocks // 4, blocks // 2, blocks + 8},
    }
    widest = {"CFG_BLOCK_CACHE_SIZE": wide, "CFG_TEE_POBJ_CACHE_SIZE": 128, "CFG_HTREE_NODE_COUNT": 2 * wide}
    for name, values in sizes.items():
        for value in sorted(values):
            directory = root / f"{name}-{value}"
            copytree(root / "prepared", directory)
            options = StorageOptions.parse({"memory": "managed"} | widest | {name: value})
            async with _client(policy, options, directory) as (board, client):
                rpcs = await _patterns(done, client)
                (vm,) = board.machine.vms.values()
                memory = board.model.storage_memory(vm.client_id)
                assert memory is not None
                done.sweep.append(Point(name, value, memory.charged, rpcs))


async def _patterns(done: StorageBench, client: Client) -> dict[str, int]:
    """RPC round trips of patterns of use, each once to fill the caches, then counted.

    Reading the large object from end to end; reads of 1 KiB of it, four of five in a fifth of it; committed writes of
    1 KiB all over it; opening and reading small objects in turn.
    """
    size = done.object_bytes
    blocks = size // BLOCK_SIZE
    choose = Random(0)

    async def again(client: Client) -> None:
        handle = await client.open(b"large")
        await client.read(handle, size)
        await client.close(handle)

    async def hot(client: Client) -> None:
        handle = await client.open(b"large")
        for _ in range(_HOT_READS * done.rounds):
            block = choose.randrange(max(1, blocks // 5)) if choose.random() < 0.8 else choose.randrange(blocks)
            await client.seek(handle, block * BLOCK_SIZE)
            await client.read(handle, KIB)
        await client.close(handle)

    async def commits(client: Client) -> None:
        handle = await client.open(b"large")
        for _ in range(_WRITES * done.rounds):
            await client.seek(handle, choose.randrange(size // KIB) * KIB)
            await client.write(handle, bytes(KIB))
        await client.close(handle)

    async def many(client: Client) -> None:
        for number in range(1, min(done.objects, _SMALL_OBJECTS + 1)):
            handle = await client.open(b"object %d" % number)
            await client.read(handle, 4)
            await client.close(handle)

    patterns: Mapping[str, Step] = {
        "reading again": again,
        "a hot fifth": hot,
        "commits": commits,
        "small objects": many,
    }
    counted = {}
    for name, step in patterns.items():
        await step(client)
        before = client.rpcs
        await step(client)
        counted[name] = client.rpcs - before
    return counted


def advise(sweep: list[Point]) -> list[Advice]:
    """For each level and pattern, the smallest size that saves `WORTH` of what the best size saves.

    A level whose best size saves less than a twentieth of a pattern's RPCs is not worth a size.
    """
    found = []
    for option in dict.fromkeys(point.option for point in sweep):
        points = sorted((point for point in sweep if point.option == option), key=lambda point: point.size)
        base = points[0]
        for pattern, without in base.rpcs.items():
            saved = {point.size: 1 - point.rpcs[pattern] / without if without else 0.0 for point in points}
            best = max(saved.values())
            wanted = base if best < 0.05 else next(p for p in points if saved[p.size] >= WORTH * best)
            found.append(Advice(option, pattern, wanted.size, wanted.charged - base.charged, saved[wanted.size]))
    return found
