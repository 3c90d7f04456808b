"""Secure storage with the memory manager: the same answers with fewer RPCs, within bounds, and nothing left behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from guests.rpmb import RpmbDevice
from optee.abi.results import Result
from optee.abi.rpc import FsOperation, RpcCommand
from optee.errors import TeeError
from optee.memory.pool import Owner
from optee.storage.memory.collector import PASS_BOUND
from optee.storage.options import StorageMemory, StorageOptions
from optee.storage.registry import DataFlag
from optee.tas.secure_storage_test import StorageTest
from tests.storage import independent
from tests.storage.rig import ALL, MANAGED, READ_WRITE, RPMB, SHARED_READ, Client, Disk, StorageError, StorageRig

MIB = 1 << 20
SHARED = SHARED_READ | DataFlag.SHARE_WRITE
NAMES = st.sampled_from([b"", b"a", b"b"])
FLAGS = st.sampled_from([ALL, READ_WRITE, SHARED_READ, SHARED, SHARED | DataFlag.ACCESS_WRITE])
SIZES = st.one_of(st.sampled_from([0, 1, 4072, 4096, 20000]), st.integers(0, 30000))
WHO = st.integers(0, 5)
WHICH = st.integers(0, 5)


class SameAnswers(RuleBasedStateMachine):
    """One machine without and one with the memory manager, each with two guests and three sessions in each.

    Handles may share objects in every way. An answer may be a panic: then the session is opened anew.
    """

    @initialize(
        objects=st.sampled_from([0, 1, 32]),
        blocks=st.sampled_from([0, 1, 4, 64]),
        nodes=st.sampled_from([0, 3, 128]),
        buffers=st.integers(0, 2),
    )
    def start(self, objects: int, blocks: int, nodes: int, buffers: int) -> None:
        options = replace(
            MANAGED,
            object_cache_size=objects,
            block_cache_size=blocks,
            htree_node_count=nodes,
            rpc_buffer_count=buffers,
            gc_interval_ms=20,
        )
        self.rigs = [StorageRig(), StorageRig(storage=options)]
        self.clients: list[list[Client]] = []
        self.live: list[list[int]] = [[] for _ in range(6)]
        """Handles of each session."""
        for rig in self.rigs:
            clients = [rig.session() for _ in range(3)]
            rig.add_guest()
            self.clients.append([*clients, *(rig.session() for _ in range(3))])

    def both(self, who: int, call: Callable[[Client], object]) -> object:
        """The answer of both machines."""
        answers: list[object] = []
        for clients in self.clients:
            try:
                answers.append(call(clients[who]))
            except StorageError as error:
                answers.append(error.result)
                if error.result == Result.TARGET_DEAD:
                    clients[who].close_session()
                    clients[who] = clients[who].rig.session()
        assert answers[0] == answers[1]
        if answers[0] == Result.TARGET_DEAD:
            self.live[who].clear()
        return answers[0]

    def get(self, who: int, call: Callable[[Client], object]) -> None:
        """A call that may answer a handle."""
        handle = self.both(who, call)
        if not isinstance(handle, Result):
            self.live[who].append(handle)

    def use(self, who: int, which: int, call: Callable[[Client, int], object], *, ends: bool = False) -> None:
        """A call on a handle."""
        live = self.live[who]
        if not live:
            return
        handle = live[which % len(live)]
        answer = self.both(who, lambda client: call(client, handle))
        if handle in live and (ends or answer == Result.CORRUPT_OBJECT):
            live.remove(handle)

    @rule(who=WHO, name=NAMES, size=SIZES, byte=st.integers(1, 255), flags=FLAGS, over=st.booleans())
    def create(self, who: int, name: bytes, size: int, byte: int, flags: int, over: bool) -> None:
        flags |= DataFlag.OVERWRITE if over else 0
        self.get(who, lambda client: client.create(name, bytes([byte]) * size, flags))

    @rule(who=WHO, name=NAMES, flags=FLAGS)
    def open(self, who: int, name: bytes, flags: int) -> None:
        self.get(who, lambda client: client.open(name, flags))

    @rule(who=WHO, which=WHICH, size=SIZES)
    def read(self, who: int, which: int, size: int) -> None:
        self.use(who, which, lambda client, handle: client.read(handle, size))

    @rule(who=WHO, which=WHICH, size=SIZES, byte=st.integers(1, 255))
    def write(self, who: int, which: int, size: int, byte: int) -> None:
        self.use(who, which, lambda client, handle: client.write(handle, bytes([byte]) * size))

    @rule(who=WHO, which=WHICH, offset=st.integers(0, 30000))
    def seek(self, who: int, which: int, offset: int) -> None:
        self.use(who, which, lambda client, handle: client.seek(handle, offset))

    @rule(who=WHO, which=WHICH, size=SIZES)
    def truncate(self, who: int, which: int, size: int) -> None:
        self.use(who, which, lambda client, handle: client.truncate(handle, size))

    @rule(who=WHO, which=WHICH, name=NAMES)
    def rename(self, who: int, which: int, name: bytes) -> None:
        self.use(who, which, lambda client, handle: client.rename(handle, name))

    @rule(who=WHO, which=WHICH)
    def info(self, who: int, which: int) -> None:
        self.use(who, which, lambda client, handle: client.info(handle))

    @rule(who=WHO, which=WHICH)
    def close(self, who: int, which: int) -> None:
        self.use(who, which, lambda client, handle: client.close(handle), ends=True)

    @rule(who=WHO, which=WHICH)
    def unlink(self, who: int, which: int) -> None:
        self.use(who, which, lambda client, handle: client.unlink(handle), ends=True)

    @rule(who=WHO)
    def enumerate(self, who: int) -> None:
        self.both(who, lambda client: client.enumerate())

    @rule(milliseconds=st.integers(1, 300))
    def wait(self, milliseconds: int) -> None:
        for rig in self.rigs:
            rig.world.slept(milliseconds)

    def teardown(self) -> None:
        plain, managed = self.rigs
        for clients in self.clients:
            for client in clients:
                client.close_session()
        for vm in (1, 2):
            plain.vm = managed.vm = vm
            assert not managed.disk.open_files
            assert not managed.supplicant.buffers, "the guest has its memory back"
            for rig in self.rigs:
                if "dirf.db" not in rig.disk.files:
                    rig.disk.files.clear()
            stored = [independent.read(rig.disk.snapshot()).by_id if rig.disk.files else {} for rig in self.rigs]
            assert stored[0] == stored[1]
            check(managed)


def check(rig: StorageRig) -> None:
    """Nothing was kept beyond the bounds, nothing is held by nobody, and no secret stays in free memory."""
    memory = rig.storage_memory
    record = memory.as_data()
    assert memory.charged <= memory.bound
    assert record["double_releases"] == record["foreign_releases"] == 0
    assert memory.collector.statistics.longest_pass <= PASS_BOUND
    memory.clear()
    assert memory.held() == {}
    for pool in (*memory.buffers.pools, memory.nodes.pool, memory.objects.pool, memory.rpmb.pool):
        assert len(pool) == 0
        assert not any(any(slab.memory) for slab in pool._slabs)


TestSameAnswers = SameAnswers.TestCase
TestSameAnswers.settings = settings(max_examples=settings.default.max_examples // 4, stateful_step_count=30)


@settings(max_examples=settings.default.max_examples // 5)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from(["read", "write", "write", "reopen"]), st.sampled_from([0, 1, 33])
        ),
        min_size=6,
        max_size=14,
    )
)
@example(steps=[(1, "write", 2), (0, "write", 33), (1, "write", 0)])
def test_handles_that_share_an_object(steps: list[tuple[int, str, int]]) -> None:
    """Each has its own view, as in OP-TEE: what the other one wrote, it may miss, or find to be no block of its own."""
    answers: list[list[object]] = []
    for config in ({}, {"storage": MANAGED}):
        rig = StorageRig(**config)
        clients = [rig.session(), rig.session()]
        clients[0].close(clients[0].create(b"object", bytes(40 * 4096)))
        flags = SHARED | DataFlag.ACCESS_WRITE
        handles = [client.open(b"object", flags) for client in clients]
        found: list[object] = []
        try:
            for number, (who, step, block) in enumerate(steps, 1):
                client = clients[who]
                if step == "reopen":
                    client.close(handles[who])
                    handles[who] = client.open(b"object", flags)
                else:
                    client.seek(handles[who], block * 4096)
                    found.append(client.read(handles[who], 9) if step == "read" else None)
                    if step == "write":
                        client.write(handles[who], bytes([number]) * 9)
        except StorageError as error:
            found.append(error.result)
        for client in clients:
            client.close_session()
        after = StorageRig(rig.disk, **config).session()
        try:
            found.append(after.content(b"object"))
        except StorageError as error:
            found.append(error.result)
        answers.append(found)
    assert answers[0] == answers[1]


def test_an_error_leaves_nothing_in_the_caches() -> None:
    """One RPC fails, those behind it do not: the change is there or not, and no block waits for a file that is gone."""
    total = 1
    at = 0
    old, new = bytes(30000), bytes(5000) + b"!" * 9000 + bytes(16000)
    while at < total:
        rig = StorageRig(storage=replace(MANAGED, block_cache_size=3))
        client = rig.session()
        client.close(client.create(b"object", old))
        handle = client.open(b"object")
        client.seek(handle, 5000)
        rig.disk.fail_at = at
        rig.disk.asked.clear()
        try:
            client.write(handle, b"!" * 9000)
            client.close(handle)
        except StorageError as error:
            assert error.result == Result.TARGET_DEAD
            client.close_session()
            client = rig.session()
        total = max(total, len(rig.disk.asked))
        rig.disk.fail_at = None
        assert not any(block.writer for block in rig.storage_memory.blocks._entries.values())
        assert client.content(b"object") in (old, new)
        client.close_session()
        check(rig)
        at += 1
    assert total > 6


def rpcs(rig: StorageRig, action: Callable[[], object]) -> int:
    rig.served.clear()
    action()
    return len(rig.served)


def both(measure: Callable[[StorageRig], int], options: StorageOptions = MANAGED) -> tuple[int, int]:
    return measure(StorageRig()), measure(StorageRig(storage=options))


def test_reading_again_costs_a_fifth_at_most() -> None:
    """Reopening and reading again 1 MiB."""

    def measure(rig: StorageRig) -> int:
        client = rig.session()
        client.close(client.create(b"object", bytes(range(256)) * 4096))
        assert client.content(b"object") == bytes(range(256)) * 4096
        return rpcs(rig, lambda: client.content(b"object"))

    plain, managed = both(measure)
    assert plain > 500
    assert managed <= plain / 5
    assert managed == 0, "all of it fits"


@pytest.mark.parametrize("size", [3000, MIB])
def test_committed_writes_cost_three_fifths_at_most(size: int) -> None:
    """Of 1 KiB each, all over the object, each on the disk when it returns."""

    def measure(rig: StorageRig) -> int:
        client = rig.session()
        handle = client.create(b"object", bytes(size))
        content = bytearray(size)

        def write() -> None:
            for number, place in enumerate(range(0, size - 1024, max(1024, size // 40))):
                client.seek(handle, place)
                client.write(handle, bytes([number]) * 1024)
                content[place : place + 1024] = bytes([number]) * 1024
                if not number % 8:
                    assert independent.read(rig.disk.snapshot()).by_id[b"object"] == content

        return rpcs(rig, write)

    plain, managed = both(measure)
    assert managed <= plain * 0.6


def test_small_caches_help_a_little_and_stay_small() -> None:
    options = replace(MANAGED, block_cache_size=8, htree_node_count=64)
    rig = StorageRig(storage=options)
    client = rig.session()
    client.close(client.create(b"object", bytes(MIB)))
    memory = rig.storage_memory
    for _ in range(2):
        client.content(b"object")
        assert len(memory.blocks) <= 8
        assert memory.nodes.pool.statistics.peak <= 64 * memory.nodes.pool.size
        assert memory.charged <= memory.bound < 200 << 10
    check(rig)


def test_a_block_is_copied_once() -> None:
    """From RPC memory; it is decrypted into the place where the cache keeps it."""
    rig = StorageRig(storage=MANAGED)
    client = rig.session()
    client.close(client.create(b"object", bytes(range(256)) * 512))
    rig = StorageRig(rig.disk, storage=MANAGED)
    client = rig.session()
    handle = client.open(b"object")
    blocks = rig.storage_memory.blocks
    filled, copied = blocks.filled, blocks.copied
    for block in (9, 3, 20, 12):  # not one behind the other: nothing is read ahead
        client.seek(handle, block * 4096)
        client.read(handle, 10)
    assert (blocks.filled - filled, blocks.copied - copied) == (4, 4 * 4096)


def test_reading_on_reads_ahead() -> None:
    rig = StorageRig(storage=MANAGED)
    client = rig.session()
    client.close(client.create(b"object", bytes(MIB)))
    rig = StorageRig(rig.disk, storage=MANAGED)
    client = rig.session()
    assert rpcs(rig, lambda: client.content(b"object")) < 80
    assert rig.storage_memory.buffers.direct.allocations > 0


def test_unused_things_go_with_time_and_under_pressure() -> None:
    rig = StorageRig(storage=MANAGED, core_heap_size=1 << 20)
    client = rig.session()
    other = rig.session()
    client.close(client.create(b"object", bytes(300000)))
    held = client.open(b"object", SHARED_READ)
    client.close(client.create(b"closed", bytes(100000)))
    memory = rig.storage_memory
    assert len(memory.blocks) > 50 and len(memory.nodes)
    before = memory.charged
    for _ in range(60):
        rig.world.slept(1000)
        other.seek(other.create(b"x", b"", ALL | DataFlag.OVERWRITE), 0)
        other.close_session()
        other = rig.session()
    assert len(memory.blocks) < 10, "unused blocks are gone"
    assert memory.charged < before, "and whole slabs with them"
    assert len(memory.objects) <= 3, "what is open, and what was used of late"
    assert memory.collector.statistics.collections > 5
    assert memory.collector.statistics.longest_pass <= PASS_BOUND
    assert client.read(held, 10) == bytes(10)
    client.content(b"closed")
    heap = rig.world._by_id[1].pools.heap
    taken = []
    with pytest.raises(TeeError):
        while True:
            taken.append(heap.allocate(8192, Owner("other", 1)))
    assert len(memory.blocks) == len(memory.nodes) == 0, "who needs memory gets what caches hold"
    assert memory.charged < 40 << 10, "but for what is in use"
    heap.free_all(taken)
    assert client.content(b"closed") == bytes(100000)


def test_a_cache_hides_what_the_disk_became_and_never_invents() -> None:
    """A file that was changed behind OP-TEE's back: as before while it is cached, then a corrupt object."""
    rig = StorageRig(storage=MANAGED)
    client = rig.session()
    client.close(client.create(b"object", b"data" * 3000))
    rig.disk.files["0"][:] = bytes(len(rig.disk.files["0"]))
    assert client.content(b"object") == b"data" * 3000
    rig.storage_memory.clear()
    with pytest.raises(StorageError) as error:
        client.content(b"object")
    assert error.value.result == Result.CORRUPT_OBJECT
    assert client.enumerate() == []


