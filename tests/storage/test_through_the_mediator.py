"""A guest's clients, its driver and tee-supplicant, the mediator, and OP-TEE's secure storage in real directories."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from guests import Direction, Guest, RpmbDevice, Supplicant, TeeError, Temporary, Value
from guests.client import Session
from mediator.board import Board
from mediator.core.policy import Policy
from mediator.policies import load_policy
from optee.abi.results import Result
from optee.config import Config
from optee.storage.keys import StorageKeys
from optee.storage.store_reader import StoreReader
from optee.tas.secure_storage import SecureStorage
from optee.tas.secure_storage_test import StorageTest
from tests.storage import independent
from tests.storage.rig import ALL, PRIVATE, RPMB

IN, OUT = Direction.INPUT, Direction.OUTPUT
READ_RAW, WRITE_RAW, DELETE = range(3)
LARGE = bytes(range(251)) * 400


def text(data: bytes) -> Temporary:
    return Temporary(data, direction=IN)


async def put(session: Session, name: bytes, data: bytes) -> None:
    await session.invoke(WRITE_RAW, text(name), text(data))


async def get(session: Session, name: bytes, size: int = 20000) -> bytes:
    _, output = await session.invoke(READ_RAW, text(name), Temporary(size=size, direction=OUT))
    return output.data


async def create(session: Session, name: bytes, data: bytes, storage: int = PRIVATE) -> int:
    place = Value(0, storage, direction=IN)
    outputs = await session.invoke(4, text(name), Value(ALL), place, text(data))
    return outputs[1].b


@pytest.mark.parametrize("flavour", ["kvm", "xen"])
async def test_example(flavour: str, tmp_path: Path) -> None:
    async with Board() as board:
        for expected in (Result.ITEM_NOT_FOUND, b"data"):  # the second boot finds what the first one left
            async with (
                board.guest(flavour, supplicant=Supplicant(storage=tmp_path)) as guest,
                guest.context() as context,
                await context.open_session(SecureStorage.uuid) as session,
            ):
                if isinstance(expected, bytes):
                    assert await get(session, b"object") == expected
                else:
                    with pytest.raises(TeeError) as error:
                        await get(session, b"object")
                    assert error.value.result == expected
                await put(session, b"object", b"data")
        assert board.violations == []
    assert StoreReader(tmp_path, StorageKeys()).damages == []


async def test_concurrent_sessions(tmp_path: Path) -> None:
    """xtest 6016: sessions create, write, read and delete at once; the file system's lock makes them wait."""

    async def work(guest: Guest, number: int) -> None:
        async with guest.context() as context, await context.open_session(StorageTest.uuid) as session:
            for turn in range(3):
                name, data = b"object %d" % number, bytes([number, turn]) * 3000
                handle = await create(session, name, data)
                await session.invoke(5, Value(handle, 0, direction=IN), Value(0, direction=IN))
                output, _ = await session.invoke(2, Temporary(size=8000, direction=OUT), Value(handle))
                assert output.data == data
                await session.invoke(6 if turn < 2 else 1, Value(handle, direction=IN))

    async with Board() as board:
        async with (
            board.guest("kvm", supplicant=Supplicant(storage=tmp_path)) as guest,
            trio.open_nursery() as nursery,
        ):
            for number in range(4):
                nursery.start_soon(work, guest, number)
        assert board.violations == []
        assert not any(board.left().values())
    found = independent.read(tmp_path).by_id
    assert found == {b"object %d" % number: bytes([number, 2]) * 3000 for number in range(4)}


async def test_two_guests(tmp_path: Path) -> None:
    """Each guest's objects are in its own directory; a large object of one (6018) does not touch the other."""
    places = [tmp_path / "first", tmp_path / "second"]
    async with Board() as board:
        async with (
            board.guest("kvm", supplicant=Supplicant(storage=places[0])) as first,
            board.guest("xen", supplicant=Supplicant(storage=places[1])) as second,
        ):
            for guest, data in ((first, LARGE), (second, b"small")):
                async with guest.context() as context, await context.open_session(StorageTest.uuid) as session:
                    await create(session, b"object", data)
        assert board.violations == []
    assert [independent.read(place).by_id for place in places] == [{b"object": LARGE}, {b"object": b"small"}]


