"""`mediator ctl` against a bench that runs, and the control socket against those who misuse it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from hv_models.machine import RAM_BASE
from mediator.cli import ctl, run
from mediator.core.policy import FlowPolicy
from mediator.documents import DocumentError
from mediator.policies import load_policy, policy_text
from mediator.service.control import MAX_REQUEST, Control
from mediator.service.listener import listening
from mediator.service.options import ServeOptions
from mediator.service.serve import Bench
from mediator.service.summary import Summary

Capture = pytest.CaptureFixture[str]


class Running:
    """A bench of two guests in this process, and a way to ask it."""

    def __init__(self, path: Path, **options: Any) -> None:
        chosen = ServeOptions(guests=2, workload="hello", check=True, control=path, **options)
        self.bench = Bench(chosen, load_policy("default"))
        self.summary: Summary | None = None
        self._path = path

    async def whole(self) -> None:
        self.summary = await self.bench.run()

    async def ask(self, line: bytes) -> dict[str, Any]:
        stream = await trio.open_unix_socket(self._path)
        async with stream:
            await stream.send_all(line)
            data = b"".join([part async for part in stream])
        answer: dict[str, Any] = json.loads(data)
        return answer

    async def request(self, **request: Any) -> dict[str, Any]:
        return await self.ask(json.dumps(request).encode() + b"\n")


@pytest.fixture
async def running(tmp_path: Path):
    path = tmp_path / "control"
    bench = Running(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.whole)
        await bench.bench.wait_until_up()
        yield bench
        bench.bench.stop()
    assert not path.exists()
    assert bench.summary is not None and bench.summary.good and not any(bench.summary.left.values())


async def test_status(running: Running, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600
    found = await running.request(ask="status")
    assert found["format"] == "mediator-ctl/1" and found["policy"] == "default" and not found["tracing"]
    assert [(guest["name"], guest["hypervisor"], guest["vmid"]) for guest in found["guests"]] == [
        ("kvm-1", "kvm", 1),
        ("xen-2", "xen", 2),
    ]
    for guest in found["guests"]:
        assert guest["calls"] and guest["invokes"] and guest["pages_quota"] == 65536 and guest["ended"] == ""
        pools = {pool["pool"]: pool for pool in guest["memory"]}
        assert list(pools) == ["Heap", "Physical TA memory", "Translation tables"]
        assert all(0 < pools[name]["allocated"] <= pools[name]["size"] for name in ("Heap", "Physical TA memory"))
        assert guest["storage_memory"] is None, "as in OP-TEE"
    assert ctl._table(found).row_count == 2
    assert ctl._memory_table(found).row_count == 6


async def test_a_quota_is_changed_while_its_guest_runs(running: Running) -> None:
    first, second = running.bench.guests
    with capture_logs() as log:
        now = await running.request(
            ask="quota", guest="kvm-1", limits={"pages": 0x900, "reserved_pages": 7, "calls": 2}
        )
    changed = {"pages": [65536, 0x900], "calls": [8, 2], "reserved_pages": [0, 7]}
    assert log == [{"event": "limits_changed", "log_level": "info", "guest": 1, **changed}]
    assert now["guest"] == "kvm-1" and (now["limits"]["pages"], now["limits"]["calls"]) == (0x900, 2)
    assert first.accounts is not None and second.accounts is not None
    assert first.accounts.ledger.limits.pages == 0x900 and second.accounts.ledger.limits.pages == 65536
    found = await running.request(ask="status")
    one, other = found["guests"]
    pages = one["quota"]["pages"]
    assert (pages["limit"], pages["reserved"], one["quota"]["calls"]["limit"]) == (0x900, 7, 2)
    assert pages["held"] <= pages["peak"] and pages["borrowed"] == max(pages["held"] - 7, 0)
    assert other["quota"]["pages"]["reserved"] == 0 and "pages" not in other["refusals"]
    assert found["pool"]["capacity"] is None and found["pool"]["reserved"] == 7
    for limits, words in [
        ({"pages": 0}, "pages"),
        ({"pags": 1}, "pags"),
        ({"pages": "8"}, "pages"),
        ({"pages": 5}, "7 of at most 5"),
        ({"calls": 0}, "calls"),
    ]:
        refused = await running.request(ask="quota", guest="kvm-1", limits=limits)
        assert words in refused["error"] and "\n" not in refused["error"]
    assert first.accounts.ledger.limits.pages == 0x900


async def test_a_refusal_is_found_in_the_status(running: Running) -> None:
    """The workload asks for a buffer that is larger than may be, now and then."""
    refused: dict[str, Any] = {}
    while not refused:
        await trio.lowlevel.checkpoint()
        found = await running.request(ask="status")
        refused = found["guests"][0]["refusals"]
    assert set(refused) == {"pages_per_buffer"}
    last = found["guests"][0]["last_refusal"]
    keys = {"call", "function", "rule", "resource", "asked", "held", "limit", "answer", "origin", "why"}
    assert keys <= last.keys() and last["asked"] > last["limit"] == 16384 and last["rule"] == "R21"
    where = f"kvm-1: last refused (R21, call {last['call']}, REGISTER_SHM, function CALL_WITH_RPC_ARG): {last['why']}; "
    assert any(line.startswith(where) for line in ctl._refusals(found))
    assert ctl._quota_table(found).row_count == 10


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ({"call": None, "function": 0x32000004}, "R21, function CALL_WITH_ARG"),
        ({"call": 7, "function": 0x32000013, "command": None}, "R21, call 7, function CALL_WITH_REGD_ARG"),
        ({"call": 7, "function": 0x3200FFFF, "command": "CANCEL"}, "R21, call 7, CANCEL, function 0x3200ffff"),
    ],
)
def test_a_refusal_names_as_much_of_its_call_as_is_known(detail: dict[str, Any], words: str) -> None:
    last = {**detail, "rule": "R21", "why": "calls: 1 of at most 1", "answer": 1, "origin": None}
    (line,) = ctl._refusals({"guests": [{"name": "xen-2", "last_refusal": last}]})
    assert line == f"xen-2: last refused ({words}): calls: 1 of at most 1; answer 0x1 in a0"


async def test_the_memory_manager_is_found_in_the_status(tmp_path: Path, capsys: Capture) -> None:
    """All that it counts, as JSON and for people."""
    (tmp_path / "config").write_text("storage: {memory: managed, CFG_MEMORY_LEAK_DETECTION: 1}\n")
    running = Running(tmp_path / "control", config=tmp_path / "config")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.whole)
        await running.bench.wait_until_up()
        found = await running.request(ask="status")
        await trio.to_thread.run_sync(ctl._print_status, tmp_path / "control", False)
        running.bench.stop()
    assert running.summary is not None and running.summary.good
    for guest in found["guests"]:
        record = guest["storage_memory"]
        assert 0 < record["charged"] <= record["bound"]
        blocks, collector = record["levels"]["blocks"], record["collector"]
        assert blocks["allocated"] - blocks["freed"] == blocks["current"] <= blocks["peak"]
        assert blocks["hits"] and 0 < blocks["hit_rate"] <= 1
        assert {"collections", "bytes", "nanoseconds", "longest_pass"} <= collector.keys()
        assert sum(record["held"].values()) and record["double_releases"] == record["foreign_releases"] == 0
    out = capsys.readouterr().out
    assert "memory manager of secure storage" in out and "16 KiB buffers" in out
    assert "longest pass" in out and "held from" in out


async def test_flow_control_is_found_in_the_status(tmp_path: Path) -> None:
    """Queue length, waiting times, refusals, and calls a second by TA and session."""
    policy = load_policy("default")
    policy = replace(policy, flow=FlowPolicy(queue=3, secure_cores=1), limits=replace(policy.limits, calls=1))
    bench = Bench(ServeOptions(guests=2, workload="hello"), policy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await bench.wait_until_up()
        found = Control(bench).answer(b'{"ask": "status"}')
        flow = found["guests"][0]["flow"]
        assert 0 <= flow["waiting"] <= flow["peak"] <= flow["limit"] == 3 and flow["admitted"]
        assert flow["waited_us"]["p50"] <= flow["waited_us"]["p99"] and found["secure_calls"] in (0, 1)
        assert sum(ta["calls"] for ta in flow["tas"]) >= sum(session["calls"] for session in flow["sessions"])
        assert {session["ta"] for session in flow["sessions"]} <= {ta["ta"] for ta in flow["tas"]}
        assert ctl._flow_table(found).row_count == 2
        bench.stop()
    assert bench.board.violations == []


async def test_a_policy_is_read_again_or_stays(tmp_path: Path, capsys: Capture) -> None:
    """By SIGHUP: all guests get what the file says; a bad file is one line, and nothing changes."""
    text = policy_text("default")
    path = tmp_path / "own.yaml"
    path.write_text(text)
    chosen = ServeOptions(guests=2, workload="hello", policy=str(path))
    bench = Bench(chosen, load_policy(str(path)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await bench.wait_until_up()

        async def reread(changed: str) -> tuple[list[int], str]:
            path.write_text(changed)
            capsys.readouterr()
            os.kill(os.getpid(), signal.SIGHUP)
            said = ""
            while not said:
                await trio.lowlevel.checkpoint()
                said = capsys.readouterr().err
            return [guest.accounts.ledger.limits.pages for guest in bench.guests if guest.accounts], said

        quotas = "guests:\n  xen-2: {pages: 100}\npool:"
        good = text.replace("pages: 65536", "pages: 5000").replace("pool:", quotas)
        with capture_logs() as log:
            assert await reread(good) == ([5000, 100], f"policy {path} was read again\n")
        assert [(line["event"], line["guest"], line["pages"]) for line in log] == [
            ("limits_changed", 1, [65536, 5000]),
            ("limits_changed", 2, [65536, 100]),
        ]
        for bad, words in [
            (good.replace("pages: 100", "pages: 0"), "pages"),
            (good.replace("pages: 5000", "pages: no"), "no"),
            (text.replace("cookie_zero: false", "cookie_zero: true"), "cookie_zero cannot change"),
            ("{", ""),
        ]:
            limits, said = await reread(bad)
            assert limits == [5000, 100] and said.count("\n") == 1 and str(path) in said and words in said
            assert said.endswith("the old policy stays\n")
        bench.stop()
    bench.board.machine.close()


@pytest.mark.parametrize("name", ["kvm-1", "1"])
async def test_destroy_cuts_one_guests_power(running: Running, name: str) -> None:
    assert await running.request(ask="destroy", guest=name) == {"destroyed": "kvm-1"}
    first, second = running.bench.guests
    while first.vm is not None:
        await trio.lowlevel.checkpoint()
    assert first.ended == "killed" and first.accounts is not None
    assert set(first.accounts.ledger.sums().values()) == {0}
    before = second.status().calls
    while second.status().calls == before:
        await trio.lowlevel.checkpoint()
    assert await running.request(ask="destroy", guest=name) == {"error": f"no guest {name} runs"}


async def test_trace_logs_every_event_but_not_endlessly(running: Running, capsys: Capture) -> None:
    assert await running.request(ask="trace", on=True) == {"tracing": True}
    assert running.bench.board.core.tracing
    assert await running.request(ask="trace", on=False) == {"tracing": False}
    assert not running.bench.board.core.tracing


async def test_translate_walks_forth_and_back(running: Running) -> None:
    for guest in running.bench.guests:
        assert guest.vm is not None
        guest.vm.touch(RAM_BASE + 0x1008, 8, write=True)  # as the guest's own access does: KVM maps the page then
        found = await running.request(ask="translate", guest=guest.name, address=RAM_BASE + 0x1008, pa=False)
        first, *levels, result, back = found["lines"]
        assert first == f"IPA {RAM_BASE + 0x1008:#x}"
        assert [line.split(":")[0].strip() for line in levels] == ["level 1", "level 2", "level 3"][: len(levels)]
        assert "RAM_RW" in result
        pa = guest.vm.stage2.walk(RAM_BASE + 0x1008).pa
        assert back == f"back: PA {pa:#x} is IPA {RAM_BASE + 0x1008:#x} of {guest.name}"
        again = await running.request(ask="translate", guest=guest.name, address=pa, pa=True)
        assert again["lines"][0] == f"PA {pa:#x} is IPA {RAM_BASE + 0x1008:#x} of {guest.name}"
        assert again["lines"][1:] == found["lines"][:-1]
        hole = await running.request(ask="translate", guest=guest.name, address=0x1_0000_0000, pa=False)
        assert "translation fault, level" in hole["lines"][-1]
    one, other = running.bench.guests
    assert one.vm is not None and other.vm is not None
    pa = one.vm.stage2.walk(RAM_BASE + 0x1008).pa
    foreign = await running.request(ask="translate", guest=other.name, address=pa, pa=True)
    assert foreign["lines"] == [f"PA {pa:#x} is not xen-2's: IPA {RAM_BASE + 0x1008:#x} of kvm-1"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\n", "not JSON"),
        (b"{\n", "not JSON"),
        (b"[" * 4000 + b"\n", "not JSON"),
        (b"\xff\n", "not JSON"),
        (b"[]\n", "an object is wanted"),
        (b"{}\n", "unknown request"),
        (b'{"ask": "destroy"}\n', "unknown request"),
        (b'{"ask": "destroy", "guest": 1}\n', "unknown request"),
        (b'{"ask": "trace", "on": 1}\n', "unknown request"),
        (b'{"ask": "quota", "guest": "1", "limits": 5}\n', "unknown request"),
        (b'{"ask": "quota", "guest": "7", "limits": {}}\n', "no guest 7 runs"),
        (b'{"ask": "translate", "guest": "1", "address": -1, "pa": false}\n', "an address has 64 bits"),
        (b'{"ask": "translate", "guest": "7", "address": 1, "pa": false}\n', "no guest 7 runs"),
        (b"x" * MAX_REQUEST, "not JSON"),
    ],
)
async def test_a_bad_request_is_answered(running: Running, line: bytes, words: str) -> None:
    assert words in (await running.ask(line))["error"]


async def test_who_says_nothing_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    chosen = ServeOptions(guests=0)
    bench = Bench(chosen, load_policy("default"))
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        await Control(bench).serve(ours)


async def test_a_socket_that_is_served_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "control"

    async def ignore(sock: trio.socket.SocketType) -> None:
        await trio.lowlevel.checkpoint()

    async with listening(path, socket.SOCK_STREAM, ignore):
        with pytest.raises(DocumentError, match="in use"):
            async with listening(path, socket.SOCK_STREAM, ignore):
                pass
    assert not path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))
    async with listening(path, socket.SOCK_STREAM, ignore):
        assert path.is_socket()
    path.write_text("not a socket")
    with pytest.raises(DocumentError, match="in use"):
        async with listening(path, socket.SOCK_STREAM, ignore):
            pass
    assert path.read_text() == "not a socket"


async def test_a_socket_that_somebody_else_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "control"

    async def ignore(sock: trio.socket.SocketType) -> None:
        await trio.lowlevel.checkpoint()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as others:
        async with listening(path, socket.SOCK_STREAM, ignore):
            path.unlink()
            others.bind(str(path))
        assert path.is_socket()


@pytest.mark.parametrize(
    "command", ["status", "destroy kvm-1", "quota kvm-1 pages=5", "trace on", "translate kvm-1 0x40000000"]
)
def test_ctl_without_a_serve_is_one_line(command: str, tmp_path: Path, capsys: Capture) -> None:
    name, *rest = command.split()
    assert run(["ctl", name, "--control", str(tmp_path / "none"), *rest]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("answer", ["", "5", "[]", "null", "{}", '"status"', '{"format": "mediator-ctl/2"}'])
async def test_ctl_before_somebody_else_is_one_line(answer: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "control"

    async def serve(sock: trio.socket.SocketType) -> None:
        await sock.recv(MAX_REQUEST)
        await sock.send(answer.encode())

    async with listening(path, socket.SOCK_STREAM, serve):
        assert await trio.to_thread.run_sync(run, ["ctl", "status", "--control", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("limits", ["pages", "pages=", "pages=x", "pages=-1", "pages=1 pages=2", "=1"])
def test_ctl_wants_limits(limits: str, tmp_path: Path, capsys: Capture) -> None:
    assert run(["ctl", "quota", "--control", str(tmp_path / "none"), "kvm-1", *limits.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctl_wants_an_address(tmp_path: Path, capsys: Capture) -> None:
    assert run(["ctl", "translate", "--control", str(tmp_path / "none"), "kvm-1", "0x"]) == 2
    assert "no address" in capsys.readouterr().err
