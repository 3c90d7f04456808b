"""Record a guest as it talks to OP-TEE through the mediator, in the trace-file format, while it runs.

Each event is written when it happens and kept by nobody, so a recording may last for days; what is held is one entry
for each call that is suspended. Source of the format: the trace-file description.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from hv_models.memory import PAGE_MASK, PAGE_SIZE
from hv_models.vm import VirtualMachine
from mediator.core.records import Guest
from mediator.trace.expected import LOW, MESSAGE_CALLS, TMEM
from mediator.trace.format import FORMAT, SMALLEST_MESSAGE
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    list_pages,
    message_size,
    page_count,
)
from optee.abi.rpc import RPC_PARAMS
from optee.abi.smc import Cookie, Function, Registers, RpcReturn, VmId, from_pair, is_rpc

MAX_LISTED_PAGES: Final = 1 << 16
"""Pages of a list that is followed; OP-TEE takes none that is longer, and a guest can claim any."""
RPC_SIZE: Final = message_size(RPC_PARAMS)

Entries = list[dict[str, str]]


class TraceFile:
    """A trace that is being written; packed if its name ends in .gz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""
        """Why nothing more is written, in one line."""
        self._closing = ExitStack()
        self._file: TextIO = StringIO()
        self._try(self._open)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line. Where that fails the guest goes on, and the recording ends."""
        if not self.failure:
            self._try(lambda: self._file.write(json.dumps(line, separators=(",", ":")) + "\n"))

    def close(self) -> None:
        """Finish the file."""
        self._try(self._closing.close)

    def _open(self) -> None:
        if self.path.suffix == ".gz":
            # No time stamp inside: the same run makes the same file.
            packed = gzip.GzipFile(self.path, "w", mtime=0)
            self._file = self._closing.enter_context(TextIOWrapper(packed, encoding="utf-8"))
        else:  # line by line: what was recorded is there even if we are killed
            self._file = self._closing.enter_context(self.path.open("w", encoding="utf-8", buffering=1))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self.failure = self.failure or f"{self.path}: the recording ends early: {error.strerror or error}"


class Pages(Protocol):
    """The mediator's own pages, by physical address."""

    def frame(self, pa: int) -> memoryview:
        """The page's bytes; KeyError for what is no page of the mediator's."""
        ...


@dataclass(slots=True)
class _Yielding:
    """A yielding call between its SMCs. at: IPA of its message; params: how many it has; shadow: PA of what OP-TEE
    sees; behind: its RPC argument stands behind the message; last: the RPC that suspended it, 0 at first.
    """

    at: int
    params: int
    behind: bool
    shadow: int = 0
    rpc: int | None = None
    last: int = 0


