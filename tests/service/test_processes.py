"""`mediator serve` with guests in processes of their own."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

import guests
from guests import process_parent
from guests.process import Settings
from guests.workloads import Report, hello
from hv_models import link
from hv_models.link import Flavour, Request
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, PageStore
from hv_models.socket_link import SocketLink
from mediator.policies import load_policy
from mediator.service import serve
from mediator.service.options import ServeOptions
from mediator.service.processes import GuestProcess, NoProcess, WarmParent
from mediator.service.serve import Bench, run_bench
from mediator.service.summary import Summary
from tests.progress import without_progress

NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TOP = Path(__file__).parent.parent.parent
Act = Callable[[Bench], Awaitable[None]]


def run(act: Act, **options: Any) -> tuple[Bench, Summary]:
    """Run guest processes until `act` has returned; every step is checked."""
    chosen = ServeOptions(**{"workload": "hello", "check": True, "in_process": False, **options})
    bench = Bench(chosen, load_policy(chosen.policy))
    found: list[Summary] = []

    async def main() -> None:
        async def whole() -> None:
            found.append(await bench.run())

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(whole)
                await act(bench)
                bench.stop()

    trio.run(main)
    return bench, found[0]


async def _wait_until_up(bench: Bench) -> None:
    await bench.wait_until_up()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("workload", ["hello", "shm"])
def test_guests_in_processes_are_served_and_leave_nothing(workload: str) -> None:
    bench, summary = run(_wait_until_up, workload=workload)
    assert [(guest.name, guest.vmid, guest.ended) for guest in summary.guests] == [
        ("kvm-1", 1, "finished"),
        ("xen-2", 2, "finished"),
        ("kvm-3", 3, "finished"),
        ("xen-4", 4, "finished"),
    ]
    for guest in summary.guests:
        assert (guest.errors, guest.notes) == (0, ())
        assert guest.invokes and guest.rpcs and guest.pages_pinned_peak
    assert summary.violations == [] and summary.left == NOTHING_LEFT and summary.good
    assert sum(guest.invokes for guest in summary.guests) == summary.ta_invokes
    assert 0 < summary.up_seconds <= summary.seconds
    assert not any(_alive(guest.process.pid) for guest in bench.guests if guest.process)


@pytest.mark.parametrize("seed", range(50 if NIGHTLY else 6))
def test_a_guest_process_that_is_killed_disturbs_nobody(seed: int) -> None:
    """At any moment: the VM is destroyed, everything of it is given back, and the others go on."""
    choose = Random(seed)

    async def act(bench: Bench) -> None:
        await bench.wait_until_up()
        victim = choose.choice(bench.guests)
        assert victim.process is not None and victim.accounts is not None
        for _ in range(choose.randrange(1, 300)):
            await trio.lowlevel.checkpoint()
        os.kill(victim.process.pid, signal.SIGKILL)
        while victim.vm is not None:
            await trio.lowlevel.checkpoint()
        assert set(victim.accounts.ledger.sums().values()) == {0}
        others = [guest for guest in bench.guests if guest is not victim]
        before = [guest.status().calls for guest in others]
        while any(guest.status().calls == calls for guest, calls in zip(others, before, strict=True)):
            await trio.lowlevel.checkpoint()

    _, summary = run(act, guests=3, workload=choose.choice(("hello", "mixed", "shm")))
    assert sorted(guest.ended for guest in summary.guests) == ["finished", "finished", "killed"]
    assert summary.violations == [] and summary.left == NOTHING_LEFT
    assert sum(guest.errors for guest in summary.guests) == 0 and summary.good


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("flags", [(), ("--in-process",)], ids=["processes", "in process"])
def test_a_signal_ends_the_program_in_order(name: str, flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "mediator", "serve", "--guests", "2", "--workload", "hello", "--json", *flags]
    process = subprocess.Popen(
        command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None and any("2 guests are up" in line for line in process.stderr)
    os.killpg(process.pid, signal.Signals[name])  # as a terminal does it, `timeout`, or a service manager
    out, err = process.communicate(timeout=60)
    assert (process.returncode, without_progress(err)) == (0, "")
    told = json.loads(out)
    assert [guest["ended"] for guest in told["guests"]] == ["finished", "finished"]
    assert told["left"] == NOTHING_LEFT and told["violations"] == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_guests_are_started_ends_the_program_in_order(name: str, tmp_path: Path) -> None:
    """As soon as there is a door: the parent of the guests is still at its imports."""
    door, control = tmp_path / "door", tmp_path / "control"
    doors = ["--external", "--socket", str(door), "--control", str(control)]
    command = [sys.executable, "-m", "mediator", "serve", "--guests", "2", "--workload", "hello", "--json", *doors]
    process = subprocess.Popen(
        command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not control.exists() and process.poll() is None:
        os.sched_yield()
    os.killpg(process.pid, signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, without_progress(err)) == (0, "")
    told = json.loads(out)
    assert {guest["ended"] for guest in told["guests"]} <= {"finished"} and told["left"] == NOTHING_LEFT
    assert not door.exists() and not control.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_mediator_that_is_killed_takes_its_guests_along() -> None:
    command = [sys.executable, "-m", "mediator", "serve", "--guests", "2", "--workload", "hello"]
    process = subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None and any("2 guests are up" in line for line in process.stderr)
    process.kill()
    process.stderr.read()  # until nobody is left that has it
    process.wait()
    process.stderr.close()


def test_the_parent_of_guests_says_nothing_of_a_mediator_that_was_killed() -> None:
    """Which leaves what it was told last unread."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link_end, link_start = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "guests.process_parent", str(theirs.fileno())]
    with control, theirs, link_end, link_start, os.fdopen(os.memfd_create("images"), "wb") as images:
        images.write(b"{}")
        images.flush()
        parent = subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()])
        socket.send_fds(control, [b"images"], [images.fileno()])
        settings = json.dumps(asdict(Settings("kvm-1", "kvm", "hello", 1 << 20, RAM_BASE, 1))).encode()
        socket.send_fds(control, [settings], [link_start.fileno(), link_start.fileno()])
        assert int(control.recv(200, socket.MSG_PEEK))
    assert (parent.communicate(timeout=60)[1], parent.returncode) == ("", 0)


