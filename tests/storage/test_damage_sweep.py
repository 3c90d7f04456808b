"""Each byte of a store changed, each file cut, lost or replaced: what `store check` says, and nothing else.

Which bytes are live is said by the second reader.
"""

import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from guests.rpmb import RpmbDevice
from optee.storage.describe import dump_store
from optee.storage.keys import StorageKeys
from optee.storage.layout import node_offset
from optee.storage.store_reader import NotAStoreError, StoreReader
from optee.storage.tree_reader import TreeReader
from tests.shared import SHARED, needs_shared
from tests.storage import independent
from tests.storage.rig import Disk, StorageRig

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
STORES = SHARED / "stores"
MASKS = (*(1 << bit for bit in range(8)), 0x06, 0x07, 0xFF)
HEADS = 2 * 68
COUNTER = 64  # in a head


def damages(path: Path) -> list[tuple[str, str]]:
    return [(damage.file, damage.part) for damage in StoreReader(path, StorageKeys()).damages]


def own_store(path: Path) -> Path:
    """A store of ours: blocks that were rewritten, a node without a block, short objects, a free entry, an orphan."""
    rig = StorageRig()
    session = rig.session()
    big = session.create(b"big", bytes(range(256)) * 100)
    session.close(session.create(b"key", b"k" * 40))
    session.close(session.create(b"", b""))
    session.unlink(session.create(b"gone", b"g" * 5000))
    cut = session.create(b"cut", b"c" * 20000)
    session.truncate(cut, 2 * 4096 - 24)  # with the header two whole blocks, of three nodes
    session.close(cut)
    for position in (3, 9000, 9001, 20000, 9002):
        session.seek(big, position)
        session.write(big, b"rewritten")
    session.close(big)
    path.mkdir()
    for name, content in rig.disk.files.items():
        (path / name).write_bytes(content)
    (path / "77").write_bytes(b"left over")
    return path


def real_store(name: str, path: Path) -> Path:
    shutil.copytree(STORES / name, path, copy_function=shutil.copyfile)
    return path


def store(name: str, tmp_path: Path) -> Path:
    return own_store(tmp_path / "own") if name == "own" else real_store(name, tmp_path / "tee")


ALL = ["own", *(pytest.param(name, marks=needs_shared) for name in ("store-a/tee", "store-torn/states/base/tee"))]


def looks_like_a_cut(before: bytes, changed: bytes) -> bool:
    """Whether the heads of dirf.db read as if the write of the newer one had been cut in its counter."""
    counters = [struct.unpack_from("<I", before, 68 * slot + COUNTER)[0] for slot in (0, 1)]
    slot = 0 if counters[0] > counters[1] else 1
    newest = counters[slot]
    previous = struct.pack("<I", newest - 2)
    left = changed[68 * slot + COUNTER :][:4]
    return any(left == struct.pack("<I", newest)[:size] + previous[size:] for size in range(4))


def looks_newest(before: bytes, changed: bytes) -> str | None:
    """The dead head of dirf.db, if its counter makes it the live one now."""
    counters = [struct.unpack_from("<I", before, 68 * slot + COUNTER)[0] for slot in (0, 1)]
    dead = 1 if counters[0] > counters[1] else 0
    counter = struct.unpack_from("<I", changed, 68 * dead + COUNTER)[0]
    return f"head slot {dead}" if counter & 1 == dead and counter > max(counters) else None


def can_be_read(path: Path) -> bool:
    try:
        independent.read(path)
    except (AssertionError, InvalidTag, FileNotFoundError, KeyError):
        return False
    return True


def check_flip(path: Path, file: Path, raw: bytes, offset: int, mask: int, part: str | None) -> None:
    changed = bytearray(raw)
    changed[offset] ^= mask
    file.write_bytes(changed)
    found = damages(path)
    if file.name == "dirf.db" and offset < HEADS and offset % 68 >= COUNTER:
        if part is None:
            part = looks_newest(raw, changed)
        elif not can_be_read(path):
            found = found[:1]  # and what the version before has lost
        elif looks_like_a_cut(raw, changed):
            part = None
    assert found == ([(file.name, part)] if part else []), (file.name, offset, hex(mask), part)


def structures(name: str, live: list[tuple[int, int, str]]) -> Iterator[tuple[int, int]]:
    """Bytes of live heads and nodes, and of both counters of dirf.db, with masks to change them by.

    All bytes of heads, flags and the first nodes; of later nodes, unless at night, a few.
    """
    for slot in (0, 1) if name == "dirf.db" or NIGHTLY else ():
        yield from ((68 * slot + COUNTER + place, mask) for place in range(4) for mask in MASKS)
    for start, end, part in live:
        if not part.startswith("block"):
            dense = NIGHTLY or part.startswith("head") or part.split()[1] in {"1", "2"}
            for offset in range(start, end) if dense else (start, start + 31, start + 40, start + 50):
                yield from ((offset, mask) for mask in (MASKS if NIGHTLY else (MASKS[offset % 8],)))
            if part.startswith("node"):
                yield from ((start + 64, mask) for mask in MASKS)
                yield from ((start + 65, mask) for mask in (0x01, 0x80))


