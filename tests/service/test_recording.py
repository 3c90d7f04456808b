"""`serve --record`: what is written replays, whatever happens to the guests."""

from __future__ import annotations

import json
import signal
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import guests
from guests.workloads import Report, hello, mixed, shm
from mediator.board import Board, images
from mediator.cli import run as cli
from mediator.policies import load_policy
from mediator.service import serve
from mediator.service.options import ServeOptions
from mediator.service.recording import Recordings
from mediator.service.serve import Bench
from mediator.service.summary import Summary
from mediator.trace.record import TraceFile
from mediator.trace.replay import replay
from mediator.trace.report import ReplayReport
from mediator.trace.show import Recording
from optee.tas.catalogue import BUILT_IN

SHORT = {"hello": partial(hello, rounds=4), "mixed": partial(mixed, rounds=1, callers=2), "shm": partial(shm, rounds=2)}
POLICIES = ("default", "xen", "minimal")
NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "WORKLOADS", SHORT)


def record(path: Path, **options: Any) -> Summary:
    chosen = ServeOptions(**{"guests": 1, "workload": "hello", "record": path, **options})
    return trio.run(Bench(chosen, load_policy(chosen.policy)).run, clock=MockClock(autojump_threshold=0))


def counted(trace: Path, kind: str) -> int:
    return sum(json.loads(line).get("e") == kind for line in trace.read_text().splitlines())


def replayed(path: Path, policy: str = "default") -> ReplayReport:
    report = replay(path, load_policy(policy))
    assert (report.unexpected, report.first_unexpected, report.violations) == (0, None, [])
    return report


@pytest.mark.parametrize(("workload", "policy"), [*product(("hello", "shm"), POLICIES), ("mixed", "default")])
def test_each_guest_has_a_trace_that_replays(workload: str, policy: str, tmp_path: Path) -> None:
    summary = record(tmp_path / "calls.jsonl.gz", guests=2, workload=workload, policy=policy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.kvm-1.jsonl.gz", "calls.xen-2.jsonl.gz"]
    for guest in summary.guests:
        report = replayed(tmp_path / f"calls.{guest.name}.jsonl.gz", policy)
        assert report.calls == report.returned == guest.calls
        assert report.peak_pages_pinned == guest.pages_pinned_peak and report.left == NOTHING_LEFT


def test_a_guest_that_is_alone_has_the_file_to_itself_and_its_calls_can_be_drawn(tmp_path: Path) -> None:
    trace = tmp_path / "calls.jsonl"
    summary = record(trace, workload="mixed")
    assert [path.name for path in tmp_path.iterdir()] == ["calls.jsonl"]
    recording = Recording(trace)
    rows = list(recording.rows())
    assert sum(1 + int(rounds) for *_, rounds, _ in rows) == summary.guests[0].calls
    longest = max(rows, key=lambda row: int(row[5]))
    journey = recording.follow(recording.root_of(int(longest[0])), load_policy("default"))
    assert journey.unexpected == 0 and len(journey.arrows) > int(longest[5]) > 1


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("how", ["a signal", "its power is cut"])
def test_what_was_recorded_is_whole_whenever_it_ends(how: str, moment: float, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SHORT, "mixed", partial(mixed, callers=9))
    trace = tmp_path / "calls.jsonl"
    bench = Bench(ServeOptions(guests=1, workload="mixed", record=trace), load_policy("default"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.run)
            await bench.wait_until_up()
            await trio.sleep(moment)
            if how == "a signal":
                signal.raise_signal(signal.SIGINT)
            else:
                bench.guests[0].life.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    report = replayed(trace)
    assert report.calls == counted(trace, "call") and report.returned == counted(trace, "return")


def test_guests_in_processes_are_recorded_too(tmp_path: Path) -> None:
    summary = record_in_real_time(tmp_path / "calls.jsonl")
    report = replayed(tmp_path / "calls.jsonl")
    assert report.calls == summary.guests[0].calls and report.left == NOTHING_LEFT


def record_in_real_time(path: Path) -> Summary:
    options = ServeOptions(guests=1, workload="hello", record=path, in_process=False, duration=0.1)
    return trio.run(Bench(options, load_policy("default")).run)


def test_little_is_held_however_long_it_lasts(tmp_path: Path, monkeypatch) -> None:
    """A suspended call is known until it goes on, and nothing of a call that has ended."""
    held: list[int] = []
    write = TraceFile.write

    async def main() -> None:
        board = Board()
        with Recordings(board, tmp_path / "calls.jsonl", "test", alone=True) as recordings:
            async with board:
                vm = await board.create()
                recordings.begin(vm)
                recorder = board.service.recorders[vm.client_id]

                def watch(file: TraceFile, line: dict[str, Any]) -> None:
                    held.append(len(recorder._suspended))
                    write(file, line)

                monkeypatch.setattr(TraceFile, "write", watch)
                async with board.boot(vm, guests.Supplicant(images(*BUILT_IN))) as guest:
                    await mixed(guest, Report(), rounds=1, callers=10)
                assert not recorder._suspended
                await board.destroy(vm)
                assert not board.service.recorders

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert 1 < max(held) <= 8 and len(held) > 500


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else() -> None:
    summary = record(Path("/dev/full"))
    assert summary.faults == ("/dev/full: the recording ends early: No space left on device",)
    assert summary.guests[0].ended == "finished" and summary.guests[0].errors == 0 and not summary.good


@pytest.mark.parametrize("place", ["no/such/folder/calls.jsonl", "."])
def test_a_place_for_no_file_is_one_line(place: str, tmp_path: Path, capsys: Capture) -> None:
    assert cli(["serve", "--in-process", "--record", str(tmp_path / place)]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("board: ")]
    assert out == "" and line.startswith("error: ") and "no trace can be written there" in line


def test_names_of_strangers_are_harmless_and_names_that_come_again_are_numbered(tmp_path: Path) -> None:
    async def main() -> None:
        async with Board() as board:
            with Recordings(board, tmp_path / "calls.v2.jsonl", "test", alone=False) as recordings:
                for name in ("../../etc/x", "same", "same", "a b"):
                    vm = await board.create("kvm", name, ram=1 << 20)
                    recordings.begin(vm)
                    await board.destroy(vm)

    trio.run(main)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "calls..._.._etc_x.v2.jsonl",
        "calls.a_b.v2.jsonl",
        "calls.same-2.v2.jsonl",
        "calls.same.v2.jsonl",
    ]
