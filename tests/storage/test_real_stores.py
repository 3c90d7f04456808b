"""Stores that a real OP-TEE wrote: what our reader finds in them, and what it says when they are damaged."""

import hashlib
import json
import shutil
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest

from optee.storage.describe import describe_store
from optee.storage.keys import StorageKeys
from optee.storage.store_reader import StoreReader
from tests.shared import SHARED, needs_shared
from tests.storage import independent
from tests.storage.rig import StorageError, StorageRig

pytestmark = needs_shared
STORES = SHARED / "stores"


def stores() -> list[tuple[str, dict]]:
    """Directory and expected contents of each."""
    found = []
    for path in sorted(STORES.glob("store-*/expected.json")):
        expected = json.loads(path.read_text())
        states = expected.get("states", [{**expected, "dir": "tee"}])
        found += [(f"{path.parent.name}/{state['dir']}", state) for state in states]
    return found


CASES = stores() if SHARED.is_dir() else []


def copy(name: str, to: Path) -> Path:
    """A copy of a real store that may be damaged."""
    shutil.copytree(STORES / name, to / "tee", copy_function=shutil.copyfile)
    return to / "tee"


def damages(path: Path) -> list[tuple[str, str]]:
    return [(damage.file, damage.part) for damage in StoreReader(path, StorageKeys()).damages]


@pytest.mark.parametrize(("name", "expected"), CASES, ids=[case[0] for case in CASES])
def test_contents(name: str, expected: dict) -> None:
    document = describe_store(StoreReader(STORES / name, StorageKeys()))
    found = {(each["ta"], each["id"]): each for each in document["objects"]}
    assert found.keys() == {(each["ta"], each["id"]) for each in expected["objects"]}
    compared = set(next(iter(found.values()), ())) | {"attr_hex"}
    for each in expected["objects"]:
        ours = found[each["ta"], each["id"]]
        for key in compared & each.keys():
            if each[key] is not None and not (ours["raw"] and key not in ours):
                assert ours[key] == each[key], (each["id"], key)
        assert ours["size"] == each["size"] and ours["sha256"] == each["sha256"]
        if "rsa_modulus_hex" in each:
            assert each["rsa_modulus_hex"] in ours["attr_hex"]
    assert document["free_entries"] == expected["free_entries"]
    assert document["orphans"] == expected["orphans"]
    assert document["damages"] == []
    assert document["half_made"] == bool(expected.get("half_made"))
    assert document["dirf"] == expected["dirf"]


def test_two_readers_agree() -> None:
    for name, expected in CASES:
        if expected.get("half_made"):
            continue
        ours = StoreReader(STORES / name, StorageKeys()).objects
        theirs = independent.read(STORES / name).objects
        assert [(o.entry.owner, o.entry.object_id, o.data) for o in ours] == [(o.owner, o.id, o.data) for o in theirs]