async def test_a_guest_for_which_there_is_no_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, trio.socket.from_stdlib_socket(ours) as control:
        told: list[str] = []

        async def spawn() -> None:
            with pytest.raises(NoProcess) as refusal:
                await WarmParent(control).spawn(Settings("kvm-1", "kvm", "hello", 1 << 20, RAM_BASE, 1))
            told.append(str(refusal.value))

        before = _descriptors()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spawn)
            await trio.testing.wait_all_tasks_blocked()
            record, fds, _, _ = socket.recv_fds(theirs, 4096, 2)
            process_parent._make_guest(theirs, record, fds, {})
        assert told == ["kvm-1: Resource temporarily unavailable"]
        assert _descriptors() == before


def test_a_parent_of_guests_that_is_gone_ends_the_run_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    summary = run_bench(ServeOptions(guests=2, in_process=False))
    assert summary.faults == ("kvm-1: the parent of guest processes is gone",)
    assert summary.guests == () and summary.left == NOTHING_LEFT and not summary.good


@pytest.mark.parametrize("hypervisor", ["kvm", "xen"])
@pytest.mark.parametrize("in_process", [True, False])
def test_the_host_can_be_a_client(hypervisor: str, in_process: bool) -> None:
    _, summary = run(_wait_until_up, guests=1, hypervisor=hypervisor, in_process=in_process, host_client=True)
    host, guest = summary.guests
    assert (host.name, host.vmid, host.errors, host.ended) == ("host", 1, 0, "finished")
    assert (guest.vmid, guest.errors, guest.ended) == (2, 0, "finished")
    assert host.invokes and guest.invokes and summary.good and summary.violations == []
    assert host.invokes + guest.invokes == summary.ta_invokes


def test_the_shortest_run_shows_the_whole_tour() -> None:
    """A hundred invocations of each guest, and of the first a panic, a cancellation, and more clients than threads."""
    options = ServeOptions(guests=2, duration=0, check=True, in_process=False)
    summary = run_bench(options)
    assert summary.good and summary.violations == [] and summary.left == NOTHING_LEFT
    for guest in summary.guests:
        assert (guest.errors, guest.notes, guest.ended) == (0, (), "finished")
        assert guest.invokes >= 100 and guest.rpcs and guest.pages_pinned_peak
    assert summary.thread_limits and summary.panics and summary.cancels
    assert sum(guest.invokes for guest in summary.guests) == summary.ta_invokes