class Recorder:
    """Records one guest. driver: what drives it; own: the mediator's own calls so far and OP-TEE's answers."""

    def __init__(
        self,
        file: TraceFile,
        vm: VirtualMachine,
        guests: Mapping[VmId, Guest],
        pages: Pages,
        *,
        driver: str,
        policy: str,
        own: Iterable[tuple[Registers, Registers]] = (),
    ) -> None:
        self.file = file
        self.calls = 0
        self._vm = vm
        self._ram = vm.ram
        self._guest = guests[vm.client_id]
        self._pages = pages
        self._suspended: dict[int, _Yielding] = {}
        file.write(
            {
                "format": FORMAT,
                "driver": driver,
                "secure_world": "OP-TEE",
                "machine": vm.hypervisor.name,
                "between": f"mediator, policy {policy}",
                "client_id": vm.client_id,
                "rpc_params": RPC_PARAMS,
                "ram": [{"ipa": hex(ram.base), "size": hex(ram.size)} for ram in self._ram],
            }
        )
        file.write({"e": "mark", "name": "start"})
        for regs, answer in own:
            file.write({"e": "forward", "id": None, "regs": _hexes(regs, 8)})
            file.write({"e": "answer", "id": None, "regs": _hexes(answer, 4)})

    def look(self, vcpu: int, regs: Registers) -> SmcRecord:
        """The guest executes an SMC: note the memory that it refers to, as it stands now."""
        function = regs[0] & LOW
        call: _Yielding | None = None
        entries: Entries = []
        if function in MESSAGE_CALLS:
            call, entries = self._message(function, regs)
        elif function == Function.RETURN_FROM_RPC:
            call = self._suspended.get(regs[3] & LOW)
            if call is not None:
                entries = self._views(call, rpc=call.last == RpcReturn.CMD)
                entries += [each for entry in entries if entry["is"] == "rpc" for each in self._lists(entry)]
        return SmcRecord(self, vcpu, regs, call, entries)

    def _message(self, function: int, regs: Registers) -> tuple[_Yielding | None, Entries]:
        at: int | None = from_pair(regs[1], regs[2])
        if function == Function.CALL_WITH_REGD_ARG:
            at = self._in_buffer(from_pair(regs[1], regs[2]), regs[3] & LOW)
        header = b"" if at is None else self._read(at, HEADER_SIZE)
        if at is None or not header:
            return None, []
        params = min(HEADER.unpack(header)[7], MAX_PARAMS)
        call = _Yielding(at, params, function != Function.CALL_WITH_ARG)
        if call.behind:
            call.rpc = at + message_size(params)
        entries = self._views(call, rpc=call.behind)
        return call, entries + [each for entry in entries[:1] for each in self._lists(entry)]

    def _in_buffer(self, cookie: int, offset: int) -> int | None:
        """IPA of a byte of a registered buffer."""
        buffer = self._guest.buffers.get(Cookie(cookie))
        if buffer is None:
            return None
        page, within = divmod(buffer.offset + offset, PAGE_SIZE)
        pas = [pa for pinned in buffer.pinned for pa in pinned.pas[: page + 1].tolist()]
        ipa = self._vm.find(pas[page]) if page < len(pas) else None
        return None if ipa is None else ipa + within

    def _views(self, call: _Yielding, *, rpc: bool) -> Entries:
        """The guest's message and RPC argument as they stand."""
        entries = [self._entry("message", call.at, message_size(call.params))]
        if rpc and call.rpc is not None:
            entries.append(self._entry("rpc", call.rpc, RPC_SIZE))
        return [entry for entry in entries if len(entry["hex"]) >= 2 * SMALLEST_MESSAGE]

    def _lists(self, entry: Mapping[str, str]) -> Entries:
        """The page lists that a message names; the next pointer of a full page is an entry of its own."""
        found: Entries = []
        data = bytes.fromhex(entry["hex"])
        count = min(HEADER.unpack_from(data)[7], (len(data) - HEADER_SIZE) // PARAM_SIZE)
        for attribute, pointer, size, _ in PARAM.iter_unpack(data[HEADER_SIZE : message_size(count)]):
            if attribute & TYPE_MASK in TMEM and attribute & NONCONTIG and pointer:
                found += self._list(pointer & ~PAGE_MASK, page_count(size, pointer & PAGE_MASK))
        return found

    def _list(self, at: int, pages: int) -> Entries:
        found: Entries = []
        left = min(pages, MAX_LISTED_PAGES)
        for _ in range(list_pages(left)):
            part = min(left, ENTRIES_PER_PAGE)
            found.append(self._entry("list", at, part * 8))
            left -= part
            if left:
                found.append(self._entry("list", at + PAGE_SIZE - 8, 8))
                at = int.from_bytes(self._read(at + PAGE_SIZE - 8, 8), "little")
        return [entry for entry in found if entry["hex"]]

    def _entry(self, kind: str, at: int, size: int) -> dict[str, str]:
        return {"at": hex(at), "is": kind, "hex": self._read(at, size).hex()}

    def _read(self, at: int, size: int) -> bytes:
        """Bytes of the guest's RAM; none if they do not all lie there."""
        for ram in self._ram:
            if ram.base <= at and at + size <= ram.base + ram.size:
                return ram.read(at, size)
        return b""


class SmcRecord:
    """One SMC of a recorded guest, from the trap to the return. Implements `mediator.shell.Witness`."""

    def __init__(
        self, recorder: Recorder, vcpu: int, regs: Registers, call: _Yielding | None, entries: Entries
    ) -> None:
        self._recorder = recorder
        self._vcpu = vcpu
        self._regs = regs
        self._call = call
        self._entries = entries
        self._id = 0

    def begin(self) -> None:
        """The mediator takes the call."""
        recorder, regs = self._recorder, self._regs
        recorder.calls += 1
        self._id = recorder.calls
        if regs[0] & LOW == Function.RETURN_FROM_RPC:
            recorder._suspended.pop(regs[3] & LOW, None)
        self._write("call", vcpu=self._vcpu, regs=_hexes(regs, 8), **_memory(self._entries))

    def forward(self, regs: Registers) -> None:
        """It goes on to OP-TEE."""
        if self._call is not None and regs[0] in MESSAGE_CALLS:
            self._call.shadow = from_pair(regs[1], regs[2])
        self._write("forward", regs=_hexes(regs, 8), **self._seen(()))

    def answer(self, regs: Registers) -> None:
        """OP-TEE answered."""
        self._write("answer", regs=_hexes(regs, 4), **self._seen(regs))

    def back(self, regs: Registers) -> None:
        """The guest sees the answer."""
        call, recorder = self._call, self._recorder
        entries: Entries = []
        if call is not None:
            call.last = regs[0] & LOW if is_rpc(regs[0]) else 0
            asked = call.last == RpcReturn.CMD
            if asked and not call.behind:
                argument = recorder._guest.arguments.get(Cookie(from_pair(regs[1], regs[2])))
                call.rpc = None if argument is None else argument.ipa
            if call.last:
                recorder._suspended[regs[3] & LOW] = call
            entries = recorder._views(call, rpc=call.behind or asked)
        self._write("return", regs=_hexes(regs, 4), **_memory(entries))

    def _seen(self, answer: Registers) -> dict[str, str]:
        """OP-TEE's view of message and RPC argument."""
        call = self._call
        if call is None or not call.shadow:
            return {}
        shadow = self._recorder._pages.frame(call.shadow)
        end = message_size(call.params)
        views = {"message": shadow[:end].hex()}
        if answer and answer[0] & LOW == RpcReturn.CMD:
            if call.behind:
                views["rpc"] = shadow[end : end + RPC_SIZE].hex()
            else:
                argument = self._recorder._guest.arguments.get(Cookie(from_pair(answer[1], answer[2])))
                if argument is not None:
                    views["rpc"] = argument.page.view[:RPC_SIZE].hex()
        return views

    def _write(self, kind: str, **fields: Any) -> None:
        self._recorder.file.write({"e": kind, "id": self._id, **fields})


def _hexes(regs: Sequence[int], count: int) -> list[str]:
    return [hex(word) for word in regs[:count]]


def _memory(entries: Entries) -> dict[str, Entries]:
    return {"memory": entries} if entries else {}
