"""`mediator size`: what it prints, and one clear line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mediator.cli import run
from mediator.policies import load_policy
from mediator.sizing.request import parse_size
from tests.docs.pages import DOCS, blocks, commands

Capture = pytest.CaptureFixture[str]


def document(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["size", *arguments, "--json"]) == code
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "mediator-size/1"
    assert isinstance(data, dict)
    return data


@pytest.mark.parametrize(("threads", "usable"), [("16", 28), ("32", 92), ("64", 220), ("128", 476)])
def test_usable_memory_of_the_published_rows(capsys: Capture, threads: str, usable: int) -> None:
    data = document(capsys, "--threads", threads, "--no-prealloc")
    assert data["usable_ta_mib"] == usable
    assert f"CFG_NUM_THREADS={threads} " in data["binding"]


def test_eight_threads_say_why_and_what_helps(capsys: Capture) -> None:
    data = document(capsys, "--threads", "8", code=1)
    assert (data["tables"]["needed"], data["tables"]["available"]) == (18, 16)
    assert '"18 page tables not available"' in data["binding"]
    assert [change["lines"] for change in data["changes"]] == [
        ["CFG_NUM_THREADS=9"],
        ["CFG_CORE_PREALLOC_EL0_TBLS=y"],
        ["CFG_PGT_CACHE_ENTRIES=18"],
    ]
    assert run(["size", "--threads", "8"]) == 1
    out = capsys.readouterr().out
    assert "18 of 16 tables" in out
    assert "    CFG_NUM_THREADS=9\n" in out


def test_a_board_and_its_third_guest(capsys: Capture) -> None:
    two = document(capsys, "--board", "qemu_armv8a", "--ta-heap", "32K")
    assert (two["ta_ram"]["per_guest"], two["guests"]) == (6_500_352, {"wanted": 2, "possible": 2})
    three = document(capsys, "--board", "qemu_armv8a", "--ta-heap", "32K", "--guests", "3", code=1)
    assert "VM_CREATED answers ENOTAVAIL" in three["binding"]
    assert three["changes"][0]["lines"] == ["CFG_VIRT_GUEST_COUNT=3"]


def test_later_sources_override_earlier_ones(capsys: Capture, tmp_path: Path) -> None:
    conf = tmp_path / "conf.mk"
    conf.write_text("CFG_NUM_THREADS=5\nCFG_CORE_HEAP_SIZE=131072\n")
    file = tmp_path / "size.yaml"
    file.write_text("board: hikey\nbuild:\n  heap: 1M\ntas:\n  - name: mine\n    heap: 40K\n")
    data = document(capsys, str(file), "--conf", str(conf), "--lpae")
    build = data["inputs"]["build"]
    assert build["CFG_NUM_THREADS"] == {"value": 5, "source": f"{conf}:1"}
    assert build["CFG_CORE_HEAP_SIZE"] == {"value": 1 << 20, "source": str(file)}
    assert build["CFG_TZDRAM_SIZE"] == {"value": 16 << 20, "source": "board hikey"}
    assert build["CFG_WITH_LPAE"] == {"value": True, "source": "option"}
    assert data["inputs"]["tas"][0]["heap"] == 40 << 10


def test_the_example_of_the_page(capsys: Capture, tmp_path: Path) -> None:
    (text,) = (text for language, text in blocks(DOCS / "reference" / "size.md") if language == "yaml")
    file = tmp_path / "size.yaml"
    file.write_text(text)
    data = document(capsys, str(file), code=1)
    assert [limit["name"] for limit in data["limits"] if not limit["holds"]] == [
        "core heap",
        "core heap for buffers of 256 pages",
    ]
    assert document(capsys, str(file), "--heap", "192K")["fits"]


def test_a_header_file_of_a_ta(capsys: Capture, tmp_path: Path) -> None:
    header = tmp_path / "user_ta_header_defines.h"
    header.write_text("#define TA_STACK_SIZE (2 * 1024)\n#define TA_DATA_SIZE (8 * 1024 * 1024)\n")
    data = document(capsys, "--ta", str(header), "--board", "qemu_armv8a", code=1)
    assert "TA RAM" in data["binding"]


def test_explanation_names_the_configuration(capsys: Capture) -> None:
    assert run(["size", "--threads", "32", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "2 x CFG_NUM_THREADS = 2 x 32 = 64" in out
    assert "60000 / 9424 = 6 at once" in out


def test_quota_is_a_policy_that_loads(capsys: Capture, tmp_path: Path) -> None:
    assert run(["size", "--threads", "32", "--heap", "192K", "--quota"]) == 0
    file = tmp_path / "sized.yaml"
    file.write_text(capsys.readouterr().out)
    limits = load_policy(str(file)).limits
    assert (limits.pages, limits.buffers, limits.pages_per_buffer) == (7632, 477, 7632)
    data = document(capsys, "--threads", "32", "--heap", "192K", "--quota")
    assert data["quota"] == {"pages": 7632, "buffers": 477, "pages_per_buffer": 7632}


def test_static_memory_shrinks_with_guests_and_dynamic_does_not(capsys: Capture) -> None:
    data = document(capsys, "--threads", "32", "--static-split", "2M")
    splits = data["static_split"]
    assert [split["guests"] for split in splits] == [1, 2, 4, 8, 16]
    assert [split["static_bytes"] >> 10 for split in splits] == [2048, 1024, 512, 256, 128]
    assert {split["dynamic_buffer"] for split in splits} == {3743 * 4096}


def test_sweep(capsys: Capture) -> None:
    data = document(capsys, "--sweep", "threads=8,16,32,64,128")
    assert [row["usable_ta_mib"] for row in data["rows"]] == [0, 28, 92, 220, 476]
    assert run(["size", "--sweep", "prealloc=n,y"]) == 0


def test_plot(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "f.svg"
    assert run(["size", "--sweep", "threads=8,16", "--plot", str(picture)]) == 0
    assert "largest TA heap" in picture.read_text()


def test_comparison_says_what_is_predicted(capsys: Capture) -> None:
    data = document(capsys, "--compare", "issue-6596")
    kinds = {(row["threads"], row["prealloc"], row["program"]): row["kind"] for row in data["rows"]}
    assert kinds[64, False, "test program"] == "predicted"
    assert kinds[32, False, "test program"] == kinds[8, False, "test program"] == "calibrated"
    assert {kind for key, kind in kinds.items() if key[1]} == {"calibrated", "not derived"}
    assert run(["size", "--compare", "issue-6596"]) == 0


def test_verification(capsys: Capture) -> None:
    data = document(capsys, "--board", "qemu_armv8a", "--ta-heap", "32K", "--verify")
    verified = {check["what"]: check for check in data["verified"]}
    assert all(check["good"] for check in verified.values())
    assert verified["guests"]["limit"] == 2
    assert verified["heap of a TA"]["seen"] == "TA load: OUT_OF_MEMORY"
    assert run(["size", "--board", "qemu_armv8a", "--verify"]) == 0
    assert "REGISTER_SHM: BAD_PARAMETERS" in capsys.readouterr().out


def test_the_page_on_out_of_memory_shows_what_is_printed(capsys: Capture) -> None:
    page = DOCS / "how-to" / "out-of-memory.md"
    (line,) = (line for line in commands(page) if "--rsa" in line)
    assert run(line.split()[1:]) == 1
    (shown,) = (text for language, text in blocks(page) if language == "text")
    assert shown.strip() in capsys.readouterr().out


def test_log(capsys: Capture, tmp_path: Path) -> None:
    log = tmp_path / "console.txt"
    log.write_text("E/TC:? 0 alloc_pgt:235 18 page tables not available\n")
    assert run(["size", "--log", str(log)]) == 0
    assert capsys.readouterr().out.startswith(f"{log}:1: translation tables: ")
    assert document(capsys, "--log", str(log))["findings"][0]["line"] == 1


def written(name: str, text: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(text)
        return str(folder / name)

    return write


@pytest.mark.parametrize(
    ("make", "options", "error"),
    [
        (None, ["--heap", "lots"], "--heap: 'lots' is no size such as 65536, 64K or 15M"),
        (None, ["--heap", "1"], "option: heap (CFG_CORE_HEAP_SIZE): 1 is not from 4096 to 1073741824"),
        (None, ["--board", "pc"], "board 'pc' is none of qemu_armv8a"),
        (None, ["--compare", "issue-1"], "--compare: 'issue-1' is not issue-6596"),
        (None, ["--sweep", "cores=1"], "--sweep: 'cores=1' is not NAME=VALUE"),
        (None, ["--sweep", "threads=0"], "--sweep: threads 0 is not from 1 to 1024"),
        (None, ["--plot", "f.svg"], "--plot draws a --sweep"),
        (None, ["--parameter", "1K"] * 5, "--parameter: a call has four parameters at most"),
        (None, ["--ta", "/nowhere/ta.elf"], "/nowhere/ta.elf: No such file"),
        (None, ["--heap", "4K", "--quota"], "--quota: the core heap holds no shared buffer"),
        (written("c.mk", "\nCFG_NUM_THREADS=x"), ["--conf", "FILE"], "FILE:2: CFG_NUM_THREADS: 'x' is no number"),
        (written("t.h", "#define TA_DATA_SIZE 5"), ["--ta", "FILE"], "FILE: does not define TA_STACK_SIZE"),
        (written("t.elf", "\x7fELF"), ["--ta", "FILE"], "FILE: an ELF file that ends too soon"),
        (written("s.yaml", "build:\n  thread: 8\n"), ["FILE"], "FILE:2:11: build.thread: "),
        (written("s.yaml", "tas:\n  - name: a\n    heap: big\n"), ["FILE"], "FILE:3:11: tas.0.heap: 'big' is no size"),
        (written("s.yaml", "tas:\n- {name: a, set_ups: {dsa: 1}}\n"), ["FILE"], "TA a: set_ups: 'dsa' is none"),
    ],
)  # fmt: skip
def test_mistakes(
    capsys: Capture, tmp_path: Path, make: Callable[[Path], str] | None, options: list[str], error: str
) -> None:
    file = make(tmp_path) if make is not None else ""
    assert run(["size", *(option.replace("FILE", file) for option in options)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + error.replace("FILE", file))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("0x10", 16), ("64K", 65536), ("14.5M", 15204352), ("1GiB", 1 << 30), ("2 MB", 2 << 20)]
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_scenario_on_a_board_that_is_too_small(capsys: Capture) -> None:
    assert run(["run", "--board", "qemu_armv8a", "hello", "same-cookies"]) == 0
    capsys.readouterr()
    assert run(["run", "--board", "qemu_armv8a", "two-hundred-guests"]) == 1
    out = capsys.readouterr().out
    assert "OP-TEE has no room for kvm-3: VM_CREATED answered ENOTAVAIL, secure RAM is split for 2 guests" in out
    assert run(["run", "--board", "pc", "hello"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quota", "--verify"], "--quota and --verify ask for different things: one at a time"),
        (["--compare", "issue-6596", "--threads", "8"], "--compare goes with --json only, not with --threads"),
        (["--log", "console.txt", "--board", "qemu_armv8a"], "--log goes with --json only, not with --board"),
        (["--quota", "--explain"], "--explain goes with the table, not with --quota"),
        (["--static-split", "2M", "--sweep", "threads=8"], "--sweep and --static-split ask for different things"),
        (["--plot", "f.svg"], "--plot draws a --sweep"),
    ],
)
def test_options_that_do_not_go_together_are_not_ignored(capsys: Capture, arguments: list[str], words: str) -> None:
    assert run(["size", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_a_quota_leaves_the_pool_of_all_guests_alone(capsys: Capture, tmp_path: Path) -> None:
    assert run(["size", "--threads", "32", "--quota"]) == 0
    path = tmp_path / "sized.yaml"
    path.write_text(capsys.readouterr().out)
    sized, default = load_policy(path), load_policy("default")
    assert sized.pool_pages == default.pool_pages
    assert sized.limits.pages < default.limits.pages


@pytest.mark.parametrize(
    ("arguments", "decides"),
    [
        (["--threads", "32"], "CFG_CORE_NEX_HEAP_SIZE"),
        (["--board", "qemu_armv8a"], "CFG_VIRT_GUEST_COUNT"),
        (["--board", "qemu_armv8a", "--nexus-heap", "1K"], "CFG_CORE_NEX_HEAP_SIZE"),
    ],
)
def test_what_decides_how_many_guests_there_can_be(capsys: Capture, arguments: list[str], decides: str) -> None:
    run(["size", *arguments])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" guests ")]
    assert row.split()[-1] == decides
