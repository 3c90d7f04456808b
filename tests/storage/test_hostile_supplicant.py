"""A supplicant that damages, withholds or swaps what it was given: an error, never wrong data."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest

from guests.rpmb import RpmbDevice
from optee.abi.results import Result, TaFlag
from optee.abi.rpc import FsOperation, RpcCommand
from optee.storage.keys import StorageKeys
from optee.storage.store_reader import StoreReader
from optee.tas.secure_storage_test import StorageTest
from tests.optee.rig import Rpc
from tests.shared import SHARED, needs_shared
from tests.storage import independent
from tests.storage.rig import ALL, READ_WRITE, SHARED_READ, Disk, StorageError, StorageRig

OWNER = UUID("5f0c0a11-7e57-4a57-8e5e-c0ffee000001")
DATA = bytes(range(250)) * 40
ERRORS = {Result.CORRUPT_OBJECT, Result.ITEM_NOT_FOUND, Result.TARGET_DEAD, Result.OUT_OF_MEMORY}
STORES = SHARED / "stores"


@dataclass
class HostileDisk(Disk):
    """Answers the file operation number `at` in its own way."""

    at: int = -1
    way: str = ""
    other: Mapping[str, bytes] = field(default_factory=dict)
    """Files of another time or another guest, of the same names."""

    def serve(self, rig: StorageRig, rpc: Rpc) -> Result:
        attacked = len(self.asked) == self.at
        result = super().serve(rig, rpc)
        if not attacked or rpc.command == RpcCommand.RPMB:
            return result
        if self.way == "error":
            return Result.GENERIC
        if self.way == "missing":
            return Result.ITEM_NOT_FOUND
        if rpc.params[0].a == FsOperation.READ:
            size = rpc.params[1].b
            if self.way == "short":
                rpc.params[1] = rpc.params[1]._replace(b=size - 1)
            elif self.way == "long":
                rpc.params[1] = rpc.params[1]._replace(b=size + 1)
            elif self.way == "other":
                name, offset = self.open_files[rpc.params[0].b][0], rpc.params[0].c
                data = self.other.get(name, b"")[offset : offset + size]
                rig.memory.write(rig.supplicant.buffers[rpc.params[1].c], data)
                rpc.params[1] = rpc.params[1]._replace(b=len(data))
            else:
                place = rig.supplicant.buffers[rpc.params[1].c]
                data = bytearray(rig.memory.read(place, size))
                if self.way == "zeroes":
                    data[:] = bytes(size)
                else:
                    data[size // 2 if self.way == "flip" else 0] ^= 1
                rig.memory.write(place, data)
        return result


def store() -> dict[str, bytes]:
    rig = StorageRig()
    client = rig.session()
    client.close(client.create(b"other", b"else"))
    client.close(client.create(b"object", DATA))
    return rig.disk.snapshot()


@pytest.mark.parametrize("way", ["error", "missing", "short", "long", "flip", "first", "zeroes"])
def test_no_answer_makes_wrong_data(way: str) -> None:
    files = store()
    at = 0
    while True:
        disk = HostileDisk({name: bytearray(content) for name, content in files.items()})
        client = StorageRig(disk).session()
        disk.at, disk.way = at, way
        try:
            assert client.content(b"object") == DATA
        except StorageError as error:
            assert error.result in ERRORS, (at, error)
        if at > len(disk.asked):
            break
        at += 1
    assert at > 15


OLD = DATA[1:] + DATA[:1]


def changed_store(**config: object) -> tuple[dict[str, bytes], Disk]:
    """Files before the last change of the object, and the disk after it."""
    disk = Disk(rpmb=RpmbDevice())
    client = StorageRig(disk, **config).session()
    client.close(client.create(b"other", b"else"))
    handle = client.create(b"object", DATA[::-1])
    for data in (DATA[::-1], OLD):  # both versions of everything have been used
        client.seek(handle, 0)
        client.write(handle, data)
    old = disk.snapshot()
    client.seek(handle, 0)
    client.write(handle, DATA)
    return old, disk


def contents_with_one_read_of(other: Mapping[str, bytes], disk: Disk, **config: object) -> set[bytes]:
    """What the object is read as, when one of all the reads comes from other files of the same names."""
    found = set()
    at = asked = 0
    while at <= asked:
        files = {name: bytearray(content) for name, content in disk.files.items()}
        hostile = HostileDisk(files, rpmb=copy.deepcopy(disk.rpmb), other=other)
        client = StorageRig(hostile, **config).session()
        hostile.at, hostile.way = at, "other"
        try:
            found.add(client.content(b"object"))
        except StorageError as error:
            assert error.result in ERRORS, (at, error)
        asked = len(hostile.asked)
        at += 1
    assert at > 15
    return found


def test_reads_of_another_guests_files() -> None:
    """They have the same shape and the same keys; none is taken for one of ours."""
    rig = StorageRig(seed=5)
    client = rig.session()
    client.close(client.create(b"other", b"theirs"))
    client.close(client.create(b"object", DATA[::-1]))
    disk = Disk({name: bytearray(content) for name, content in store().items()})
    assert contents_with_one_read_of(rig.disk.snapshot(), disk) == {DATA}


def test_reads_of_older_files() -> None:
    """Without an anchor the version before the last may be made to count, as a whole; with it nothing but the last."""
    assert contents_with_one_read_of(*changed_store()) == {DATA, OLD}
    anchored = {"rpmb_fs": True, "rpmb_write_key": True}
    assert contents_with_one_read_of(*changed_store(**anchored), **anchored) == {DATA}


@pytest.mark.parametrize("way", ["error", "short", "flip", "zeroes"])
def test_writes_survive_or_fail(way: str) -> None:
    """After a write that met a bad answer the object has its old or its new data, or is reported as corrupt."""
    files = store()
    for at in range(40):
        disk = HostileDisk({name: bytearray(content) for name, content in files.items()})
        client = StorageRig(disk).session()
        disk.at, disk.way = at, way
        try:
            handle = client.open(b"object", READ_WRITE)
            client.seek(handle, 4000)
            client.write(handle, b"!" * 300)
        except StorageError as error:
            assert error.result in ERRORS
        disk.at = -1
        client = StorageRig(Disk(disk.files)).session()
        try:
            assert client.content(b"object") in (DATA, DATA[:4000] + b"!" * 300 + DATA[4300:])
        except StorageError as error:
            assert error.result in (Result.CORRUPT_OBJECT, Result.ITEM_NOT_FOUND)


def test_a_corrupt_object_is_removed_and_its_handle_closed() -> None:
    disk = Disk({name: bytearray(content) for name, content in store().items()})
    rig = StorageRig(disk)
    client = rig.session()
    handle = client.open(b"object", SHARED_READ)
    disk.files["1"][5 * 4096 + 7] ^= 1  # in version 1 of block 1
    client.seek(handle, 5000)
    with pytest.raises(StorageError) as error:
        client.read(handle, 10)
    assert error.value.result == Result.CORRUPT_OBJECT
    assert sorted(disk.files) == ["0", "dirf.db"]
    assert client.enumerate() == [(b"other", 4)]
    assert not disk.open_files
    with pytest.raises(StorageError) as error:
        client.close(handle)
    assert error.value.result == Result.TARGET_DEAD


class KeepsHandles(StorageTest):
    uuid = UUID("b689f2a7-8adf-477a-9f99-32e90c0ad0a3")
    flags = TaFlag.DONT_CLOSE_HANDLE_ON_CORRUPT_OBJECT


def test_a_ta_may_keep_its_handle_on_a_corrupt_object() -> None:
    rig = StorageRig(extra_tas=(KeepsHandles,))
    client = rig.session(KeepsHandles.uuid)
    handle = client.create(b"object", DATA)
    rig.disk.files["0"][5 * 4096 + 7] ^= 1
    client.seek(handle, 5000)
    with pytest.raises(StorageError) as error:
        client.read(handle, 10)
    assert error.value.result == Result.CORRUPT_OBJECT
    client.close(handle)
    assert not rig.disk.open_files
    assert client.enumerate() == []


def test_swapped_lost_and_old_files_are_corrupt_objects() -> None:
    rig = StorageRig()
    client = rig.session()
    for name in (b"a", b"b", b"c"):
        client.close(client.create(name, name * 100))
    old = bytes(rig.disk.files["2"])
    for _ in range(2):  # an old copy: both versions in it are older than what the directory has
        handle = client.open(b"c")
        client.write(handle, b"new")
        client.close(handle)
    rig.disk.files["0"], rig.disk.files["1"] = rig.disk.files["1"], rig.disk.files["0"]
    rig.disk.files["2"][:] = old
    for name in (b"a", b"b", b"c"):
        with pytest.raises(StorageError) as error:
            client.open(name)
        assert error.value.result == Result.CORRUPT_OBJECT
    assert client.enumerate() == []
    client.close(client.create(b"a", b"again"))
    del rig.disk.files["0"]
    with pytest.raises(StorageError) as error:
        client.open(b"a")
    assert error.value.result == Result.CORRUPT_OBJECT


def test_an_old_copy_of_the_whole_store_opens() -> None:
    """REE FS has no anchor: what the model does is what OP-TEE does."""
    rig = StorageRig()
    client = rig.session()
    handle = client.create(b"object", b"old")
    old = rig.disk.snapshot()
    client.write(handle, b"new")
    rig = StorageRig(Disk({name: bytearray(content) for name, content in old.items()}))
    assert rig.session().content(b"object") == b"old"


@pytest.mark.parametrize("at", [20, 4162 + 10, 4162 + 40])
def test_a_damaged_directory_is_removed_by_the_call_that_meets_it(at: int) -> None:
    """Head tag, root hash, node content: that call fails, and an empty store begins over the old files."""
    files = {name: bytearray(content) for name, content in store().items()}
    slot = files["dirf.db"][64] < files["dirf.db"][132]
    files["dirf.db"][at + 68 * slot if at < 68 else at - 66 * (not slot)] ^= 1
    rig = StorageRig(Disk(files))
    with pytest.raises(StorageError) as error:
        rig.session().open(b"object")
    assert error.value.result == Result.CORRUPT_OBJECT
    client = rig.session()
    assert client.enumerate() == []
    client.close(client.create(b"fresh", b"data"))
    assert client.content(b"fresh") == b"data"
    assert sorted(files) == ["0", "1", "dirf.db"]
    assert sorted(independent.read(rig.disk.snapshot()).live) == ["0", "dirf.db"]


@needs_shared
def test_objects_of_a_real_store_open() -> None:
    """What a real OP-TEE wrote, the model reads, changes, and leaves whole."""
    expected = json.loads((STORES / "store-b/expected.json").read_text())
    owners = {each["ta"] for each in expected["objects"] if not each.get("raw")}
    tas = tuple(type("Owner", (StorageTest,), {"uuid": UUID(owner)}) for owner in owners)
    rig = StorageRig(Disk.load(STORES / "store-b/tee"), extra_tas=tas)
    for ta in tas:
        client = rig.session(ta.uuid)
        mine = {bytes.fromhex(each["id_hex"]): each for each in expected["objects"] if each["ta"] == str(ta.uuid)}
        assert dict(client.enumerate()) == {name: each["size"] for name, each in mine.items()}
        for name, each in mine.items():
            assert hashlib.sha256(client.content(name)).hexdigest() == each["sha256"]
            handle = client.open(name)
            client.seek(handle, 0, 2)
            client.write(handle, b"more")
            client.close(handle)


def write(disk: Disk, path: Path) -> Path:
    path.mkdir()
    for name, content in disk.files.items():
        (path / name).write_bytes(content)
    return path


@needs_shared
def test_what_the_model_changed_is_whole(tmp_path: Path) -> None:
    owner = type("Owner", (StorageTest,), {"uuid": OWNER})
    rig = StorageRig(Disk.load(STORES / "store-b/tee"), extra_tas=(owner,))
    client = rig.session(OWNER)
    for name, size in client.enumerate():
        handle = client.open(name)
        client.seek(handle, size // 2)
        client.write(handle, b"changed")
        client.truncate(handle, size * 3 // 4)
        client.close(handle)
    client.close(client.create(b"brand new", DATA, ALL))
    store = StoreReader(write(rig.disk, tmp_path / "tee"), StorageKeys())
    assert store.damages == []
    assert store.orphans == []
    assert len(store.objects) == 47
