"""Trusted storage as TAs see it: xtest 6001 to 6021, and the corners of the GP specification."""

from itertools import product

import pytest

from optee.abi.message import Command, Message, ParamType
from optee.abi.results import Result, StorageId
from optee.storage.registry import DataFlag
from optee.tas.secure_storage import SecureStorage
from optee.tas.secure_storage_test import StorageTest, StorageTest2
from tests.optee.rig import invoke_message, open_message, value
from tests.storage import independent
from tests.storage.rig import ALL, INPUT, OUTPUT, PRIVATE, SHARED_READ, VALUE, Client, StorageError, StorageRig

READ, WRITE, META = DataFlag.ACCESS_READ, DataFlag.ACCESS_WRITE, DataFlag.ACCESS_WRITE_META
SHARE_READ, SHARE_WRITE = DataFlag.SHARE_READ, DataFlag.SHARE_WRITE
DATA = bytes(range(200)) * 50


@pytest.fixture
def rig() -> StorageRig:
    return StorageRig()


@pytest.fixture
def client(rig: StorageRig) -> Client:
    return rig.session()


def refused(call, *arguments) -> Result:
    with pytest.raises(StorageError) as error:
        call(*arguments)
    return error.value.result


def test_create_read_write_delete(rig: StorageRig, client: Client) -> None:
    handle = client.create(b"object", DATA)
    assert client.read(handle, 100) == DATA[:100]
    assert client.read(handle, 100) == DATA[100:200]
    client.seek(handle, 5000)
    client.write(handle, b"here")
    client.close(handle)
    assert client.content(b"object") == DATA[:5000] + b"here" + DATA[5004:]
    client.unlink(client.open(b"object"))
    assert refused(client.open, b"object") == Result.ITEM_NOT_FOUND
    assert independent.read(rig.disk.snapshot()).objects == []
    assert not rig.disk.open_files
    assert sorted(rig.disk.files) == ["dirf.db"]


@pytest.mark.parametrize("object_id", [b"", b"\0", b"\1", bytes(64), b"x" * 64, bytes(range(64))])
def test_ids(client: Client, object_id: bytes) -> None:
    client.close(client.create(object_id, b"data"))
    client.close(client.create(b"another", b"else"))
    assert client.content(object_id) == b"data"
    assert client.enumerate() == [(object_id, 4), (b"another", 4)]
    client.unlink(client.open(object_id))
    assert client.enumerate() == [(b"another", 4)]


def test_long_id_is_a_panic(client: Client) -> None:
    assert refused(client.create, b"x" * 65) == Result.TARGET_DEAD


def expect_conflict(first: int, second: int) -> bool:
    """May a second handle not be opened? Stated over both handles as the GP specification does."""
    if (first | second) & META:
        return True
    for access, share in ((READ, SHARE_READ), (WRITE, SHARE_WRITE)):
        shared = [bool(flags & share) for flags in (first, second)]
        if any(flags & access for flags in (first, second)) and not all(shared):
            return True
        if shared[0] != shared[1]:
            return True
    return False


def test_sharing_rules(rig: StorageRig, client: Client) -> None:
    """Every pair of flags, from two instances of the TA."""
    other = rig.session()
    client.close(client.create(b"object", b"data"))
    choices = [0, READ, WRITE, META, READ | WRITE]
    shares = [0, SHARE_READ, SHARE_WRITE, SHARE_READ | SHARE_WRITE]
    flags = [access | share for access, share in product(choices, shares)]
    for first in flags:
        handle = client.open(b"object", first)
        for second in flags:
            if expect_conflict(first, second):
                assert refused(other.open, b"object", second) == Result.ACCESS_CONFLICT, (first, second)
            else:
                other.close(other.open(b"object", second))
        client.close(handle)


def test_create_over_an_open_object(rig: StorageRig, client: Client) -> None:
    other = rig.session()
    handle = client.create(b"object", b"data", READ | SHARE_READ)
    assert refused(other.create, b"object", b"", READ | SHARE_READ) == Result.ACCESS_CONFLICT
    assert refused(other.create, b"object", b"", ALL | DataFlag.OVERWRITE) == Result.ACCESS_CONFLICT
    second = other.create(b"object", b"new", READ | SHARE_READ | DataFlag.OVERWRITE)
    assert other.read(second, 10) == b"new"
    other.close(second)
    client.close(handle)
    assert client.content(b"object") == b"new"