@pytest.mark.parametrize("name", ALL)
def test_each_byte_of_heads_and_nodes(name: str, tmp_path: Path) -> None:
    """The one damage that is told is that of the head or node in which the byte lies."""
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for offset, mask in structures(file.name, truth.live[file.name]) if file.name in truth.live else ():
            check_flip(path, file, raw, offset, mask, truth.part(file.name, offset))
        file.write_bytes(raw)
    assert damages(path) == []


@pytest.mark.parametrize("name", ALL)
def test_bytes_of_blocks(name: str, tmp_path: Path) -> None:
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    chance = random.Random(8)
    for name_, parts in truth.live.items():
        file = path / name_
        raw = file.read_bytes()
        for start, end, part in parts:
            if part.startswith("block"):
                offsets = range(start, end, 31) if NIGHTLY else [start, end - 1, chance.randrange(start, end)]
                for offset in offsets:
                    check_flip(path, file, raw, offset, 1 << chance.randrange(8), part)
        file.write_bytes(raw)


@pytest.mark.parametrize("name", [*ALL, pytest.param("store-b/tee", marks=needs_shared)])
def test_all_that_is_dead_changed_at_once(name: str, tmp_path: Path) -> None:
    """Every byte that no live version needs: nothing is said, and the same objects are there."""
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    before = [(each.entry, each.data) for each in StoreReader(path, StorageKeys()).objects]
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        changed = bytearray(byte ^ 0xA5 for byte in raw)
        for start, end, _ in truth.live.get(file.name, ()):
            changed[start:end] = raw[start:end]
        if file.name == "dirf.db":
            for slot in (0, 1):  # the larger counter decides, so both count
                counter = slice(68 * slot + COUNTER, 68 * slot + 68)
                changed[counter] = raw[counter]
        file.write_bytes(changed)
    after = StoreReader(path, StorageKeys())
    assert after.damages == []
    assert [(each.entry, each.data) for each in after.objects] == before


@needs_shared
def test_random_bytes_of_a_large_store(tmp_path: Path) -> None:
    path = real_store("store-b/tee", tmp_path / "tee")
    truth = independent.read(path)
    chance = random.Random(88)
    for _ in range(3000 if NIGHTLY else 60):
        name = chance.choice(sorted(truth.live))
        file, live = path / name, truth.live[name]
        raw = file.read_bytes()
        start, end, _ = chance.choice(live) if chance.random() < 0.8 else (HEADS, len(raw), "")
        offset = chance.randrange(start, end)
        check_flip(path, file, raw, offset, chance.randrange(1, 256), truth.part(name, offset))
        file.write_bytes(raw)


@pytest.mark.parametrize("name", ALL)
def test_every_node_overwritten(name: str, tmp_path: Path) -> None:
    """A whole node of nonsense: it is named, and not those above and below it, whose blocks can still be read."""
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    for name_, parts in truth.live.items():
        raw = (path / name_).read_bytes()
        for start, end, part in parts:
            if part.startswith("node"):
                (path / name_).write_bytes(raw[:start] + bytes(range(7, 7 + end - start)) + raw[end:])
                found = damages(path)
                if part.startswith("node 1 "):
                    assert found and {file for file, _ in found} == {name_}
                else:
                    assert found == [(name_, part)]
        (path / name_).write_bytes(raw)


@pytest.mark.parametrize("name", ALL)
def test_cut_at_many_lengths(name: str, tmp_path: Path) -> None:
    """Damage is told if and only if a live byte is lost, and the file is the one."""
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    for name_, parts in truth.live.items():
        file = path / name_
        raw = file.read_bytes()
        edges = {edge + step for start, end, _ in parts for edge in (start, end) for step in (-1, 0, 1)}
        step = 61 if NIGHTLY else 2999
        lengths = sorted({0, 1, *range(60, 140, 8), *edges, *range(0, len(raw), step)})
        needed = max(end for _, end, _ in parts)
        for length in lengths:
            if 0 <= length < len(raw):
                file.write_bytes(raw[:length])
                assert {each for each, _ in damages(path)} == ({name_} if length < needed else set()), (name_, length)
        file.write_bytes(raw)


@pytest.mark.parametrize("name", ALL)
def test_zeroed(name: str, tmp_path: Path) -> None:
    """Parts of files that are zeroes, as after a crash of the guest's own file system."""
    path = store(name, tmp_path)
    truth = independent.read({file.name: file.read_bytes() for file in path.iterdir()})
    for name_ in truth.live:
        file = path / name_
        raw = file.read_bytes()
        for start, end in ((0, HEADS), (0, 4096), (4096, 8192), (0, len(raw)), (0, 512)):
            file.write_bytes(raw[:start] + bytes(end - start) + raw[end:] if end <= len(raw) else bytes(len(raw)))
            found = damages(path)
            assert found and {each for each, _ in found} == {name_}, (name_, start, end)
        file.write_bytes(raw)


