"""Guests as processes: the warm parent that makes them, and what they report."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

import guests
from guests.process import BEGIN, MAX_REPORT, STOP, Settings
from guests.process_parent import MAX_ANSWER
from guests.workloads import Report

_ENDINGS: Final = ("", "finished", "failed")


class GuestProcess:
    """One guest process. `link` is the mediator's end of its link."""

    def __init__(self, pid: int, pidfd: int, link: trio.socket.SocketType, reports: trio.socket.SocketType) -> None:
        self.pid = pid
        self.link = link
        self._pidfd = pidfd
        self._reports = reports

    async def read_reports(self, report: Report) -> str:
        """Take the guest's counters into `report` until it has ended; how it says it did, "" if it did not say."""
        ended = ""
        while not ended:
            try:
                record = await self._reports.recv(MAX_REPORT)
            except OSError:
                break
            if not record:
                break
            ended = _take(report, record)
        return ended

    async def begin(self) -> None:
        """Let its workload run; until then it is up, and idle."""
        await self._say(BEGIN)

    async def stop(self) -> None:
        """Ask the guest to end in order."""
        await self._say(STOP)

    async def _say(self, word: bytes) -> None:
        try:
            await self._reports.send(word)
        except OSError:
            return  # it has ended

    def kill(self) -> None:
        """Cut its power."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    async def wait(self) -> None:
        """Until the process has ended."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def close(self) -> None:
        """Give up what belongs to it."""
        self._reports.close()
        os.close(self._pidfd)


def _take(report: Report, record: bytes) -> str:
    """A guest is not trusted: what is no report changes nothing."""
    try:
        data = json.loads(record)
        counts = [data[name] for name in ("invokes", "errors", "quota")]
        notes, toured, ended = [str(note) for note in data["notes"]], data["toured"] is True, data["ended"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    if not all(type(count) is int and count >= 0 for count in counts) or ended not in _ENDINGS:
        return ""
    report.invokes, report.errors, report.refusals["quota"] = counts
    report.notes, report.toured = notes, toured
    return str(ended)


class NoProcess(Exception):
    """A guest process could not be started; the text is one line that says why."""


class WarmParent:
    """Makes guest processes quickly."""

    def __init__(self, control: trio.socket.SocketType) -> None:
        self._control = control
        self._lock = trio.Lock()

    async def spawn(self, settings: Settings) -> GuestProcess:
        """Start a guest process. Raises NoProcess."""
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reports, reporting = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, reporting:
            async with self._lock:
                request = json.dumps(asdict(settings)).encode()
                try:
                    await _send_fds(self._control, request, theirs.fileno(), reporting.fileno())
                    answer, ancillary, _, _ = await self._control.recvmsg(MAX_ANSWER, socket.CMSG_SPACE(4))
                except ConnectionError:
                    answer, ancillary = b"", []
        if not ancillary:
            ours.close()
            reports.close()
            why = answer.decode() or "the parent of guest processes is gone"
            raise NoProcess(f"{settings.name}: {why}")
        return GuestProcess(int(answer), int.from_bytes(ancillary[0][2], sys.byteorder), ours, reports)


async def _send_fds(sock: trio.socket.SocketType, record: bytes, *fds: int) -> None:
    data = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    await sock.sendmsg([record], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)])


def _ignore_signals() -> None:
    """Ctrl-C on a terminal goes to all its processes, from the start, and so does what `timeout` or a service manager
    sends; it is the mediator that ends the guests.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@asynccontextmanager
async def open_warm_parent(images: Mapping[UUID, bytes]) -> AsyncIterator[WarmParent]:
    """Start the parent; when the block ends, it and all its guests have ended."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = str(Path(guests.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    # One thread: more would only make forking dearer, and nothing of a guest multiplies matrices.
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    with theirs:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "guests.process_parent", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=_ignore_signals,
        )
    sock = trio.socket.from_stdlib_socket(control)
    try:
        with os.fdopen(os.memfd_create("images"), "wb") as file:
            file.write(
                json.dumps({str(uuid): base64.b64encode(data).decode() for uuid, data in images.items()}).encode()
            )
            file.flush()
            with suppress(ConnectionError):  # it is gone already, which `spawn` tells
                await _send_fds(sock, b"images", file.fileno())
        yield WarmParent(sock)
    finally:
        sock.close()
        with trio.CancelScope(shield=True):
            await process.wait()