def test_create_without_overwrite_keeps_the_old_one(rig: StorageRig, client: Client) -> None:
    client.close(client.create(b"object", b"old"))
    assert refused(client.create, b"object", b"new") == Result.ACCESS_CONFLICT
    assert client.content(b"object") == b"old"
    assert sorted(rig.disk.files) == ["0", "dirf.db"]
    client.close(client.create(b"object", b"new", ALL | DataFlag.OVERWRITE))
    assert client.content(b"object") == b"new"


@pytest.mark.parametrize(
    ("flags", "use", "result"),
    [
        (WRITE, lambda client, handle: client.read(handle, 1), Result.TARGET_DEAD),
        (READ, lambda client, handle: client.write(handle, b"x"), Result.TARGET_DEAD),
        (READ, lambda client, handle: client.truncate(handle, 1), Result.TARGET_DEAD),
        (READ | WRITE, lambda client, handle: client.unlink(handle), Result.TARGET_DEAD),
        (READ | WRITE, lambda client, handle: client.rename(handle, b"new"), Result.TARGET_DEAD),
        (READ, lambda client, handle: client.seek(handle, 0, 3), Result.TARGET_DEAD),
        (READ, lambda client, handle: client.close(handle + 1), Result.TARGET_DEAD),
        (0x1000, lambda client, handle: None, Result.TARGET_DEAD),
    ],
)
def test_what_a_handle_does_not_allow_is_a_panic(rig: StorageRig, flags, use, result) -> None:
    client = rig.session()
    client.close(client.create(b"object", b"data"))
    with pytest.raises(StorageError) as error:
        use(client, client.open(b"object", flags))
    assert error.value.result == result
    assert rig.session().content(b"object") == b"data", "a panic closes the handles of its instance"
    assert not rig.disk.open_files


def test_seek(client: Client) -> None:
    handle = client.create(b"object", b"0123456789")
    for offset, whence, position in ((4, 0, 4), (2, 1, 6), (-1, 1, 5), (-100, 1, 0), (-3, 2, 7), (5, 2, 15)):
        client.seek(handle, offset, whence)
        assert client.info(handle)[4] == position
    assert client.read(handle, 5) == b"", "behind the end there is nothing"
    client.write(handle, b"end")
    client.seek(handle, 0)
    assert client.read(handle, 100) == b"0123456789" + bytes(5) + b"end"


def test_overflow(client: Client) -> None:
    handle = client.create(b"object", b"data")
    for _ in range(2):
        client.seek(handle, 0x7FFFFFFF, 1)
    assert refused(client.seek, handle, 0x7FFFFFFF, 1) == Result.OVERFLOW
    client.seek(handle, 1, 1)
    assert client.info(handle)[4] == 0xFFFFFFFF
    assert refused(client.write, handle, b"x") == Result.OVERFLOW
    client.seek(handle, 0)
    assert client.read(handle, 10) == b"data"


def test_an_object_too_large_for_the_core_heap() -> None:
    """All nodes of open files are in it: 64 KiB hold those of some 1.8 MiB."""
    small = StorageRig(core_heap_size=64 << 10)
    client = small.session()
    handle = client.create(b"object", b"data")
    client.truncate(handle, 380 * 4096)
    assert refused(small.session().create, b"new", bytes(1 << 20)) == Result.OUT_OF_MEMORY
    assert refused(client.truncate, handle, 600 * 4096) == Result.TARGET_DEAD
    client = small.session()
    assert dict(client.enumerate()) == {b"object": 380 * 4096}
    client.close(client.create(b"new", bytes(1 << 20)))
    assert client.content(b"new") == bytes(1 << 20)


def test_what_an_open_object_takes_of_the_core_heap() -> None:
    rig = StorageRig()
    client = rig.session()
    pools = rig.world.pools(1)
    assert pools is not None

    def held() -> dict[str, int]:
        found: dict[str, int] = {}
        for allocation in pools.left():
            found[allocation.owner.what] = found.get(allocation.owner.what, 0) + allocation.size
        return found

    before = held()
    first = client.create(b"object" * 5, DATA)
    # tee_obj and file handle; tee_pobj and an id of 30 bytes.
    assert held()["object handle"] == 112 + 80
    assert held()["persistent object"] == 96 + 48
    client.close(first)
    assert held() == before


@pytest.mark.parametrize("sizes", [(0, 5000, 0), (10000, 4096, 4095), (3, 20000, 1), (8192, 8191, 8193, 0, 1)])
def test_truncate(client: Client, sizes: tuple[int, ...]) -> None:
    handle = client.create(b"object", DATA)
    expected = DATA
    for size in sizes:
        client.truncate(handle, size)
        expected = expected[:size].ljust(size, b"\0")
        assert client.info(handle)[3] == size
        client.seek(handle, 0)
        assert client.read(handle, 1 << 16) == expected
    client.close(handle)
    assert client.content(b"object") == expected


