"""A guest's clients, its driver and tee-supplicant, the mediator, and OP-TEE's secure storage in real directories."""

from pathlib import Path

import pytest
import trio

from guests import Direction, Guest, Supplicant, TeeError, Temporary, Value
from guests.client import Session
from mediator.board import Board
from optee.abi.results import Result
from optee.storage.keys import StorageKeys
from optee.storage.store_reader import StoreReader
from optee.tas.secure_storage import SecureStorage
from optee.tas.secure_storage_test import StorageTest
from tests.storage import independent
from tests.storage.rig import ALL, PRIVATE

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


async def create(session: Session, name: bytes, data: bytes) -> int:
    storage = Value(0, PRIVATE, direction=IN)
    outputs = await session.invoke(4, text(name), Value(ALL), storage, text(data))
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
