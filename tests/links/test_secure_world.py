"""The door turned round: OP-TEE in another process, and what either end may do to the other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from trio.testing import MockClock

from guests.workloads import hello, mixed, shm
from hv_models import link
from hv_models.link import MAX_RECORD, SECURE_FEATURES, Counts, FrameRegion, LinkError, Request, pack
from hv_models.machine import Machine
from hv_models.memory import PAGE_SIZE, PageStore
from mediator.board import BoardError, MediatedMachine
from mediator.cli import run as cli
from mediator.policies import load_policy
from mediator.remote_world import ANSWER_SECONDS, HANDSHAKE_SECONDS, RemoteSecureWorld
from mediator.service import secure_door, serve
from mediator.service.listener import listening
from mediator.service.options import ServeOptions
from mediator.service.secure_door import SecureDoor
from mediator.service.serve import Bench
from mediator.service.summary import Summary
from optee.abi.smc import API_UID, Function
from optee.config import Config
from optee.errors import SecureWorldFault
from optee.secure_world import SecureWorld
from tests.progress import without_progress

SHORT = {"hello": partial(hello, rounds=4), "mixed": partial(mixed, rounds=1, callers=2), "shm": partial(shm, rounds=3)}
CONFIG = Config(guests=4, early_tas=frozenset())
NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
TOP = Path(__file__).parent.parent.parent
UID = (int(Function.CALLS_UID), *(0,) * 7)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "WORKLOADS", SHORT)


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[list[SecureDoor]]:
    """OP-TEE's model at a socket; the links so far."""
    doors: list[SecureDoor] = []

    async def one(sock: trio.socket.SocketType) -> None:
        doors.append(SecureDoor(sock, CONFIG))
        await doors[-1].serve()

    async with listening(path, socket.SOCK_SEQPACKET, one):
        yield doors


def run(path: Path | None, **options: Any) -> Summary:
    chosen = ServeOptions(**{"guests": 2, "check": True, "secure_world": path, **options})

    async def main() -> Summary:
        if path is None:
            return await Bench(chosen, load_policy(chosen.policy)).run()
        async with served(path):
            return await Bench(chosen, load_policy(chosen.policy)).run()

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("policy", ["default", "xen"])
@pytest.mark.parametrize("workload", sorted(SHORT))
def test_the_results_are_those_in_one_process(workload: str, policy: str, tmp_path: Path, short: None) -> None:
    there, here = (run(path, workload=workload, policy=policy).as_data() for path in (tmp_path / "optee", None))
    assert there["left"] == NOTHING_LEFT and there["violations"] == 0 and there["totals"]["errors"] == 0
    assert (there["totals"]["panics"] > 0) == (workload == "mixed")
    for data in (there, here):
        del data["seconds"], data["up_seconds"], data["panic_reports"]
        if workload == "mixed":  # who meets whom is chance there
            for counted in (*data["guests"], data["totals"]):
                for name in ("calls", "rpcs", "thread_limits", "pages_pinned_peak", "pages_translated"):
                    counted.pop(name, None)
            del data["mission"]["pages_translated"]
    assert there == here


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "mediator", *arguments]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def optee(path: Path) -> Iterator[subprocess.Popen[str]]:
    with process("secure-world", "--socket", str(path)) as running:
        assert running.stderr is not None and running.stderr.readline() == f"OP-TEE is served at {path}\n"
        yield running