def test_rename(rig: StorageRig, client: Client) -> None:
    client.close(client.create(b"one", b"first"))
    client.close(client.create(b"two", b"second"))
    handle = client.open(b"one")
    assert refused(client.rename, handle, b"two") == Result.ACCESS_CONFLICT
    assert refused(client.rename, handle, b"one") == Result.ACCESS_CONFLICT
    open_two = client.open(b"two", READ)
    assert refused(client.rename, handle, b"two") == Result.ACCESS_CONFLICT
    client.close(open_two)
    client.rename(handle, b"three")
    assert refused(rig.session().open, b"three") == Result.ACCESS_CONFLICT, "it is open under its new id"
    assert refused(client.open, b"one") == Result.ITEM_NOT_FOUND
    client.write(handle, b"FIRST")
    client.close(handle)
    assert client.enumerate() == [(b"three", 5), (b"two", 6)]
    assert client.content(b"three") == b"FIRST"


def test_enumeration(rig: StorageRig, client: Client) -> None:
    assert client.enumerate() == []
    names = [b"object %d" % index for index in range(40)]  # dirf.db has two blocks, one entry lies in both
    for name in names:
        client.close(client.create(name, name))
    other = rig.session(StorageTest2.uuid)
    other.close(other.create(names[0], b"of another TA"))
    assert client.enumerate() == [(name, len(name)) for name in names]
    for name in names[::2]:
        client.unlink(client.open(name))
    assert client.enumerate() == [(name, len(name)) for name in names[1::2]]
    assert other.enumerate() == [(names[0], 13)]
    handle = client.open(names[1])
    assert (names[1], len(names[1])) in client.enumerate(), "an open object is enumerated too"
    client.close(handle)
    client.close(client.create(b"in the gap"))
    assert client.enumerate()[0] == (b"in the gap", 0)
    independent.read(rig.disk.snapshot())
    assert not rig.disk.open_files


def test_enumerator_states(rig: StorageRig, client: Client) -> None:
    (enumerator, *_) = client.invoke(9, value(kind=ParamType.VALUE_OUTPUT))
    following = value(enumerator.a, kind=VALUE), value(kind=ParamType.VALUE_OUTPUT), rig.memref("data", 64, OUTPUT)
    assert refused(client.invoke, 13, *following) == Result.ITEM_NOT_FOUND, "not started"
    start = value(enumerator.a, PRIVATE, VALUE)
    assert refused(client.invoke, 12, start) == Result.ITEM_NOT_FOUND, "nothing there"
    client.close(client.create(b"object"))
    for _ in range(2):
        client.invoke(12, start)
        client.invoke(13, *following)
        assert refused(client.invoke, 13, *following) == Result.ITEM_NOT_FOUND
    client.invoke(11, value(enumerator.a, kind=VALUE))
    assert refused(client.invoke, 13, *following) == Result.ITEM_NOT_FOUND, "reset"
    client.invoke(12, start)
    assert refused(client.invoke, 13, value(99, kind=VALUE), *following[1:]) == Result.TARGET_DEAD
    assert not rig.disk.open_files, "the panic closed the directory"


def test_storages(client: Client) -> None:
    for storage in (StorageId.PRIVATE_RPMB, 0, 2, 0x80000200):
        assert refused(client.create, b"object", b"", ALL, storage) == Result.ITEM_NOT_FOUND
        assert refused(client.open, b"object", ALL, storage) == Result.ITEM_NOT_FOUND
        assert client.enumerate(storage) == []
    client.close(client.create(b"object", b"data", ALL, StorageId.PRIVATE_REE))
    assert client.content(b"object") == b"data", "without RPMB the private storage is the REE's"


def test_tas_are_kept_apart(rig: StorageRig, client: Client) -> None:
    other = rig.session(StorageTest2.uuid)
    client.close(client.create(b"object", b"mine"))
    assert refused(other.open, b"object") == Result.ITEM_NOT_FOUND
    handle = other.create(b"object", b"other's")
    assert client.content(b"object") == b"mine", "nor do handles meet"
    other.close(handle)
    owners = {o.owner for o in independent.read(rig.disk.snapshot()).objects}
    assert owners == {StorageTest.uuid.bytes_le, StorageTest2.uuid.bytes_le}