def test_entry_across_blocks(tmp_path: Path) -> None:
    """Of a damaged block of dirf.db the entries that lie wholly in other blocks are still checked and listed."""
    path = copy("store-b/tee", tmp_path)
    whole = StoreReader(path, StorageKeys())
    start = next(start for start, _, part in independent.read(path).live["dirf.db"] if part.startswith("block 1"))
    raw = bytearray((path / "dirf.db").read_bytes())
    raw[start + 4000] ^= 1
    (path / "dirf.db").write_bytes(raw)
    store = StoreReader(path, StorageKeys())
    assert [(d.file, d.part[:7]) for d in store.damages] == [("dirf.db", "block 1")]
    assert [o.index for o in store.objects] == [o.index for o in whole.objects if o.index < 4096 // 120]


def test_lost_swapped_and_old_files(tmp_path: Path) -> None:
    path = copy("store-torn/states/base/tee", tmp_path)
    lost = (path / "4").read_bytes()
    (path / "4").unlink()
    (damage,) = StoreReader(path, StorageKeys()).damages
    assert (damage.file, damage.part) == ("4", "file") and "lost" in damage.reason
    (path / "4").write_bytes(lost)
    names = [stored.entry.file_name for stored in StoreReader(path, StorageKeys()).objects]
    assert "0" in names  # the core's list of TAs, which is empty, and whose first node is like any other empty file's
    for one, other in combinations(names, 2):  # of the same TA, of another, and of the core
        first, second = (path / one).read_bytes(), (path / other).read_bytes()
        (path / one).write_bytes(second)
        (path / other).write_bytes(first)
        found = StoreReader(path, StorageKeys()).damages
        assert [(d.file, d.part) for d in found] == [(one, "file"), (other, "file")], found
        assert f"it is file {other}" in found[0].reason and f"it is file {one}" in found[1].reason
        (path / one).write_bytes(first)
        (path / other).write_bytes(second)
    newer = STORES / "store-torn/states/write-dirf-head-65/tee"
    shutil.copyfile(newer / "dirf.db", path / "dirf.db")
    (damage,) = StoreReader(path, StorageKeys()).damages
    assert (damage.file, damage.part) == ("2", "file") and "another version" in damage.reason
    (path / "dirf.db").unlink()
    assert damages(path) == [("dirf.db", "file")]


@pytest.mark.parametrize("size", [0, 1, 100, 135, 136, 4161, 4162, 4227, 8192, 12287])
def test_cut_directory(tmp_path: Path, size: int) -> None:
    path = copy("store-torn/states/base/tee", tmp_path)
    raw = (path / "dirf.db").read_bytes()
    (path / "dirf.db").write_bytes(raw[:size])
    assert damages(path)[0][0] == "dirf.db"


def test_all_blocks_of_all_objects_count(tmp_path: Path) -> None:
    """One flipped byte in each file of the large store: its object alone is corrupt."""
    path = copy("store-b/tee", tmp_path)
    live = independent.read(path).live
    for name, parts in live.items():
        blocks = [start for start, _, part in parts if part.startswith("block")]
        if name == "dirf.db" or not blocks:
            continue
        raw = (path / name).read_bytes()
        changed = bytearray(raw)
        changed[blocks[-1] + 4095] ^= 0x20
        (path / name).write_bytes(changed)
        store = StoreReader(path, StorageKeys())
        bad = [o for o in store.objects if o.entry.file_name == name]
        assert [str(d) for o in bad for d in o.damages] == [f"{name}: {parts[-1][2]}: tag does not match"]
        (path / name).write_bytes(raw)


def test_counter_set_back_looks_like_an_interrupted_commit(tmp_path: Path) -> None:
    """Byte for byte the same as a head whose write was cut: no damage, but a note."""
    path = copy("store-a/tee", tmp_path)
    raw = bytearray((path / "dirf.db").read_bytes())
    raw[64] ^= 2
    (path / "dirf.db").write_bytes(raw)
    store = StoreReader(path, StorageKeys())
    assert store.tree is not None and store.tree.torn
    assert "interrupted" in describe_store(store)["notes"][0]


@pytest.mark.parametrize(("huk", "chip_id"), [(b"\1" * 16, b"BEEF" * 8), (bytes(16), b"BEEG" * 8)])
def test_wrong_keys(huk: bytes, chip_id: bytes) -> None:
    (damage,) = StoreReader(STORES / "store-a/tee", StorageKeys(huk, chip_id)).damages
    assert (damage.file, damage.part) == ("dirf.db", "head slot 0")
    assert "keys" in damage.reason


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = copy("store-a/tee", tmp_path)
    before = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in path.iterdir()}
    describe_store(StoreReader(path, StorageKeys()))
    assert {file.name: hashlib.sha256(file.read_bytes()).digest() for file in path.iterdir()} == before


def test_counter_of_the_first_commit(tmp_path: Path) -> None:
    """A new store: without that counter OP-TEE would take it for one whose making was interrupted."""
    for value, part in ((b"\1\0\0\0", None), (b"\0\0\0\0", None), (b"\4\0\0\0", "head slot 1")):
        fresh = StorageRig()
        with suppress(StorageError):
            fresh.session().open(b"nothing")
        content = fresh.disk.files["dirf.db"]
        content[132:136] = value
        (tmp_path / "dirf.db").write_bytes(content)
        assert damages(tmp_path) == ([("dirf.db", part)] if part else [])
