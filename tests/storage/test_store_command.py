"""`mediator store` as its user meets it: what it prints, and its exit codes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from mediator.cli import store
from mediator.cli.output import Boundary
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared
STORES = SHARED / "stores"
EXAMPLE = "f4e750bb-1437-4fbf-8785-8d3580c34994"
OWNER = "5f0c0a11-7e57-4a57-8e5e-c0ffee000001"


def run(*arguments: object) -> int:
    with Boundary() as boundary:
        command = get_command(store.app)
        boundary.code = command(args=[str(each) for each in arguments], standalone_mode=False) or 0
    return boundary.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shutil.copytree(STORES / "store-torn/states/base/tee", tmp_path / "tee", copy_function=shutil.copyfile)
    return tmp_path / "tee"


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", STORES / "store-a/tee") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "object#2" in line] == [
        [EXAMPLE, "object#2", "44", "data", "2", "3", "ok"]
    ]
    assert run("ls", STORES / "store-a/tee", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "mediator-store/1"
    assert [each["id"] for each in document["objects"]][2:] == ["object#2"]


def test_cat_every_object(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    import hashlib

    expected = json.loads((STORES / "store-b/expected.json").read_text())
    for each in expected["objects"][:: len(expected["objects"]) // 7]:
        assert run("cat", STORES / "store-b/tee", each["id"], "--ta", each["ta"]) == 0
        assert hashlib.sha256(capfdbinary.readouterr().out).hexdigest() == each["sha256"]
        assert run("cat", STORES / "store-b/tee", "hex:" + each["id_hex"], "--ta", each["ta"], "--json") == 0
        assert len(bytes.fromhex(json.loads(capfdbinary.readouterr().out)["data"])) == each["size"]


def test_corrupt_object(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(path / "3", 8192)  # block 0 version 0: dead
    flip(path / "3", 12288)
    assert run("cat", path, "small", "--ta", OWNER) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == "error: 3: block 0 version 1: tag does not match\n"
    assert run("cat", path, "other", "--ta", OWNER, "--json") == 0, "another object is whole"
    capsys.readouterr()
    assert run("ls", path) == 1
    capsys.readouterr()
    assert run("check", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"damaged: 3: block 0 version 1: tag does not match (object small of {OWNER})"
    assert any("old copy of the whole store cannot be told" in line for line in lines)
    assert run("check", path, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["corrupt"] == ["small"] and not document["good"]
    assert document["damages"] == [{"file": "3", "part": "block 0 version 1", "reason": "tag does not match"}]
    assert run("dump", path, "--json") == 1


def test_check_of_a_good_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", STORES / "store-torn/states/delete-before-remove/tee") == 0
    out = capsys.readouterr().out
    assert "good: 5 objects" in out and "numbers are free: 2" in out
    assert run("check", STORES / "store-torn/states/first-node-only/tee") == 0
    assert "good: 0 objects" in capsys.readouterr().out


def test_dump(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dump", STORES / "store-b/tee", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    by_name = {file["file"]: file for file in document["files"]}
    assert len(by_name["11"]["nodes"]) == 101
    assert by_name["11"]["blocks"][30]["offset"] in (62 * 4096, 64 * 4096)
    (key,) = [each for each in document["objects"] if each["id"] == "aes256"]
    assert [attribute["name"] for attribute in key["attributes"]] == ["secret value"]
    assert run("dump", STORES / "store-b/tee") == 0
    assert "max_node_id 101" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "/nonexistent"),
        ("check", "{file}"),
        ("check", "{strange}"),
        ("ls", "{store}", "--huk", "xyz"),
        ("ls", "{store}", "--huk", "123"),
        ("ls", "{store}", "--chip-id", "00"),
        ("cat", "{store}", "small", "--ta", "no-uuid"),
        ("cat", "{store}", "absent", "--ta", OWNER),
        ("cat", "{store}", "hex:0", "--ta", OWNER),
        ("cat", "{store}", "x" * 65, "--ta", OWNER),
        ("cat", "{store}", "small"),
        ("ls",),
        ("melt", "{store}"),
    ],
)
def test_usage(path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    (path.parent / "strange").mkdir()
    (path.parent / "strange/README").write_text("not of secure storage")
    places = {"store": path, "file": path / "dirf.db", "strange": path.parent / "strange"}
    assert run(*(each.format(**places) for each in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_strange_files(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path / "README").write_text("not of secure storage")
    (path / "line\nbreak\x1b[2J").write_text("nor this")
    (path / os.fsdecode(b"\xff")).write_text("nor this")
    assert run("check", path) == 0
    out = capsys.readouterr().out
    assert r"not of secure storage: README, 'line\nbreak\x1b[2J', '\udcff'" in out
    assert run("check", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["good"]
    (path / "3").unlink()
    (path / "3").mkdir()
    assert run("check", path) == 1
    assert capsys.readouterr().out.startswith("damaged: 3: file: not a regular file (object small of")
    (path / "3").rmdir()
    (path / "3").symlink_to(path / "3")
    assert run("check", path) == 2, "what cannot be read is no verdict"
    assert "symbolic links" in capsys.readouterr().err


def test_nothing_stored_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tee-supplicant makes the directory before OP-TEE makes dirf.db: no error, no object."""
    assert run("ls", tmp_path) == 0
    capsys.readouterr()
    assert run("check", tmp_path) == 0
    assert "the directory is empty" in capsys.readouterr().out
    (tmp_path / "2").write_bytes(b"")
    assert run("check", tmp_path) == 1, "files without a directory: it is lost"
    assert capsys.readouterr().out.startswith("damaged: dirf.db: file: lost")


def test_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", path, "--huk", "00" * 16, "--chip-id", b"BEEF".hex() * 8) == 0
    assert run("check", path, "--huk", "01" * 16) == 1
    assert "keys" in capsys.readouterr().out
    assert run("cat", path, "small", "--ta", OWNER, "--huk", "01" * 16) == 1
    assert "dirf.db: head slot" in capsys.readouterr().err