def test_the_mediator_stands_between_two_strangers(tmp_path: Path) -> None:
    """Its guest is a script without our packages, its OP-TEE another process; a guest of our own is there as well."""
    secure, door = tmp_path / "optee", tmp_path / "door"
    ours = ["--guests", "1", "--workload", "shm", "--secure-world", str(secure)]
    with optee(secure) as world, process("serve", *ours, "--external", "--socket", str(door), "--json") as serving:
        assert serving.stderr is not None and any("1 guests are up" in line for line in serving.stderr)
        script = TOP / "docs" / "how-to" / "attach_client.py"
        told = subprocess.run([sys.executable, "-I", str(script), str(door)], capture_output=True, check=True).stdout
        assert b"client id: 2\n" in told and b"close session: 0x0\n" in told
        serving.terminate()
        out, err = serving.communicate(timeout=60)
        assert (serving.returncode, without_progress(err)) == (0, "")
        data = json.loads(out)
        assert [guest["ended"] for guest in data["guests"]] == ["finished", "finished"]
        assert data["left"] == NOTHING_LEFT and data["ta_invokes"] == data["totals"]["invokes"] + 1
        world.terminate()
        assert world.wait(60) == 0 and not secure.exists()


def test_an_optee_that_is_killed_is_one_clear_line(tmp_path: Path) -> None:
    secure = tmp_path / "optee"
    with optee(secure) as world, process("serve", "--guests", "2", "--secure-world", str(secure), "--json") as serving:
        assert serving.stderr is not None and any("2 guests are up" in line for line in serving.stderr)
        world.kill()
        out, err = serving.communicate(timeout=60)
    assert serving.returncode == 1 and "Traceback" not in err
    assert err.splitlines().count(f"the secure world at {secure}: it is gone") == 1
    assert json.loads(out)["violations"] == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_in_order(name: str, tmp_path: Path) -> None:
    secure = tmp_path / "optee"
    with optee(secure) as world:
        world.send_signal(getattr(signal, name))
        assert world.communicate(timeout=60) == ("", "")
        assert world.returncode == 0 and not secure.exists()


