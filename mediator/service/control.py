"""The control socket of a running `serve`: one line of JSON asks, one line answers, and the connection ends.

    {"ask": "status"}
    {"ask": "destroy", "guest": "kvm-1"}
    {"ask": "quota", "guest": "kvm-1", "limits": {"pages": 100}}
    {"ask": "trace", "on": true}
    {"ask": "translate", "guest": "kvm-1", "address": 1073741824, "pa": false}

An answer has `error`, or what was asked for.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import trio

from hv_models.vm import VirtualMachine
from mediator.board import Board
from mediator.documents import DocumentError
from mediator.service import quota
from mediator.service.served import ServedGuest

if TYPE_CHECKING:
    from mediator.service.serve import Bench

FORMAT: Final = "mediator-ctl/1"
STATUS_KEYS: Final = (
    "name", "hypervisor", "vmid", "calls", "invokes", "rpcs", "denied", "refused", "rejected", "errors",
    "pages_pinned", "pages_quota", "threads", "ended",
)  # fmt: skip
"""What `status` says of each guest."""
MAX_REQUEST: Final = 4096
"""Bytes of a request. Stops a peer from filling memory with a line that never ends."""
REQUEST_SECONDS: Final = 10.0
"""From connection to the last byte of the answer. Stops idle connections from piling up."""


class Control:
    """Answers what is asked on the control socket."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    async def serve(self, sock: trio.socket.SocketType) -> None:
        """Answer one request."""
        with trio.move_on_after(REQUEST_SECONDS):
            stream = trio.SocketStream(sock)
            try:
                answer = self.answer(await _line(stream))
                await stream.send_all(json.dumps(answer).encode() + b"\n")
            except trio.BrokenResourceError:
                return  # whoever asked does not listen

    def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to a request."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "not JSON"}
        if not isinstance(request, dict):
            return {"error": "an object is wanted"}
        match request:
            case {"ask": "status"}:
                return self._status()
            case {"ask": "trace", "on": bool(on)}:
                self._bench.board.core.tracing = on
                return {"tracing": on}
            case {"ask": "destroy", "guest": str(name)}:
                return self._destroy(name)
            case {"ask": "quota", "guest": str(name), "limits": dict(limits)}:
                return self._change_quota(name, limits)
            case {"ask": "translate", "guest": str(name), "address": int(address), "pa": bool(physical)}:
                return self._translate(name, address, physical=physical)
        return {"error": "unknown request"}

    def _find(self, name: str) -> ServedGuest | None:
        """The running guest with that client id or name: an id first, since strangers choose their names."""
        running = {guest.vm.client_id: guest for guest in self._bench.guests if guest.vm is not None}
        by_id = next((guest for client, guest in running.items() if str(client) == name), None)
        return by_id or next((guest for guest in running.values() if guest.name == name), None)

    def _status(self) -> dict[str, Any]:
        bench = self._bench
        core = bench.board.core
        guests = []
        for guest in bench.guests:
            status = guest.status().as_data(*STATUS_KEYS)
            status["memory"] = self._memory(guest)
            status["storage_memory"] = self._storage_memory(guest)
            if guest.accounts is not None:
                status.update(quota.describe(guest.accounts.ledger, guest.accounts.counters))
                status["flow"] = quota.describe_flow(bench.board, guest.accounts.client_id) if guest.vm else None
            guests.append(status)
        return {
            "format": FORMAT,
            "policy": core.policy.name,
            "tracing": core.tracing,
            "pool": asdict(core.pool.status()),
            "secure_calls": None if core.flow is None else core.flow.running,
            "guests": guests,
        }

    def _memory(self, guest: ServedGuest) -> list[dict[str, Any]]:
        """Counters of OP-TEE's pools for a guest; none where OP-TEE is another process."""
        board = self._bench.board
        pools = board.model.pools(guest.vm.client_id) if isinstance(board, Board) and guest.vm is not None else None
        if pools is None:
            return []
        return [{"pool": name, **counters._asdict()} for name, counters in pools.statistics.items()]

    def _storage_memory(self, guest: ServedGuest) -> dict[str, Any] | None:
        """Record of the guest's memory manager of secure storage; None where there is none."""
        board = self._bench.board
        if guest.vm is None or not isinstance(board, Board):
            return None
        memory = board.model.storage_memory(guest.vm.client_id)
        return None if memory is None else memory.as_data()

    def _change_quota(self, name: str, limits: dict[Any, Any]) -> dict[str, Any]:
        guest = self._find(name)
        if guest is None or guest.vm is None:
            return {"error": f"no guest {name} runs"}
        try:
            now = quota.change(self._bench.board, guest.vm.client_id, limits)
        except DocumentError as error:
            return {"error": "; ".join(error.lines)}
        return {"guest": guest.name, "limits": asdict(now)}

    def _destroy(self, name: str) -> dict[str, Any]:
        guest = self._find(name)
        if guest is None:
            return {"error": f"no guest {name} runs"}
        guest.life.cancel()
        return {"destroyed": guest.name}

    def _translate(self, name: str, address: int, *, physical: bool) -> dict[str, Any]:
        guest = self._find(name)
        if guest is None or guest.vm is None:
            return {"error": f"no guest {name} runs"}
        if not 0 <= address < 1 << 64:
            return {"error": "an address has 64 bits"}
        if not physical:
            return {"lines": _forth_and_back(guest.vm, address, self._bench)}
        ipa = guest.vm.find(address)
        if ipa is None:
            return {"lines": [f"PA {address:#x} is not {guest.name}'s: {self._bench.board.machine.describe(address)}"]}
        return {
            "lines": [f"PA {address:#x} is IPA {ipa:#x} of {guest.name}", *str(guest.vm.stage2.walk(ipa)).split("\n")]
        }


def _forth_and_back(vm: VirtualMachine, ipa: int, bench: Bench) -> list[str]:
    walk = vm.stage2.walk(ipa)
    lines = str(walk).split("\n")
    if walk.pa is not None:
        lines.append(f"back: PA {walk.pa:#x} is {bench.board.machine.describe(walk.pa)}")
    return lines


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < MAX_REQUEST:
        part = await stream.receive_some(MAX_REQUEST - len(data))
        if not part:
            break
        data += part
    return data
