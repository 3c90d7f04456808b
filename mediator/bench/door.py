"""The socket door: a guest in a process of its own, beside a bare echo over a socket of the same type."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from hv_models.link import MAX_RECORD, Flavour
from mediator.bench.measure import Timing
from mediator.board import Board
from mediator.core.policy import Policy
from mediator.service.links import Link
from optee.abi.smc import Function

DOOR: Final = "door"
INVOKES_TARGET: Final = 4000
"""Invocations per second of one guest with one caller."""
RATIO_TARGET: Final = 1.5
"""Times that a forwarded fast call may take what the bare echo takes."""
IDLE_TARGET: Final = 1 << 20
"""Bytes that an idle guest may cost the mediator beside its RAM."""
IDLE: Final = 16
"""Guests of each flavour that do nothing."""
_ANONYMOUS: Final = re.compile(r"RssAnon:\s*(\d+) kB")
_FAST: Final = (int(Function.GET_ASYNC_NOTIF_VALUE), *(0,) * 7)


@dataclass(frozen=True, slots=True)
class Door:
    """What was measured. idle, by flavour: bytes of the mediator's for a guest that does nothing, its RAM left out."""

    echo: Timing
    fast: Timing
    invoke: Timing
    idle: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """How many times the bare echo a forwarded fast call takes."""
        return self.fast.median / self.echo.median

    @property
    def rate(self) -> float:
        """Invocations per second, by the median."""
        return 1e6 / self.invoke.median

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "unit": "us",
            **{name: getattr(self, name).as_data() for name in ("echo", "fast", "invoke")},
            "ratio": round(self.ratio, 2),
            "target_ratio": RATIO_TARGET,
            "invokes_per_second": round(self.rate),
            "target_invokes_per_second": INVOKES_TARGET,
            "idle_guest_bytes": max(self.idle.values()),
            "idle_guest_bytes_by_hypervisor": dict(self.idle),
            "target_idle_guest_bytes": IDLE_TARGET,
            "met": {
                "ratio": self.ratio <= RATIO_TARGET,
                "invokes_per_second": self.rate >= INVOKES_TARGET,
                "idle_guest_bytes": max(self.idle.values()) < IDLE_TARGET,
            },
        }


def measure_door(policy: Policy, batches: int) -> Door:
    """Measure with a guest in a process of its own, on a machine that has nothing else to do."""
    return trio.run(_measure, policy, batches)


async def _measure(policy: Policy, batches: int) -> Door:
    pairs = [trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2 + IDLE * len(Flavour))]
    (echo, _), *links = pairs
    async with Board(policy, check=False) as board, trio.open_nursery() as nursery:
        theirs = [pair[1].fileno() for pair in pairs]
        command = [sys.executable, "-m", "mediator.bench.door_guest", str(batches), *map(str, theirs)]
        process = await trio.lowlevel.open_process(
            command, pass_fds=theirs, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            for _, end in pairs:
                end.close()
            nursery.start_soon(_echo, echo)
            nursery.start_soon(Link(board, links[0][0]).serve)
            assert process.stdin is not None and process.stdout is not None
            measured = json.loads(await _line(process.stdout))
            for ours, _ in links[1:]:
                nursery.start_soon(Link(board, ours).serve)
            idle: dict[str, int] = {}
            for flavour in Flavour:
                before = _anonymous()
                await process.stdin.send_all(b"\n")
                await _line(process.stdout)
                idle[flavour.name.lower()] = (_anonymous() - before) // IDLE
            await process.stdin.aclose()
            await process.wait()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()
    echo.close()
    echoed, fast, invoke = (Timing.of(measured[name]) for name in ("echo", "fast", "invoke"))
    return Door(echoed, fast, invoke, idle)


async def _line(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = await stream.receive_some()
        if not part:
            raise RuntimeError("the guest of the door benchmark ended")
        data += part
    return data


def _anonymous() -> int:
    """Bytes of this process that are neither of a file nor shared, as guests' RAM is."""
    found = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


async def _echo(sock: trio.socket.SocketType) -> None:
    while record := await sock.recv(MAX_RECORD):
        await sock.send(record)