def test_another_supplicant_takes_over() -> None:
    """Buffers that were kept go after an error, since they may have been the dead supplicant's."""
    rig = StorageRig(storage=MANAGED)
    client = rig.session()
    client.close(client.create(b"object", b"data"))
    assert len(rig.storage_memory.rpc_buffers) == 1
    kept = set(rig.supplicant.buffers)
    rig.disk.cut_after = 0
    with pytest.raises(StorageError):
        client.create(b"other", b"")
    rig.disk.cut_after = None
    assert not kept & set(rig.supplicant.buffers)
    client.close_session()
    client = rig.session()
    client.close(client.create(b"other", b"more"))
    assert client.content(b"object") == b"data"
    client.close_session()
    assert not rig.supplicant.buffers


def test_levels_are_switched_one_by_one() -> None:
    """Each level saves its own RPCs: without it they are back."""

    def kinds(options: StorageOptions) -> dict[str, int]:
        rig = StorageRig(storage=options)
        client = rig.session()
        client.close(client.create(b"object", bytes(40 * 4096)))
        client.content(b"object")
        rig.served.clear()
        client.content(b"object")
        asked = [rpc for rpc in rig.served if rpc.command == RpcCommand.FS]
        return {
            "opens": sum(rpc.params[0].a == FsOperation.OPEN for rpc in asked),
            "reads": sum(rpc.params[0].a == FsOperation.READ for rpc in asked),
            "memory": sum(rpc.command == RpcCommand.SHM_ALLOC for rpc in rig.served),
        }

    assert not any(kinds(MANAGED).values())
    assert kinds(replace(MANAGED, object_cache_size=0))["opens"] == 2
    assert kinds(replace(MANAGED, htree_node_count=0))["reads"] == 3
    assert kinds(replace(MANAGED, block_cache_size=0))["reads"] == 44
    assert kinds(replace(MANAGED, block_cache_size=0))["memory"] == 0
    assert kinds(replace(MANAGED, block_cache_size=0, rpc_buffer_count=0))["memory"] == 2, "opening, reading"
    off = StorageOptions(StorageMemory.MANAGED, 0, 0, 0, 0, 0)
    assert kinds(off)["opens"] == 2 and kinds(off)["reads"] > 44


