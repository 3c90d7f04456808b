"""tee-supplicant: files, TA images, memory, and the ways in which it can go wrong."""

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from guests import MisbehavingSupplicant, Misbehaviour, SlowSupplicant, Supplicant, boot
from guests.files import MAX_FILE_SIZE, DirectoryFiles, Files, MemoryFiles
from guests.memory import Buffer, PageAllocator, page_span
from guests.shm import SharedMemoryTable
from guests.supplicant import MAX_OPEN_FILES
from guests.supplicant_device import MemoryParam, RpcParam, ValueParam
from hv_models.memory import PAGE_SIZE
from optee.abi.message import Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import FsOperation, RpcCommand
from tests.guests.secure import BASE, Ask, SecureSide, Steps, make_ram

IMAGE = bytes(range(251)) * 40
TA = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")


class Rpcs:
    """Makes requests as the kernel does."""

    def __init__(self, supplicant: Supplicant) -> None:
        self.ram = make_ram(512)
        self.pages = PageAllocator(BASE, self.ram.size)
        self.shms = SharedMemoryTable()
        self.supplicant = supplicant

    def memory(self, direction: int, data: bytes, size: int | None = None) -> MemoryParam:
        size = len(data) if size is None else size
        buffer = Buffer(self.ram, self.pages.pages(page_span(size, 0)), size)
        buffer.write(data)
        return MemoryParam(direction, self.shms.add(buffer), 0, size)

    def name(self, name: bytes) -> MemoryParam:
        return self.memory(1, name + b"\0")

    def fs(self, operation: FsOperation, b: int = 0, c: int = 0, *rest: RpcParam) -> int:
        value = ValueParam(ParamType.VALUE_INPUT, operation, b, c)
        return self.supplicant.process(RpcCommand.FS, [value, *rest])

    def open(self, name: bytes, operation: FsOperation = FsOperation.CREATE) -> tuple[int, int]:
        handle = ValueParam(ParamType.VALUE_OUTPUT, 0, 0, 0)
        return self.fs(operation, 0, 0, self.name(name), handle), handle.a

    def read(self, handle: int, offset: int, size: int) -> tuple[int, bytes]:
        data = self.memory(2, b"", size)
        result = self.fs(FsOperation.READ, handle, offset, data)
        return result, data.read()

    def write(self, handle: int, offset: int, data: bytes) -> int:
        return self.fs(FsOperation.WRITE, handle, offset, self.memory(1, data))

    def load(self, uuid: UUID, memory: MemoryParam) -> int:
        words = [int.from_bytes(uuid.bytes[at : at + 8], "little") for at in (0, 8)]
        value = ValueParam(ParamType.VALUE_INPUT, *words, 0)
        return self.supplicant.process(RpcCommand.LOAD_TA, [value, memory])


@pytest.fixture(params=["directory", "memory"])
def make_files(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Files]:
    if request.param == "memory":
        files = MemoryFiles()
        return lambda: files
    return lambda: DirectoryFiles(tmp_path / "data" / "tee")


async def test_a_file_lives_on_after_the_supplicant(make_files: Callable[[], Files]) -> None:
    rpcs = Rpcs(Supplicant(files=make_files()))
    assert rpcs.open(b"/dirf.db", FsOperation.OPEN)[0] == Result.ITEM_NOT_FOUND
    result, handle = rpcs.open(b"/dirf.db")
    assert result == Result.SUCCESS
    assert rpcs.write(handle, 4096, b"block") == Result.SUCCESS
    assert rpcs.read(handle, 4094, 100) == (Result.SUCCESS, b"\0\0block")
    assert rpcs.read(handle, 9999, 10) == (Result.SUCCESS, b"")
    assert rpcs.fs(FsOperation.TRUNCATE, handle, 4098) == Result.SUCCESS
    rpcs.supplicant.stop()
    rpcs = Rpcs(Supplicant(files=make_files()))
    handle = rpcs.open(b"/dirf.db", FsOperation.OPEN)[1]
    assert rpcs.read(handle, 0, 9000) == (Result.SUCCESS, bytes(4096) + b"bl")
    assert rpcs.open(b"/dirf.db")[0] == Result.SUCCESS
    assert rpcs.read(handle, 0, 10) in ((Result.SUCCESS, b""), (Result.SUCCESS, bytes(10)))
    assert rpcs.fs(FsOperation.CLOSE, handle) == Result.SUCCESS
    assert rpcs.fs(FsOperation.CLOSE, handle) == Result.BAD_PARAMETERS
    assert rpcs.read(handle, 0, 1)[0] == Result.GENERIC
    rpcs.supplicant.stop()