def test_replaced_files(tmp_path: Path) -> None:
    """What stands in the place of a file and is none: it is named, and the other objects are still looked at."""
    path = own_store(tmp_path / "own")
    numbers = [each.entry.file_name for each in StoreReader(path, StorageKeys()).objects]
    for name in (*numbers, "dirf.db"):
        file = path / name
        raw = file.read_bytes()
        file.unlink()
        assert damages(path) == [(name, "file")]
        file.mkdir()
        assert damages(path) == [(name, "file")]
        file.rmdir()
        file.symlink_to(tmp_path / "nowhere")
        assert damages(path) == [(name, "file")]
        file.unlink()
        os.mkfifo(file)
        assert damages(path) == [(name, "file")]
        file.unlink()
        with file.open("wb") as sparse:
            sparse.truncate((1 << 30) + 1)
        assert damages(path) == [(name, "file")]
        file.unlink()
        file.symlink_to(file)
        with pytest.raises(NotAStoreError, match="symbolic links"):
            damages(path)
        file.unlink()
        (tmp_path / "elsewhere").write_bytes(raw)
        file.symlink_to(tmp_path / "elsewhere")
        assert damages(path) == []
        file.unlink()
        file.write_bytes(raw)


def test_sealed_nonsense(tmp_path: Path) -> None:
    """Whoever has the keys can seal anything; it must not keep the reader busy."""
    keys = StorageKeys()
    for length, last in ((2**64 - 1, 2**32 - 1), (2**40, 1), (4097, 0), (1, 2**32 - 1), (10, 5)):
        rig = StorageRig()
        rig.session().create(b"one", b"content")
        raw = bytearray(rig.disk.files["dirf.db"])
        tree = TreeReader("dirf.db", bytes(raw), keys, None)
        assert tree.slot is not None and tree.head is not None and tree.meta is not None and tree.root_hash is not None
        cipher = keys.open_file(None, tree.head.enc_fek)
        meta = tree.meta._replace(length=length, max_node_id=last)
        head = cipher.seal_head(tree.head.iv, meta, tree.root_hash, tree.head.counter)
        raw[68 * tree.slot : 68 * tree.slot + 68] = head.pack()
        again = TreeReader("dirf.db", bytes(raw), keys, None)
        assert again.damages
        assert not again.block_damages() or length <= 4096
        assert node_offset(1, 1) < len(raw)


@pytest.mark.parametrize("name", ALL)
def test_heavy_damage_is_described(name: str, tmp_path: Path) -> None:
    """Pieces overwritten, moved, cut out and mixed between files: each command has an answer."""
    path = store(name, tmp_path)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    chance = random.Random(888)
    for _ in range(2000 if NIGHTLY else 40):
        for _ in range(chance.randrange(1, 4)):
            file = path / chance.choice(sorted(whole))
            content = bytearray(file.read_bytes())
            start = chance.choice((chance.randrange(len(content) + 1), chance.randrange(140), 4096))
            size = chance.choice((1, 4, 66, 68, 132, 4096, chance.randrange(1, 9000)))
            other = whole[chance.choice(sorted(whole))]
            pieces = (bytes(size), chance.randbytes(size), other[start : start + size], other, b"")
            content[start : start + size] = chance.choice(pieces)
            file.write_bytes(content)
        reader = StoreReader(path, StorageKeys())
        document = dump_store(reader)
        assert bool(document["damages"]) == bool(reader.damages)
        assert all(each["sha256"] for each in document["objects"] if each["status"] == "ok")
        for file_name, content in whole.items():
            (path / file_name).write_bytes(content)


def test_an_anchored_directory(tmp_path: Path) -> None:
    """The anchor says which version of dirf.db is live: no counter but the live one matters, and no doubt is left."""
    rig = StorageRig(Disk(rpmb=RpmbDevice()), rpmb_fs=True, rpmb_write_key=True)
    session = rig.session()
    session.close(session.create(b"one", b"1" * 5000))
    session.close(session.create(b"two", b"2"))
    for name, content in rig.disk.files.items():
        (tmp_path / name).write_bytes(content)
    anchor = independent.anchor(rig.disk.rpmb)
    truth = independent.read(tmp_path, anchor)
    file = tmp_path / "dirf.db"
    raw = file.read_bytes()
    places = [*range(HEADS), *range(4096, 4096 + 4 * 66), *range(HEADS, 4096, 997), *range(8192, len(raw), 997)]
    for number, offset in enumerate(places):
        changed = bytearray(raw)
        changed[offset] ^= MASKS[number % len(MASKS)]
        file.write_bytes(changed)
        part = truth.part("dirf.db", offset)
        found = [(damage.file, damage.part) for damage in StoreReader(tmp_path, StorageKeys(), anchor).damages]
        assert found == ([("dirf.db", part)] if part else []), offset