# A mediator that breaks the protocol


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memfd(size: int = PAGE_SIZE) -> int:
    store = PageStore("test", size // PAGE_SIZE)
    return os.dup(store.fd)


def region(base: int = 1 << 40, size: int = PAGE_SIZE, offset: int = 0, stride: int = 1, permutation: int = 0) -> bytes:
    return link.frames(FrameRegion(base, size, offset, stride, permutation))


HELLO = [pack(Request.GET_FEATURES), pack(Request.SET_FEATURES, link.number(SECURE_FEATURES))]
CALL = pack(Request.CALL, link.call(7, UID))


async def say(sock: trio.socket.SocketType, record: bytes, fds: int = 0, size: int = PAGE_SIZE) -> None:
    held = [memfd(size) for _ in range(fds)]
    if held:
        await sock.sendmsg([record], link.rights(held))
    else:
        await sock.send(record)
    link.close_all(held)


async def hear(sock: trio.socket.SocketType) -> link.Message:
    return link.unpack(await sock.recv(MAX_RECORD))


async def rest(sock: trio.socket.SocketType) -> list[str]:
    """The reasons among what comes until the end."""
    reasons = []
    while record := await sock.recv(MAX_RECORD):
        message = link.unpack(record)
        if message.request == Request.ERROR:
            reasons.append(link.read_reason(message))
    return reasons


@asynccontextmanager
async def greeted() -> AsyncIterator[tuple[trio.socket.SocketType, SecureDoor]]:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        async with trio.open_nursery() as nursery:
            door = SecureDoor(ours, CONFIG)
            nursery.start_soon(door.serve)
            for record in HELLO:
                await say(theirs, record)
                assert (await hear(theirs)).reply
            yield theirs, door


BROKEN: list[tuple[bytes, int, str]] = [
    (b"", 1, "a record of 0 bytes is shorter than a header"),
    (CALL[:5], 0, "a record of 5 bytes is shorter than a header"),
    (CALL[:-1], 0, "a payload of 71 bytes where the header says 72"),
    (CALL + b"\0", 0, "a payload of 73 bytes where the header says 72"),
    (bytes(MAX_RECORD + 1), 0, "a record of more than 512 bytes"),
    (CALL, 1, "CALL carries no file descriptors"),
    (pack(Request.CALL, link.call(7, UID), reply=True), 0, "CALL answers what was not asked"),
    (pack(Request.CALL, bytes(71)), 0, "CALL has a payload of 72 bytes, not 71"),
    (pack(Request.SET_VM, link.vm(1, 1, "vm")), 0, "SET_VM is not for a secure world"),
    (pack(Request.START), 0, "START is not for a secure world"),
    (pack(12345), 0, "request 12345 is not for a secure world"),
    (pack(Request.ADD_MEM_REG, region()), 0, "ADD_MEM_REG: 0 file descriptors for one region"),
    (pack(Request.ADD_MEM_REG, region()), 2, "ADD_MEM_REG: 2 file descriptors for one region"),
    (pack(Request.ADD_MEM_REG, region(base=0)), 1, "ADD_MEM_REG: the region at 0x0 has no frames"),
    (pack(Request.ADD_MEM_REG, region(base=1)), 1, "ADD_MEM_REG: the region at 0x1 is not whole pages"),
    (pack(Request.ADD_MEM_REG, region(size=0)), 1, "is not whole pages"),
    (pack(Request.ADD_MEM_REG, region(stride=0)), 1, "has no frames"),
    (pack(Request.ADD_MEM_REG, region(stride=3)), 1, "has no frames"),
    (pack(Request.ADD_MEM_REG, region(base=1 << 48)), 1, "has no frames in 48 bits"),
    (pack(Request.ADD_MEM_REG, region(stride=1 << 31, size=64 * PAGE_SIZE)), 1, "has no frames in 48 bits"),
    (pack(Request.ADD_MEM_REG, region(permutation=(1 << 32) - 1, stride=1 << 10)), 1, "has no frames in 48 bits"),
    (pack(Request.ADD_MEM_REG, region(size=2 * PAGE_SIZE)), 1, "reaches beyond the end of its file"),
    (pack(Request.ADD_MEM_REG, region(offset=PAGE_SIZE)), 1, "reaches beyond the end of its file"),
    (pack(Request.REM_MEM_REG, link.number(1 << 40)), 0, "names a region at 0x10000000000, which there is not"),
    (pack(Request.GET_COUNTS, b""), 0, "GET_COUNTS has a payload of 8 bytes, not 0"),
]


@pytest.mark.parametrize(("record", "fds", "words"), BROKEN)
async def test_what_breaks_the_protocol_ends_the_link_with_one_line(record: bytes, fds: int, words: str) -> None:
    before = descriptors()
    async with greeted() as (sock, door):
        await say(sock, record, fds)
        (reason,) = await rest(sock)
        assert words in reason and reason == door.reason
    assert descriptors() <= before  # what others left may go meanwhile


@pytest.mark.parametrize("first", [HELLO[1], CALL, pack(Request.GET_FEATURES, b"1"), pack(Request.SET_FEATURES)])
async def test_a_greeting_out_of_order_ends_the_link(first: bytes) -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        await theirs.send(first)
        await SecureDoor(ours, CONFIG).serve()
        assert len(await rest(theirs)) == 1


async def test_a_region_twice_and_regions_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_door, "MAX_FRAMES", 3)
    for bases, words in (((1, 1), "which there is"), ((1, 2, 3, 4), "one more than 3 regions")):
        async with greeted() as (sock, _):
            for base in bases:
                await say(sock, pack(Request.ADD_MEM_REG, region(base=base << 40)), 1)
            (reason,) = await rest(sock)
            assert words in reason


async def test_memory_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_door, "MAX_MEMORY", 4 * PAGE_SIZE)
    async with greeted() as (sock, _):
        for base in (1, 2):
            record = pack(Request.ADD_MEM_REG, region(base=base << 40, size=3 * PAGE_SIZE))
            await say(sock, record, 1, 3 * PAGE_SIZE)
        assert ["goes beyond" in reason for reason in await rest(sock)] == [True]


async def test_who_says_nothing_is_let_go(autojump_clock: MockClock) -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        await SecureDoor(ours, CONFIG).serve()
        assert await rest(theirs) == [f"nothing was asked within {secure_door.HANDSHAKE_SECONDS:g} seconds"]