RPMB_CONFIG = Config(rpmb_fs=True, rpmb_write_key=True)
NO_ANCHOR = replace(RPMB_CONFIG, ree_fs_integrity_rpmb=False)


def owned_by(name: str | None) -> Policy:
    return replace(load_policy("default"), rpmb_owner=name)


async def keep(guest: Guest, storage: int, name: bytes = b"object", data: bytes = b"data") -> Result:
    """Create an object and read it back."""
    async with guest.context() as context, await context.open_session(StorageTest.uuid) as session:
        try:
            handle = await create(session, name, data, storage)
            output, _ = await session.invoke(2, Temporary(size=100, direction=OUT), Value(handle))
        except TeeError as error:
            return Result(error.result)
        assert output.data == data
        return Result.SUCCESS


@pytest.mark.parametrize("owner", ["kvm-1", "xen-2", None, "any", "who?"])
async def test_the_device_belongs_to_one_guest(owner: str | None) -> None:
    """Both VMs have a device; OP-TEE's requests for it reach the owner's only."""
    devices = {name: RpmbDevice() for name in ("kvm-1", "xen-2")}
    async with Board(owned_by(owner), NO_ANCHOR) as board:
        async with (
            board.guest("kvm", "kvm-1", supplicant=Supplicant(rpmb=devices["kvm-1"])) as first,
            board.guest("xen", "xen-2", supplicant=Supplicant(rpmb=devices["xen-2"])) as second,
        ):
            for guest in (first, second):
                mine = owner in (guest.name, "any")
                assert await keep(guest, RPMB) == (Result.SUCCESS if mine else Result.STORAGE_NOT_AVAILABLE)
                assert (devices[guest.name].write_counter > 0) == mine
                assert await keep(guest, PRIVATE) == Result.SUCCESS, "files are each guest's own"
        assert board.violations == []
        assert not any(board.left().values())


@pytest.mark.parametrize("write_key", [True, False])
async def test_probing_for_the_kernels_devices_leads_to_the_supplicants(write_key: bool) -> None:
    """RPMB_PROBE_RESET is not mediated: OP-TEE is told NOT_SUPPORTED, and asks by RPMB (R4, R18)."""
    device = RpmbDevice()
    device.key = StorageKeys().rpmb_key(device.cid)
    async with Board(owned_by("kvm-1"), replace(NO_ANCHOR, rpmb_write_key=write_key)) as board:
        async with board.guest("kvm", "kvm-1", supplicant=Supplicant(rpmb=device)) as guest:
            assert await keep(guest, RPMB) == Result.SUCCESS
        assert board.violations == []


async def test_the_anchor_needs_the_device(tmp_path: Path) -> None:
    """Anchored, REE FS is the owner's alone; an old copy of its files is refused after a restart."""
    device, store = RpmbDevice(), tmp_path / "tee"
    async with Board(owned_by("kvm-1"), RPMB_CONFIG) as board:
        async with (
            board.guest("kvm", "kvm-1", supplicant=Supplicant(storage=store, rpmb=device)) as owner,
            board.guest("kvm", "kvm-2", supplicant=Supplicant(rpmb=device)) as other,
        ):
            assert await keep(owner, PRIVATE) == Result.SUCCESS
            assert await keep(other, PRIVATE) == Result.STORAGE_NOT_AVAILABLE
            shutil.copytree(store, tmp_path / "old")
            assert await keep(owner, PRIVATE, b"second") == Result.SUCCESS
        for path, expected in ((tmp_path / "old", Result.CORRUPT_OBJECT), (store, Result.SUCCESS)):
            async with board.guest("kvm", "kvm-1", supplicant=Supplicant(storage=path, rpmb=device)) as owner:
                assert await keep(owner, PRIVATE, b"third") == expected
        assert board.violations == []
        assert not any(board.left().values())


async def contents(guest: Guest, names: Sequence[bytes]) -> dict[bytes, bytes | Result]:
    """What each of these objects holds, or why it does not open."""
    found: dict[bytes, bytes | Result] = {}
    async with guest.context() as context, await context.open_session(StorageTest.uuid) as session:
        for name in names:
            try:
                outputs = await session.invoke(0, text(name), Value(ALL), Value(PRIVATE, direction=IN))
                output, _ = await session.invoke(2, Temporary(size=20000, direction=OUT), Value(outputs[1].b))
                found[name] = output.data
            except TeeError as error:
                found[name] = Result(error.result)
    return found
