"""`serve --config`: how OP-TEE is built, from a file; a wrong one is told by line and column."""

from pathlib import Path

import pytest

from mediator.cli import run
from mediator.cli.output import GOOD, USAGE
from mediator.service.config import load_config
from optee.config import DEFAULT
from optee.storage.options import StorageMemory, StorageOptions


def write(path: Path, text: str) -> Path:
    file = path / "optee.yaml"
    file.write_text(text)
    return file


def test_what_is_left_out_stays_as_it_is(tmp_path: Path) -> None:
    found = load_config(write(tmp_path, "storage: {memory: managed, CFG_BLOCK_CACHE_SIZE: 7}\n")).over(DEFAULT)
    assert found.storage == StorageOptions(StorageMemory.MANAGED, block_cache_size=7)
    assert found.core_heap_size == DEFAULT.core_heap_size
    assert load_config(write(tmp_path, "core_heap: 65536\n")).over(DEFAULT).core_heap_size == 65536


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("core_heap: 5\n", ":1:12: core_heap: "),
        ("storage:\n  CFG_CACHE: 1\n", ":2:3: storage: no option is called 'CFG_CACHE'"),
        ("storage: {memory: cached}\n", "memory is optee or managed, not 'cached'"),
        ("heap: 1\n", ":1:7: heap: "),
    ],
)
def test_a_wrong_file(text: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, text)
    assert run(["serve", "--config", str(file)]) == USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {file}") and error in captured.err


def test_guests_are_served_with_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "storage: {memory: managed, CFG_GC_INTERVAL_MS: 5}\n")
    code = run(
        ["serve", "--config", str(file), "--guests", "2", "--duration", "1", "--in-process", "--check", "--json"]
    )
    captured = capsys.readouterr()
    assert code == GOOD, captured.err