async def test_rename_remove_and_list(make_files: Callable[[], Files]) -> None:
    rpcs = Rpcs(Supplicant(files=make_files()))
    for name in (b"/ta/b", b"/ta/a", b"/c"):
        rpcs.write(rpcs.open(name)[1], 0, name)
    assert rpcs.fs(FsOperation.RENAME, 0, 0, rpcs.name(b"/c"), rpcs.name(b"/ta/a")) == Result.ACCESS_CONFLICT
    assert rpcs.fs(FsOperation.RENAME, 1, 0, rpcs.name(b"/c"), rpcs.name(b"/ta/a")) == Result.SUCCESS
    assert rpcs.read(rpcs.open(b"/ta/a", FsOperation.OPEN)[1], 0, 10) == (Result.SUCCESS, b"/c")
    assert rpcs.fs(FsOperation.RENAME, 1, 0, rpcs.name(b"/c"), rpcs.name(b"/d")) == Result.ITEM_NOT_FOUND

    _, handle = rpcs.open(b"/ta", FsOperation.OPENDIR)
    entries = []
    while True:
        entry = rpcs.memory(2, b"", 16)
        if rpcs.fs(FsOperation.READDIR, handle, 0, entry) == Result.ITEM_NOT_FOUND:
            break
        entries.append(entry.read())
    assert entries == [b"a\0", b"b\0"]
    assert rpcs.fs(FsOperation.CLOSEDIR, handle) == Result.SUCCESS

    for name in (b"/ta/a", b"/ta/b"):
        assert rpcs.fs(FsOperation.REMOVE, 0, 0, rpcs.name(name)) == Result.SUCCESS
        assert rpcs.fs(FsOperation.REMOVE, 0, 0, rpcs.name(name)) == Result.ITEM_NOT_FOUND
    assert rpcs.open(b"/ta", FsOperation.OPENDIR)[0] == Result.ITEM_NOT_FOUND, "empty directories go too"
    rpcs.supplicant.stop()


async def test_a_long_name_in_a_short_buffer(make_files: Callable[[], Files]) -> None:
    rpcs = Rpcs(Supplicant(files=make_files()))
    rpcs.open(b"/ta/" + b"x" * 20)
    handle = rpcs.open(b"/ta", FsOperation.OPENDIR)[1]
    entry = rpcs.memory(2, b"", 5)
    assert rpcs.fs(FsOperation.READDIR, handle, 0, entry) == Result.SHORT_BUFFER
    assert entry.size == 21
    assert rpcs.fs(FsOperation.READDIR, handle, 0, rpcs.memory(2, b"", 21)) == Result.SUCCESS
    rpcs.supplicant.stop()


@pytest.mark.parametrize(
    "name", [b"/../secret", b"..", b"/a/../../secret", b"/link/secret", b"/link", b"", b"/", b"\xff\xfe"]
)
@pytest.mark.parametrize("operation", [FsOperation.OPEN, FsOperation.CREATE, FsOperation.REMOVE, FsOperation.OPENDIR])
async def test_no_way_out_of_the_directory(name: bytes, operation: FsOperation, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"kept")
    root = tmp_path / "root"
    rpcs = Rpcs(Supplicant(storage=root))
    if b"link" in name:
        (root / "link").symlink_to(tmp_path if name.endswith(b"secret") else outside)
    if operation is FsOperation.REMOVE and name == b"/link":
        assert rpcs.fs(operation, 0, 0, rpcs.name(name)) == Result.SUCCESS  # the link itself
    elif operation is FsOperation.REMOVE:
        assert rpcs.fs(operation, 0, 0, rpcs.name(name)) == Result.GENERIC
    else:
        assert rpcs.open(name, operation)[0] == Result.GENERIC
    assert outside.read_bytes() == b"kept"
    rpcs.supplicant.stop()


@given(st.binary(max_size=40))
def test_any_name_stays_inside(name: bytes) -> None:
    files = MemoryFiles()
    rpcs = Rpcs(Supplicant(files=files))
    result = rpcs.fs(FsOperation.CREATE, 0, 0, rpcs.memory(1, name), ValueParam(2, 0, 0, 0))
    assert result in (Result.SUCCESS, Result.GENERIC)
    for path in files.content:
        assert path and not {"", ".", ".."} & set(path) and not any("/" in part for part in path)


async def test_a_name_without_end_is_refused() -> None:
    rpcs = Rpcs(Supplicant())
    assert rpcs.fs(FsOperation.CREATE, 0, 0, rpcs.memory(1, b"/a"), ValueParam(2, 0, 0, 0)) == Result.GENERIC


async def test_open_files_and_their_size_are_bounded() -> None:
    rpcs = Rpcs(Supplicant())
    opened = [rpcs.open(b"/%d" % number) for number in range(MAX_OPEN_FILES + 1)]
    assert [result for result, _ in opened[:-1]] == [Result.SUCCESS] * MAX_OPEN_FILES
    assert len({handle for _, handle in opened[:-1]}) == MAX_OPEN_FILES
    assert opened[-1][0] == Result.GENERIC
    handle = opened[0][1]
    assert rpcs.fs(FsOperation.TRUNCATE, handle, MAX_FILE_SIZE + 1) == Result.GENERIC
    assert rpcs.write(handle, 1 << 60, b"x") == Result.GENERIC
    rpcs.fs(FsOperation.CLOSE, handle)
    assert rpcs.open(b"/again") == (Result.SUCCESS, handle)


@pytest.mark.parametrize("command", [RpcCommand.GPROF, RpcCommand.SOCKET, 99])
async def test_what_it_does_not_know(command: int) -> None:
    assert Supplicant().process(command, []) == Result.NOT_SUPPORTED