def test_blocks_of_rpmb_are_read_once_and_written_once() -> None:
    """Opening and reading costs nothing any more; a FAT entry that a creation writes four times goes out once."""

    def measure(options: StorageOptions) -> tuple[int, int, int]:
        rig = StorageRig(Disk(rpmb=RpmbDevice()), rpmb_fs=True, rpmb_write_key=True, storage=options)
        client = rig.session(storage=RPMB)
        client.close(client.create(b"object", b"data" * 200))
        before = rig.disk.rpmb.write_counter
        created = rpcs(rig, lambda: client.close(client.create(b"other", b"else")))
        writes = rig.disk.rpmb.write_counter - before
        client.content(b"object")
        again = rpcs(rig, lambda: client.content(b"object"))
        assert independent.rpmb_objects(bytes(rig.disk.rpmb.content), StorageTest.uuid.bytes_le) == {
            b"object": b"data" * 200,
            b"other": b"else",
        }
        return created, writes, again

    plain, managed = measure(StorageOptions()), measure(MANAGED)
    assert (plain[1], managed[1]) == (7, 4), "of four writes of the entry one is left"
    assert managed[0] < plain[0] / 2
    assert plain[2] > 4 and managed[2] == 0
    assert measure(replace(MANAGED, rpmb_fs_cache_entries=0))[1] == plain[1]


