"""The power fails at any RPC of an operation on RPMB, or on files that are anchored there: old or new, nothing between.

A sample of the cuts runs here, every one in the nightly run.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest

from guests.rpmb import RpmbDevice
from optee.abi.results import Result
from optee.abi.rpmb import REQUEST_SIZE, FrameType
from optee.storage.options import OPTEE, StorageOptions
from optee.tas.secure_storage_test import StorageTest
from tests.optee.rig import Rpc
from tests.storage import independent
from tests.storage.rig import MANAGED, PRIVATE, RPMB, Client, Disk, StorageError, StorageRig
from tests.storage.test_power_cut import NIGHTLY, OLD, OPERATIONS, OTHER, create, overwrite, shorten

CONFIG = {"rpmb_fs": True, "rpmb_write_key": True}


class Place(NamedTuple):
    storage: int
    memory: StorageOptions = OPTEE


IN_RPMB = Place(RPMB)
SMALL = replace(MANAGED, rpmb_fs_cache_entries=5)
STORAGES = {
    "rpmb": IN_RPMB,
    "anchored": Place(PRIVATE),
    "rpmb-managed": Place(RPMB, MANAGED),
    "rpmb-small": Place(RPMB, SMALL),
    "anchored-managed": Place(PRIVATE, SMALL),
}
EARLY, STEP, LATE = 3, 17, 6


def sample(total: int) -> Iterator[int]:
    """Cuts that are tried: the first, the last, where an operation takes effect, and some between."""
    late = EARLY if NIGHTLY else max(EARLY, total - LATE)
    yield from range(min(EARLY, total))
    yield from range(EARLY, late, 1 if NIGHTLY else STEP)
    yield from range(late, total + 1)


def start(disk: Disk, storage: Place) -> Client:
    return StorageRig(disk, storage=storage.memory, **CONFIG).session(storage=storage.storage)


@cache
def prepared(storage: Place) -> Disk:
    """A store in which objects and directory have been changed before."""
    disk = Disk(rpmb=RpmbDevice())
    client = start(disk, storage)
    client.close(client.create(b"gone"))
    handle = client.create(b"object", b"?" * len(OLD))
    client.write(handle, OLD)
    client.close(handle)
    client.close(client.create(b"other", OTHER))
    client.unlink(client.open(b"gone"))
    return disk


def disk(storage: Place) -> Disk:
    return copy.deepcopy(prepared(storage))


@cache
def length(operation: Callable[[Client], None], storage: Place) -> int:
    """RPCs of an undisturbed run, and of what opens the store."""
    files = disk(storage)
    files.asked.clear()
    operation(start(files, storage))
    return len(files.asked)


def found(files: Disk, storage: Place) -> dict[bytes, bytes]:
    """What lies in the store, read by itself."""
    if storage.storage == RPMB:
        return independent.rpmb_objects(bytes(files.rpmb.content), StorageTest.uuid.bytes_le)
    return independent.read(files.snapshot(), independent.anchor(files.rpmb)).by_id


def cut(operation: Callable[[Client], None], storage: Place, at: int) -> bool:
    """Cut the power, restart, and compare: True if the object is new."""
    files = disk(storage)
    client = start(files, storage)
    files.cut_after = at
    finished = True
    try:
        operation(client)
    except StorageError:
        finished = False
    files.cut_after = None
    files.open_files.clear()
    rest = {b"other": OTHER}
    old, new = {b"object": OLD} | rest, OPERATIONS[operation] | rest
    got = found(files, storage)
    assert got in (old, new), at
    assert got == new or not finished
    is_new = got == new
    client = start(files, storage)
    assert {object_id: client.content(object_id) for object_id, _ in client.enumerate()} == got, at
    client.close(client.create(b"next", b"next"))
    client.unlink(client.open(b"other"))
    del got[b"other"]
    assert found(files, storage) == got | {b"next": b"next"}
    return is_new


CASES = [
    pytest.param(operation, place, id=f"{operation.__name__}-{name}")
    for operation in OPERATIONS
    for name, place in STORAGES.items()
    if NIGHTLY or place.memory is OPTEE or operation in (create, overwrite, shorten)
]


@pytest.mark.parametrize(("operation", "storage"), CASES)
def test_cut_at_every_rpc(operation: Callable[[Client], None], storage: Place) -> None:
    outcomes = [cut(operation, storage, at) for at in sample(length(operation, storage))]
    assert outcomes == sorted(outcomes), "once new, new for good"
    assert not outcomes[0] and outcomes[-1]


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_a_first_use_that_is_cut(storage: Place) -> None:
    """Format, key and first object, cut everywhere: the next start begins anew, or goes on with what is there."""
    first = Disk(rpmb=RpmbDevice())
    start(first, storage).create(b"object", b"old")
    outcomes = []
    for at in sample(len(first.asked)):
        files = Disk(rpmb=RpmbDevice(), cut_after=at)
        with suppress(StorageError):
            start(files, storage).create(b"object", b"old")
        files.cut_after = None
        files.open_files.clear()
        client = start(files, storage)
        left = {name: client.content(name) for name, _ in client.enumerate()}
        assert left in ({}, {b"object": b"old"})
        outcomes.append(bool(left))
        client.close(client.create(b"object", b"again", 0x407))
        assert found(files, storage) == {b"object": b"again"}
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]


def test_what_an_interrupted_creation_left_is_not_continued() -> None:
    """A long object that was never finished leaves nothing of itself in a short one of the same id."""
    total = length(create, IN_RPMB)
    for at in (total // 4, total // 2, total - 2):
        files = disk(IN_RPMB)
        client = start(files, IN_RPMB)
        files.cut_after = at
        with pytest.raises(StorageError):
            create(client)
        files.cut_after = None
        assert any(b"/." in bytes(name) for name in files.rpmb.content.split(b"\0"))
        client = start(files, IN_RPMB)
        client.close(client.create(b"fresh", b"short"))
        assert found(files, IN_RPMB)[b"fresh"] == b"short"
        assert client.content(b"fresh") == b"short"


class HoldingDisk(Disk):
    """Holds back the first request to write, once it is told to, and everything after it."""

    holds = False
    held = b""

    def serve_rpmb(self, rig: StorageRig, rpc: Rpc) -> Result:
        asked = rpc.params[0]
        request = rig.memory.read(rig.supplicant.buffers[asked.c] + asked.a, asked.b)
        if self.holds and request[-2:] == bytes([0, FrameType.WRITE]):
            self.held = self.held or request
            return Result.GENERIC
        return super().serve_rpmb(rig, rpc)


def test_a_request_that_was_held_back_is_void() -> None:
    """A write that never reached the device must not be done after a restart, over what is there then."""
    files = HoldingDisk(rpmb=RpmbDevice())
    client = start(files, IN_RPMB)
    handle = client.create(b"object", b"first")
    files.holds = True
    with pytest.raises(StorageError):
        client.write(handle, b"held!")
    files.holds = False
    assert start(files, IN_RPMB).content(b"object") == b"first"
    files.rpmb.write(files.held[REQUEST_SIZE:])
    assert found(files, IN_RPMB) == {b"object": b"first"}
