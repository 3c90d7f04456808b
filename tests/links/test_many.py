"""The socket for VMs of others: a thousand that say nothing, and one that wants to be served."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from hv_models.link import Flavour
from hv_models.machine import RAM_BASE
from hv_models.memory import GuestRam, PageStore
from hv_models.socket_conduit import open_conduit
from mediator.policies import load_policy
from mediator.service import listener
from mediator.service.options import ServeOptions
from mediator.service.serve import Bench
from optee.abi.smc import API_UID, Function

IDLE = 1000


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def connect(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await sock.connect(str(path))
    await trio.testing.wait_all_tasks_blocked()  # it is accepted: the backlog is shorter than a thousand
    return sock


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_thousand_idle_connections_keep_nobody_out(tmp_path: Path, autojump_clock: MockClock) -> None:
    path = tmp_path / "door"
    bench = Bench(ServeOptions(guests=0, external=path, check=True), load_policy("default"))
    before = descriptors()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await bench.wait_until_up()
        assert mode(path) == 0o600
        idle = [await connect(path) for _ in range(IDLE)]
        ram = GuestRam(PageStore("wanted", 16), RAM_BASE)
        async with open_conduit(await connect(path), Flavour.XEN, "wanted", 1, [ram]) as conduit:
            assert (await conduit.call(0, (int(Function.CALLS_UID), *(0,) * 7)))[:4] == API_UID
            await conduit.stop()
        for sock in idle:
            assert b"no VM was started" in await sock.recv(512)
            assert await sock.recv(512) == b""
            sock.close()
        bench.stop()
    assert [guest.ended for guest in bench.guests] == ["finished"]
    assert descriptors() < before + 10


async def test_another_user_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "door"
    served: list[trio.socket.SocketType] = []

    async def serve(sock: trio.socket.SocketType) -> None:
        served.append(sock)
        await trio.lowlevel.checkpoint()

    async with listener.listening(path, socket.SOCK_SEQPACKET, serve):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        uid = os.getuid()
        with await connect(path) as sock:
            if uid:
                assert await sock.recv(1) == b"" and served == []
        monkeypatch.undo()
        with await connect(path) as sock:
            assert await sock.recv(1) == b""
    assert served