async def _start_stranger(sock: trio.socket.SocketType, name: str) -> tuple[SocketLink, int]:
    """Start a VM over a connected socket: its link, and its client id."""
    peer = SocketLink(sock)
    store = PageStore(name, 16)
    table = link.memory_table([link.MemoryRegion(RAM_BASE, 16 * PAGE_SIZE, 0, 0)])
    await peer.send(Request.GET_FEATURES)
    await peer.send(Request.SET_FEATURES, link.number(0))
    await peer.send(Request.SET_VM, link.vm(Flavour.KVM, 1, name))
    await peer.send(Request.SET_MEM_TABLE, table, fds=[store.fd])
    await peer.send(Request.START)
    *_, started = [await peer.receive() for _ in range(5)]
    assert started.request == Request.START
    return peer, link.read_number(started)


def test_a_stranger_neither_keeps_the_guests_waiting_nor_makes_the_run_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what it means to do, so it counts as up when it comes; and how it behaves is its own concern."""
    door = tmp_path / "door"
    arrived = trio.Event()

    async def waiting(guest: guests.Guest, report: Report) -> None:
        await arrived.wait()
        await hello(guest, report)

    async def act(bench: Bench) -> None:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        while True:
            await trio.lowlevel.checkpoint()
            with suppress(FileNotFoundError, ConnectionRefusedError):
                await sock.connect(str(door))
                break
        peer, _ = await _start_stranger(sock, "stranger")
        arrived.set()
        await bench.wait_until_up()
        assert [(guest.name, guest.ended) for guest in bench.guests] == [("kvm-1", ""), ("stranger", "")]
        await peer.send(Request.START)
        assert (await peer.receive()).request == Request.ERROR
        peer.close()

    monkeypatch.setattr(serve, "WORKLOADS", {"hello": waiting})
    monkeypatch.setattr(serve, "UP_SECONDS", float("inf"))
    _, summary = run(act, guests=1, in_process=True, external=door)
    assert [guest.ended for guest in summary.guests] == ["finished", "failed"]
    assert summary.good and summary.violations == []


def test_who_comes_or_dies_while_guests_are_started_takes_no_id_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = tmp_path / "door"
    original = WarmParent.spawn
    dead = trio.Event()
    ids: list[int] = []

    async def come(name: str) -> SocketLink:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        await sock.connect(str(door))
        peer, client_id = await _start_stranger(sock, name)
        ids.append(client_id)
        return peer

    async def spawn(self: WarmParent, settings: Settings) -> GuestProcess:
        process = await original(self, settings)
        if settings.name == "kvm-1":
            (await come("early")).close()
            process.kill()
        elif settings.name == "xen-2":
            await dead.wait()
        return process

    async def act(bench: Bench) -> None:
        while not ids or any(guest.name == "kvm-1" for guest in bench.guests):
            await trio.lowlevel.checkpoint()
        dead.set()
        await bench.wait_until_up()
        (await come("late")).close()

    monkeypatch.setattr(WarmParent, "spawn", spawn)
    monkeypatch.setattr(serve, "UP_SECONDS", float("inf"))
    _, summary = run(act, guests=3, external=door)
    assert ids == [4, 1]
    assert {guest.name: guest.vmid for guest in summary.guests} == {"early": 4, "xen-2": 2, "kvm-3": 3, "late": 1}
    assert summary.good and summary.violations == [] and summary.left == NOTHING_LEFT


def test_the_id_of_a_guest_that_was_killed_is_the_next_ones(tmp_path: Path) -> None:
    """A stranger gets the freed id, and runs clean."""
    door = tmp_path / "door"

    async def act(bench: Bench) -> None:
        await bench.wait_until_up()
        first = bench.guests[0]
        assert first.process is not None
        os.kill(first.process.pid, signal.SIGKILL)
        while not first.ended:
            await trio.lowlevel.checkpoint()
        client = [sys.executable, "-I", str(TOP / "docs" / "how-to" / "attach_client.py"), str(door)]
        ended = await trio.run_process(client, capture_stdout=True)
        assert b"client id: 1\n" in ended.stdout and b"close session: 0x0\n" in ended.stdout

    _, summary = run(act, guests=2, external=door)
    assert [(guest.name, guest.vmid, guest.ended) for guest in summary.guests] == [
        ("kvm-1", 1, "killed"),
        ("xen-2", 2, "finished"),
        ("by-hand", 1, "finished"),
    ]
    assert summary.good and summary.violations == [] and summary.left == NOTHING_LEFT
