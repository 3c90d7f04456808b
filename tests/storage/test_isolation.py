"""Whose files open where: the keys are the machine's, unless each guest is given keys of its own."""

import shutil
from pathlib import Path

import pytest

from guests import Supplicant
from mediator.board import Board
from mediator.cli import run
from optee.abi.results import Result
from optee.config import Config
from optee.storage.keys import StorageKeys
from optee.storage.store_reader import StoreReader
from optee.tas.secure_storage_test import StorageTest
from tests.storage.test_through_the_mediator import PRIVATE, contents, keep

ALICE, BOB = 3, 7
"""Client ids."""
TA = str(StorageTest.uuid)
MISSING, CORRUPT = Result.ITEM_NOT_FOUND, Result.CORRUPT_OBJECT


async def life(board: Board, client_id: int, store: Path, objects: dict[bytes, bytes]) -> dict[bytes, bytes | Result]:
    """Boot a guest on this directory, let it create objects, and say what it finds then of all that there may be."""
    vm = await board.create("kvm", client_id=client_id)
    async with board.boot(vm, Supplicant(storage=store)) as guest:
        for name, data in objects.items():
            assert await keep(guest, PRIVATE, name, data) == Result.SUCCESS
        found = await contents(guest, (b"of alice", b"of bob"))
    await board.destroy(vm)
    return found


async def two_stores(board: Board, path: Path) -> tuple[Path, Path]:
    """What each guest wrote into its own directory; the objects lie in files of the same names."""
    alice, bob = path / "alice", path / "bob"
    assert await life(board, ALICE, alice, {b"of alice": b"secret"}) == {b"of alice": b"secret", b"of bob": MISSING}
    assert await life(board, BOB, bob, {b"of bob": b"mine"}) == {b"of alice": MISSING, b"of bob": b"mine"}
    assert sorted(file.name for file in alice.iterdir()) == sorted(file.name for file in bob.iterdir())
    return alice, bob


@pytest.mark.parametrize("own_keys", [False, True], ids=["keys of the machine", "keys of each guest"])
async def test_another_guests_directory(own_keys: bool, tmp_path: Path) -> None:
    """As with a real OP-TEE it opens; with keys of its own for each guest nothing of it does."""
    async with Board(config=Config(guest_storage_keys=own_keys)) as board:
        alice, _ = await two_stores(board, tmp_path)
        shutil.copytree(alice, tmp_path / "transplant")
        found = await life(board, BOB, tmp_path / "transplant", {})
        assert found[b"of alice"] == (CORRUPT if own_keys else b"secret")
        assert (await life(board, ALICE, alice, {}))[b"of alice"] == b"secret"
        assert board.violations == []


@pytest.mark.parametrize("own_keys", [False, True], ids=["keys of the machine", "keys of each guest"])
async def test_another_guests_file(own_keys: bool, tmp_path: Path) -> None:
    """The directory names it by its root hash: another one in its place never opens."""
    async with Board(config=Config(guest_storage_keys=own_keys)) as board:
        alice, bob = await two_stores(board, tmp_path)
        shutil.copy(alice / "0", bob / "0")
        assert await life(board, BOB, bob, {}) == {b"of alice": MISSING, b"of bob": CORRUPT}
        assert board.violations == []


async def test_the_store_command_reads_a_guests_own_keys(tmp_path: Path, capsysbinary: pytest.CaptureFixture) -> None:
    async with Board(config=Config(guest_storage_keys=True)) as board:
        alice, _ = await two_stores(board, tmp_path)
    assert StoreReader(alice, StorageKeys(guest=ALICE)).damages == []
    assert StoreReader(alice, StorageKeys()).damages != []
    assert run(["store", "cat", str(alice), "of alice", "--ta", TA, "--guest", str(ALICE)]) == 0
    assert capsysbinary.readouterr().out == b"secret"
    assert run(["store", "check", str(alice), "--guest", str(BOB)]) == 1
    assert b"head" in capsysbinary.readouterr().out


def test_keys_differ_for_each_guest_and_from_the_machines() -> None:
    sealed = {StorageKeys(guest=guest).encrypt_fek(bytes(16), bytes(16)) for guest in (None, 1, 2, 256, 65535)}
    assert len(sealed) == 5