@pytest.mark.parametrize("said", range(5))
async def test_a_mediator_that_is_gone_leaves_nothing(said: int) -> None:
    before = descriptors()
    records = [*HELLO, pack(Request.ADD_MEM_REG, region()), CALL, CALL]
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        for number, record in enumerate(records[:said]):
            await say(theirs, record, number == 2)
    door = SecureDoor(ours, CONFIG)
    await door.serve()
    assert door.reason == ""
    assert descriptors() <= before  # what others left may go meanwhile


async def test_what_optee_dies_of_is_said() -> None:
    """A frame that vanishes while OP-TEE uses it is an external abort."""
    async with greeted() as (sock, door):
        door.model.died = "external abort in the secure world"
        await say(sock, CALL)
        assert await rest(sock) == ["OP-TEE died: external abort in the secure world"]


# A secure world that breaks the protocol


class Stranger:
    """A secure world that says what it likes; `script` is what it answers to each record that comes."""

    def __init__(self, *script: bytes) -> None:
        self.script = list(script)
        self.heard: list[link.Message] = []

    async def serve(self, sock: trio.socket.SocketType) -> None:
        for answer in self.script:
            record, control, _, _ = await sock.recvmsg(MAX_RECORD, link.control_size())
            if not record:
                return
            fds = link.descriptors(control)
            link.close_all(fds)
            self.heard.append(link.unpack(record))
            if answer:
                await sock.send(answer)


GREETED = [
    pack(Request.GET_FEATURES, link.number(3), reply=True),
    pack(Request.SET_FEATURES, link.number(0), reply=True),
]


def answer(*regs: int, number: int = 0) -> bytes:
    return pack(Request.CALL, link.call(number, (*regs, *(0,) * (8 - len(regs)))), reply=True)


async def meet(path: Path, stranger: Stranger, *requests: tuple[int, ...]) -> list[object]:
    """What a mediator's calls are answered by this stranger: registers, or why there are none."""
    found: list[object] = []
    async with listening(path, socket.SOCK_SEQPACKET, stranger.serve):
        world = RemoteSecureWorld(Machine(), path)
        try:
            async with world.connected():
                for regs in requests:
                    try:
                        found.append(await world.forward(regs))
                    except SecureWorldFault as fault:
                        found.append(str(fault))
        except LinkError as error:
            found.append(str(error))
        world.machine.close()
    return found


LIES: list[tuple[bytes, str]] = [
    (answer(*API_UID, number=1), "CALL answers call 1, which is not under way"),
    (answer(*API_UID)[:-1], "a payload of 71 bytes where the header says 72"),
    (answer(*API_UID)[:7], "a record of 7 bytes is shorter than a header"),
    (b"\0" * 600, "a record of more than 512 bytes"),
    (pack(Request.CALL, link.call(0, UID)), "CALL is not for a mediator"),
    (pack(Request.STOP, link.number(0), reply=True), "STOP is not for a mediator"),
    (pack(Request.ADD_MEM_REG, link.number(0), reply=True), "ADD_MEM_REG is not for a mediator"),
    (pack(Request.GET_COUNTS, link.counts(Counts(*range(6))), reply=True), "GET_COUNTS is not for a mediator"),
    (pack(999, reply=True), "request 999 is not for a mediator"),
    (pack(Request.INTERRUPT, b"1"), "INTERRUPT has a payload of 8 bytes, not 1"),
    (pack(Request.ERROR, link.reason("no\nmore")), "no?more"),
]