def test_options() -> None:
    options = StorageOptions.parse({"memory": "managed", "CFG_BLOCK_CACHE_SIZE": 7, "CFG_GC_INTERVAL_MS": 5})
    assert options == StorageOptions(StorageMemory.MANAGED, block_cache_size=7, gc_interval_ms=5)
    assert StorageOptions.parse(options.as_data()) == options
    for wrong, words in (
        ({"memory": "cached"}, "memory is optee or managed, not 'cached'"),
        ({"CFG_RPC_BUFFER_COUNT": -1}, "CFG_RPC_BUFFER_COUNT is a number from 0 to 64, not -1"),
        ({"CFG_GC_MEMORY_THRESHOLD": True}, "CFG_GC_MEMORY_THRESHOLD is a number from 0 to 100, not True"),
        ({"CFG_CACHE": 1}, "no option is called 'CFG_CACHE'"),
    ):
        with pytest.raises(ValueError, match=words):
            StorageOptions.parse(wrong)


async def test_sessions_at_once_through_the_mediator(tmp_path: Path) -> None:
    """xtest 6016 with the memory manager: threads wait for each other, the collector runs at their entries."""
    import trio

    from guests import Direction, Guest, Supplicant, Temporary, Value
    from mediator.board import Board
    from optee.config import Config
    from optee.tas.secure_storage_test import StorageTest
    from tests.storage.test_through_the_mediator import create

    async def work(guest: Guest, number: int) -> None:
        async with guest.context() as context, await context.open_session(StorageTest.uuid) as session:
            for turn in range(3):
                name, data = b"object %d" % number, bytes([number, turn]) * 9000
                handle = await create(session, name, data)
                await session.invoke(
                    5, Value(handle, 0, direction=Direction.INPUT), Value(0, direction=Direction.INPUT)
                )
                output, _ = await session.invoke(2, Temporary(size=18000, direction=Direction.OUTPUT), Value(handle))
                assert output.data == data
                await session.invoke(6 if turn < 2 else 1, Value(handle, direction=Direction.INPUT))

    storage = replace(MANAGED, block_cache_size=4, gc_interval_ms=1)
    async with Board(config=Config(storage=storage, leak_report=True)) as board:
        async with (
            board.guest("kvm", supplicant=Supplicant(storage=tmp_path)) as guest,
            trio.open_nursery() as nursery,
        ):
            for number in range(4):
                nursery.start_soon(work, guest, number)
        assert board.violations == []
        assert not any(board.left().values())
        assert board.model.leaks == []
    found = independent.read(tmp_path).by_id
    assert found == {b"object %d" % number: bytes([number, 2]) * 9000 for number in range(4)}