def test_keys(rig: StorageRig, client: Client) -> None:
    secret = bytes(range(32))
    created = client.invoke(
        24, client.name(b"key"), value(ALL), value(0xA0000010, 256, VALUE), rig.memref("data", secret, INPUT)
    )
    client.close(created[1].b)
    handle = client.open(b"key")
    assert client.info(handle)[:4] == (0xA0000010, 0xFFFFFFFF, 256, 0)
    params = client.invoke(25, value(handle, kind=VALUE), rig.memref("data", 64, OUTPUT))
    assert rig.output(params[1].b) == secret
    client.write(handle, b"data behind a key")
    client.seek(handle, 0)
    assert client.read(handle, 100) == b"data behind a key"
    (stored,) = independent.read(rig.disk.snapshot()).objects
    assert stored.content[24:] == b"\0\0\0\x20" + secret + b"data behind a key"


def test_usage_is_restricted_for_good(client: Client) -> None:
    handle = client.create(b"object", b"data", SHARED_READ)
    shared = client.open(b"object", SHARED_READ)
    client.invoke(17, value(handle, 0xFF, VALUE))
    client.invoke(17, value(handle, 0xF0F, VALUE))
    assert client.info(handle)[1] == client.info(shared)[1] == 0x0F
    client.close(handle)
    client.close(shared)
    handle = client.open(b"object")
    assert client.info(handle)[1] == 0x0F
    assert client.read(handle, 10) == b"data"


@pytest.mark.parametrize("command", [22, 23])
def test_id_in_shared_memory_is_a_panic(client: Client, command: int) -> None:
    assert refused(client.invoke, command, client.name(b"object")) == Result.TARGET_DEAD


def test_commands_that_try_much_at_once(client: Client) -> None:
    client.invoke(14, client.name(b"object"), value(PRIVATE, kind=VALUE))
    client.invoke(15, value(PRIVATE, kind=VALUE))
    client.invoke(16, value(PRIVATE, kind=VALUE))
    assert client.enumerate() == []


def test_reading_and_writing_in_pieces_inside_the_ta(rig: StorageRig, client: Client) -> None:
    """xtest's benchmarks: each piece is written and committed by itself, the last one may be shorter."""
    handle = client.create(b"object")
    rig.disk.changes.clear()
    client.invoke(27, value(handle, kind=VALUE), value(2500, 1000, VALUE))
    commits = [change for change in rig.disk.changes if "dirf.db" in change and change.endswith("len=68")]
    assert len(commits) == 3
    client.seek(handle, 0)
    assert client.read(handle, 4000) == b"\0" * 1000 + b"\1" * 1000 + b"\2" * 500
    client.seek(handle, 100)
    client.invoke(26, value(handle, kind=VALUE), value(2000, 999, VALUE))
    assert client.read(handle, 4000) == b"\2" * 400
    for command in (26, 27):
        for piece in (0, (1 << 16) + 1):
            with pytest.raises(StorageError) as refused:
                client.invoke(command, value(handle, kind=VALUE), value(1, piece, VALUE))
            assert refused.value.result == Result.BAD_PARAMETERS


def test_closing_a_session_closes_what_it_had_open(rig: StorageRig, client: Client) -> None:
    client.create(b"object", b"data")
    assert rig.disk.open_files
    assert rig.send(Message(Command.CLOSE_SESSION, session=client.number)).ret == 0
    assert not rig.disk.open_files
    assert rig.session().content(b"object") == b"data"


def raw(rig: StorageRig, session: int, command: int, name: bytes, data: bytes | int | None = None):
    params = [rig.memref("id", name, INPUT)]
    if data is not None:
        params.append(rig.memref("data", data, OUTPUT if isinstance(data, int) else INPUT))
    return rig.send(invoke_message(session, command, *params))


def test_secure_storage_example(rig: StorageRig) -> None:
    session = rig.send(open_message(SecureStorage.uuid)).session
    assert raw(rig, session, 0, b"object", 100).ret == Result.ITEM_NOT_FOUND
    assert raw(rig, session, 1, b"object", DATA).ret == 0
    short = raw(rig, session, 0, b"object", 100)
    assert (short.ret, short.params[1].b) == (Result.SHORT_BUFFER, len(DATA))
    done = raw(rig, session, 0, b"object", 20000)
    assert (done.ret, done.params[1].b, rig.output(len(DATA))) == (0, len(DATA), DATA)
    assert raw(rig, session, 1, b"object", b"new").ret == 0
    assert raw(rig, session, 0, b"object", 100).params[1].b == 3
    assert raw(rig, session, 1, b"large", bytes(33 << 10)).ret == Result.OUT_OF_MEMORY
    assert raw(rig, session, 2, b"object").ret == 0
    assert raw(rig, session, 2, b"object").ret == Result.ITEM_NOT_FOUND
    assert raw(rig, session, 9, b"object").ret == Result.NOT_SUPPORTED
    assert not rig.disk.open_files