@pytest.mark.parametrize("source", ["images", "directory"])
async def test_loading_a_ta(source: str, tmp_path: Path) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(IMAGE)
    supplicant = Supplicant({TA: IMAGE}) if source == "images" else Supplicant(ta_directory=tmp_path)
    rpcs = Rpcs(supplicant)
    query = MemoryParam(2, None, 0, 0)
    assert (rpcs.load(TA, query), query.size) == (Result.SUCCESS, len(IMAGE))
    short = rpcs.memory(2, b"", len(IMAGE) - 1)
    assert (rpcs.load(TA, short), short.size) == (Result.SHORT_BUFFER, len(IMAGE))
    whole = rpcs.memory(2, b"", PAGE_SIZE * 4)
    assert rpcs.load(TA, whole) == Result.SUCCESS
    assert whole.read() == IMAGE
    assert rpcs.load(UUID(int=1), query) == Result.ITEM_NOT_FOUND


async def test_a_supplicant_runs_once() -> None:
    supplicant = Supplicant()
    side = SecureSide(make_ram())
    async with boot(side.ram, side) as guest:
        await guest.driver.start_supplicant(supplicant)
        guest.driver.stop_supplicant()
        with pytest.raises(ValueError, match="runs once"):
            await guest.driver.start_supplicant(supplicant)


def opens(name: bytes, replies: list[int]) -> Callable[[SecureSide, Message], Steps]:
    """A TA whose opening opens a file through the supplicant."""

    def ta(side: SecureSide, message: Message) -> Steps:
        ask = Ask(RpcCommand.LOAD_TA, [Param(ParamType.VALUE_INPUT), Param(ParamType.TMEM_OUTPUT)])
        reply = yield ask
        replies.append(reply.ret)
        return Result.SUCCESS, Origin.TRUSTED_APP

    return ta


async def test_slow(autojump_clock: MockClock) -> None:
    replies: list[int] = []
    side = SecureSide(make_ram(), tas={TA: opens(b"/a", replies)})
    async with boot(side.ram, side) as guest:
        await guest.driver.start_supplicant(SlowSupplicant(2.5))
        start = trio.current_time()
        await guest.driver.open_session(TA)
        assert trio.current_time() - start == pytest.approx(2.5)
    assert replies == [Result.ITEM_NOT_FOUND]


@pytest.mark.parametrize("silent", [True, False])
async def test_its_end_fails_its_requests(silent: bool) -> None:
    supplicant = MisbehavingSupplicant(Misbehaviour.SILENT) if silent else SlowSupplicant(1000)
    replies: list[int] = []
    side = SecureSide(make_ram(), tas={TA: opens(b"/a", replies)})
    async with boot(side.ram, side) as guest:
        await guest.driver.start_supplicant(supplicant)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.driver.open_session, TA)
            await wait_all_tasks_blocked()
            assert replies == []
            guest.driver.stop_supplicant()
    assert replies == [Result.COMMUNICATION]


async def test_garbage_and_lying_sizes() -> None:
    rpcs = Rpcs(MisbehavingSupplicant(Misbehaviour.GARBAGE, {TA: IMAGE}))
    memory = rpcs.memory(2, b"", len(IMAGE))
    assert rpcs.load(TA, memory) == Result.SUCCESS
    assert memory.read() == b"\xa5" * len(IMAGE)
    rpcs = Rpcs(MisbehavingSupplicant(Misbehaviour.LYING_SIZE, {TA: IMAGE}))
    memory = rpcs.memory(2, b"", len(IMAGE))
    assert (rpcs.load(TA, memory), memory.size) == (Result.SUCCESS, len(IMAGE) + PAGE_SIZE)
    assert Rpcs(MisbehavingSupplicant(Misbehaviour.REFUSE)).open(b"/a")[0] == Result.GENERIC


async def test_memory_outlives_the_supplicant_that_shared_it() -> None:
    """OP-TEE still has the buffer: its pages must not be given to anyone else before SHM_FREE."""

    def ta(side: SecureSide, message: Message) -> Steps:
        reply = yield Ask(RpcCommand.SHM_ALLOC, [Param(ParamType.VALUE_INPUT, 0, PAGE_SIZE, 8)])
        cookie = reply.params[0].c
        stop()
        used.append(guest.driver.allocator.used)
        yield Ask(RpcCommand.SHM_FREE, [Param(ParamType.VALUE_INPUT, 0, cookie)])
        used.append(guest.driver.allocator.used)
        return Result.SUCCESS, Origin.TRUSTED_APP

    used: list[int] = []
    side = SecureSide(make_ram(), tas={TA: ta})
    async with boot(side.ram, side) as guest:
        await guest.driver.start_supplicant(Supplicant())

        def stop() -> None:
            guest.driver.stop_supplicant()
            nursery.start_soon(guest.driver.start_supplicant, Supplicant())

        async with trio.open_nursery() as nursery:
            await guest.driver.open_session(TA)
        assert used[1] < used[0]
    assert guest.driver.allocator.used == 0
