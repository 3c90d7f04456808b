"""REE FS with its anchor in RPMB: an old copy of the whole store is told from the good one."""

from pathlib import Path

import pytest

from guests.rpmb import RpmbDevice
from mediator.cli import run
from optee.abi.results import Result
from optee.abi.rpc import FsOperation
from tests.storage import independent
from tests.storage.rig import ALL, RPMB, RPMB_ASKED, Client, Disk, StorageError, StorageRig

CONFIG = {"rpmb_fs": True, "rpmb_write_key": True}


def start(disk: Disk, **config: object) -> Client:
    return StorageRig(disk, **(CONFIG | config)).session()


def refused(call, *arguments) -> Result:
    with pytest.raises(StorageError) as error:
        call(*arguments)
    return error.value.result


def files_of(disk: Disk) -> dict[str, bytearray]:
    return {name: bytearray(content) for name, content in disk.files.items()}


class ChangedDisk(Disk):
    """`old`: the files as they were before the object was changed."""

    old: dict[str, bytearray]


@pytest.fixture
def disk() -> ChangedDisk:
    disk = ChangedDisk(rpmb=RpmbDevice())
    client = start(disk)
    handle = client.create(b"object", b"old")
    disk.old = files_of(disk)
    client.write(handle, b"new")
    return disk


def test_an_old_copy_of_the_whole_store_is_refused(disk: ChangedDisk) -> None:
    """CORRUPT_OBJECT, and nothing is removed: with the right files back everything is there."""
    new, disk.files = disk.files, disk.old
    old = files_of(disk)
    client = start(disk)
    assert refused(client.open, b"object") == Result.CORRUPT_OBJECT
    assert refused(client.create, b"other", b"x") == Result.CORRUPT_OBJECT
    assert disk.files == old
    disk.files = new
    assert start(disk).content(b"object") == b"new"


def test_without_the_anchor_it_opens(disk: ChangedDisk) -> None:
    disk.files = disk.old
    assert start(disk, ree_fs_integrity_rpmb=False).content(b"object") == b"old"


def test_a_lost_directory(disk: ChangedDisk) -> None:
    """SECURITY, a panic of the TA; only a build that allows it begins an empty store."""
    del disk.files["dirf.db"]
    assert refused(start(disk).open, b"object") == Result.TARGET_DEAD
    assert "dirf.db" not in disk.files
    client = start(disk, ree_fs_allow_reset=True)
    assert refused(client.open, b"object") == Result.ITEM_NOT_FOUND
    client.close(client.create(b"object", b"anew"))
    assert start(disk).content(b"object") == b"anew"


def test_a_store_that_was_never_anchored_is_not_believed(disk: ChangedDisk) -> None:
    """Where RPMB knows of no dirf.db, an empty one is made over what lies there."""
    disk.rpmb = RpmbDevice()
    client = start(disk)
    assert client.enumerate() == []
    assert independent.read(disk.snapshot(), independent.anchor(disk.rpmb)).objects == []


def test_the_anchor_is_written_after_the_directory_and_before_a_file_goes(disk: ChangedDisk) -> None:
    client = start(disk)
    handle = client.open(b"object")
    disk.asked.clear()
    client.unlink(handle)
    order = [FsOperation(asked).name if asked != RPMB_ASKED else "RPMB" for asked in disk.asked]
    last_write = len(order) - 1 - order[::-1].index("WRITE")
    assert order[last_write + 1 : order.index("REMOVE")] == ["RPMB"] * 3, (
        "FAT, the block before it is changed, the block"
    )
    anchor = independent.read_rpmb(bytes(disk.rpmb.content))["/dirfile.db.hash"]
    assert anchor == independent.root_hashes(disk.snapshot()["dirf.db"])[-1]


def test_a_device_that_fails_fails_the_change(disk: ChangedDisk) -> None:
    """The directory is written, its anchor is not: the change did not happen."""
    client = start(disk)
    handle = client.open(b"object", ALL)
    device, disk.rpmb = disk.rpmb, None
    assert refused(client.write, handle, b"lost") == Result.TARGET_DEAD
    disk.rpmb = device
    disk.open_files.clear()
    assert start(disk).content(b"object") == b"new"


def test_objects_in_rpmb_lie_beside_the_anchor(disk: ChangedDisk) -> None:
    client = start(disk)
    client.close(client.create(b"object", b"in rpmb", ALL, RPMB))
    assert client.content(b"object") == b"new"
    names = sorted(independent.read_rpmb(bytes(disk.rpmb.content)))
    assert len(names) == 2 and "/dirfile.db.hash" in names


def test_store_check_with_the_device(disk: ChangedDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given the blocks of the device, an old copy of the whole store is damage; else it says that it cannot tell."""
    image = tmp_path / "rpmb"
    image.write_bytes(disk.rpmb.content)
    for name, files in (("new", disk.files), ("old", disk.old)):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    assert run(["store", "check", str(tmp_path / "old")]) == 0
    assert "cannot be told" in capsys.readouterr().out
    assert run(["store", "check", str(tmp_path / "new"), "--rpmb", str(image)]) == 0
    assert capsys.readouterr().out == "good: 1 objects\n"
    assert run(["store", "check", str(tmp_path / "old"), "--rpmb", str(image)]) == 1
    assert "damaged: dirf.db: file: not the one that is anchored" in capsys.readouterr().out
    for wrong, words in (
        (b"", "no file system"),
        (disk.rpmb.content[:600], "middle of its FAT"),
        (disk.rpmb.content[:2000], "ends before byte"),
    ):
        image.write_bytes(wrong)
        assert run(["store", "check", str(tmp_path / "new"), "--rpmb", str(image)]) == 2
        assert words in capsys.readouterr().err
    assert run(["store", "check", str(tmp_path / "new"), "--rpmb", str(tmp_path / "none")]) == 2