@pytest.mark.parametrize(("lie", "words"), LIES)
async def test_a_secure_world_that_lies_is_a_fault_and_one_line(lie: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "optee"
    before = descriptors()
    first, second = await meet(path, Stranger(*GREETED, lie, answer(*API_UID)), UID, UID)
    assert first == second == f"the secure world at {path}: {words}"
    assert descriptors() <= before  # what others left may go meanwhile


async def test_one_that_is_gone_and_one_that_says_nothing_are_faults(tmp_path: Path, autojump_clock: MockClock) -> None:
    path = tmp_path / "optee"
    assert await meet(path, Stranger(*GREETED), UID) == [f"the secure world at {path}: it is gone"]
    silent = Stranger(*GREETED, b"", b"")
    assert await meet(path, silent, UID) == [f"the secure world at {path}: no answer within {ANSWER_SECONDS:g} seconds"]


async def test_only_its_four_registers_count(tmp_path: Path) -> None:
    assert await meet(tmp_path / "optee", Stranger(*GREETED, answer(*range(8))), UID) == [(0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([b"rubbish"], "a record of 7 bytes is shorter than a header"),
        ([pack(Request.ERROR, link.reason("not today"))], "not today"),
        ([GREETED[1]], "SET_FEATURES came where the answer to GET_FEATURES is due"),
        ([GREETED[0], pack(Request.SET_FEATURES, link.number(1), reply=True)], "it refuses the features"),
        ([], "it is gone"),
        ([b"", b""], f"no answer within {HANDSHAKE_SECONDS:g} seconds"),
    ],
)
async def test_one_that_greets_wrongly_is_not_used(
    script: list[bytes], words: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    (reason,) = await meet(tmp_path / "optee", Stranger(*script))
    assert words in str(reason)


def test_nobody_there_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "optee"
    assert cli(["serve", "--in-process", "--secure-world", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: the secure world at {path}: No such file or directory\n"


async def test_a_guest_whose_optee_lies_is_isolated_and_its_pages_are_kept(tmp_path: Path) -> None:
    """VM_DESTROYED is answered by nobody: what OP-TEE may still reach stays pinned and nobody gets the id."""
    path = tmp_path / "optee"
    async with served(path):
        world = RemoteSecureWorld(Machine(), path)
        board = MediatedMachine(world)
        faults: list[str] = []
        board.service.on_fault = faults.append
        async with world.connected(), board:
            vm = await board.create("kvm", ram=1 << 20)
            assert (await board.conduit(vm).call(0, UID))[:4] == API_UID
            world.close()
            assert (await board.conduit(vm).call(0, UID))[0] == 2**64 - 1
            await board.destroy(vm, force=True)
            assert vm.alive and board.machine.vms and board.violations == []
            assert set(faults) == {f"the secure world at {path}: the mediator ends"}


@pytest.mark.parametrize("calls", [1, 2, 4, 5, 6, 7, 9, 12, 17, 25, 40, 60])
def test_whenever_optee_dies_the_run_ends_in_order(
    calls: int, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """In the probe, at a birth, in a call, in an RPC: one fault, no violation, and everybody comes to an end."""
    left = [calls]
    answer = SecureWorld.call

    def call(model: SecureWorld, regs: tuple[int, ...]) -> tuple[int, int, int, int]:
        left[0] -= 1
        if left[0] < 0:
            raise SecureWorldFault("external abort")
        return answer(model, regs)

    monkeypatch.setattr(SecureWorld, "call", call)
    path = tmp_path / "optee"
    try:
        with capture_logs() as log:
            summary = run(path, workload="hello")
    except* BoardError as group:
        assert calls < 7 and str(group.exceptions[0]) == "OP-TEE does not know virtualization"
    else:
        assert summary.faults == (f"the secure world at {path}: OP-TEE died: external abort",)
        assert summary.violations == [] and not summary.good
        assert {guest.ended for guest in summary.guests} <= {"failed", "killed"}
        told = [(line["event"], line["guest"], line.get("why")) for line in log if line["log_level"] == "error"]
        assert len(set(told)) == len(told), "a fact is told once"
        quarantined = sorted(guest for event, guest, _ in told if event == "guest_quarantined")
        assert quarantined == [guest.vmid for guest in summary.guests]
