"""Plays the secure side of a recording, and compares what our driver does with what the real one did.

Left out are foreign interrupts, and the notifications that the recorded machine's console caused. Compared are
function, command, TA command, attributes, sizes, values, and how RPCs were answered; addresses, cookies and file
handles are matched up instead.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from hv_models.memory import GuestRam
from optee.abi.message import TYPE_MASK, Command, Message, Param, ParamType, message_size
from optee.abi.results import Result
from optee.abi.rpc import FsOperation, RpcCommand, ShmType
from optee.abi.smc import Function, Registers, RpcReturn, from_pair, is_rpc, to_pair
from tests.shared import SHARED

FILE_NAME = b"/0\0"
MISSING_NAME = b"/missing\0"
NOISE = {Function.GET_ASYNC_NOTIF_VALUE}
MEMORY = range(ParamType.RMEM_INPUT, ParamType.TMEM_INOUT + 1)
REGISTERED = range(ParamType.RMEM_INPUT, ParamType.RMEM_INOUT + 1)


@dataclass
class Step:
    """One SMC of the real driver, and its answer; `message` and `rpc` as they stood at each end."""

    regs: Registers
    message: Message | None
    rpc: Message | None
    answer: Registers = ()
    message_after: Message | None = None
    rpc_after: Message | None = None

    @property
    def noise(self) -> bool:
        bottom_half = self.message is not None and self.message.cmd == Command.DO_BOTTOM_HALF
        return self.regs[0] in NOISE or (self.regs[0] != Function.RETURN_FROM_RPC and bottom_half)


def _numbers(words: list) -> Registers:
    return tuple(int(word, 16) if isinstance(word, str) else word for word in words)


def _memory(event: dict, kind: str) -> Message | None:
    for entry in event.get("memory", ()):
        if entry["is"] == kind:
            data = bytes.fromhex(entry["hex"])
            return Message.unpack(data)
    return None


def sections(name: str) -> dict[str, list[Step]]:
    """Read a recording: the driver's SMCs under each mark."""
    result: dict[str, list[Step]] = {}
    steps: list[Step] = []
    open_calls: dict[int, Step] = {}
    interrupted: dict[int, Step] = {}
    with gzip.open(Path(SHARED) / "traces" / f"{name}.jsonl.gz", "rt") as lines:
        next(lines)
        for line in lines:
            event = json.loads(line)
            match event["e"]:
                case "mark":
                    steps = result.setdefault(event["name"], [])
                case "call":
                    regs = _numbers(event["regs"])
                    if regs[0] == Function.RETURN_FROM_RPC and regs[3] in interrupted:
                        open_calls[event["id"]] = interrupted.pop(regs[3])
                        continue
                    step = Step(regs, _memory(event, "message"), _memory(event, "rpc"))
                    open_calls[event["id"]] = step
                    steps.append(step)
                case "return":
                    step = open_calls.pop(event["id"])
                    answer = _numbers(event["regs"])
                    if answer[0] == RpcReturn.FOREIGN_INTR:
                        interrupted[answer[3]] = step
                        continue
                    step.answer = answer
                    step.message_after, step.rpc_after = _memory(event, "message"), _memory(event, "rpc")
    return {mark: [step for step in steps if not step.noise] for mark, steps in result.items()}


def image_sizes(steps: list[Step]) -> dict[bytes, int]:
    """Return the size of each TA image that was loaded, by the UUID's bytes."""
    sizes = {}
    for step in steps:
        if step.regs[0] == Function.RETURN_FROM_RPC and step.rpc and step.rpc.cmd == RpcCommand.LOAD_TA:
            words = step.rpc.params[0]
            octets = words.a.to_bytes(8, "little") + words.b.to_bytes(8, "little")
            sizes[octets] = step.rpc.params[1].b
    return sizes


class RecordedSide:
    """The conduit. `expect` says what comes next; `finish` that all of it came."""

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram
        self.steps: list[Step] = []
        self.compared = 0
        self.cookies: dict[int, int] = {}
        self.pages: dict[int, int] = {}
        self.lists: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.at = 0
        self.argument = 0

    def expect(self, steps: list[Step]) -> None:
        assert not self.steps
        self.steps = list(steps)

    def finish(self) -> None:
        assert not self.steps, f"{len(self.steps)} recorded SMCs were not made"

    async def wait_for_interrupt(self) -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        await trio.lowlevel.cancel_shielded_checkpoint()
        assert self.steps, f"one SMC too many: {Function(regs[0]).name}"
        step = self.steps.pop(0)
        assert Function(regs[0]).name == Function(step.regs[0]).name
        if regs[0] == Function.RETURN_FROM_RPC:
            self.returned(step, regs)
        elif step.message is not None:
            self.called(step, regs)
        else:
            assert regs == step.regs
        self.compared += 1
        return (*self.answer(step), *regs[4:])

    def called(self, step: Step, regs: Registers) -> None:
        recorded = step.message
        assert recorded is not None
        self.at = from_pair(*regs[1:3])
        if regs[0] == Function.CALL_WITH_REGD_ARG:
            self.match_cookie(from_pair(*step.regs[1:3]), self.at)
            self.at = self.pages[self.at] + regs[3]
            assert regs[3] == step.regs[3]
        message = self.message(self.at)
        assert message.header == recorded.header
        for ours, theirs in zip(message.params, recorded.params, strict=True):
            if recorded.cmd == Command.REGISTER_SHM:
                assert (ours.attr, ours.b) == (theirs.attr, theirs.b)
                self.cookies[theirs.c] = ours.c
                self.pages[ours.c] = int.from_bytes(self.ram.read(ours.a & ~0xFFF, 8), "little")
            else:
                self.compare(ours, theirs)
        if regs[0] != Function.CALL_WITH_ARG:
            self.argument = self.at + message_size(len(message.params))

    def returned(self, step: Step, regs: Registers) -> None:
        assert regs[3] == step.regs[3]
        if step.rpc is None:
            if from_pair(*step.regs[4:6]):
                self.cookies[from_pair(*step.regs[4:6])] = from_pair(*regs[4:6])
                self.pages[from_pair(*regs[4:6])] = from_pair(*regs[1:3])
            return
        reply = self.message(self.argument)
        assert reply.header == step.rpc.header
        for ours, theirs in zip(reply.params, step.rpc.params, strict=True):
            if reply.cmd == RpcCommand.SHM_ALLOC:
                assert (ours.attr, ours.b) == (theirs.attr, theirs.b)
                self.cookies[theirs.c] = ours.c
                self.lists[ours.c] = int.from_bytes(self.ram.read(ours.a & ~0xFFF, 8), "little")
            elif reply.cmd == RpcCommand.FS and theirs.attr == ParamType.VALUE_OUTPUT:
                self.handles[theirs.a] = ours.a
            elif reply.cmd in (RpcCommand.FS, RpcCommand.SHM_FREE) and theirs.attr == ParamType.VALUE_INPUT:
                assert ours.attr == theirs.attr and ours.a == theirs.a and ours.c == theirs.c
            else:
                self.compare(ours, theirs)

    def compare(self, ours: Param, theirs: Param) -> None:
        """Compare a parameter; the cookie must be the one that the recorded one became."""
        assert ours[:3] == theirs[:3]
        if theirs.attr & TYPE_MASK in REGISTERED:
            self.match_cookie(theirs.c, ours.c)

    def match_cookie(self, recorded: int, ours: int) -> None:
        assert self.cookies[recorded] == ours

    def message(self, at: int) -> Message:
        return Message.unpack(self.ram.read(at, 0x1000 - at % 0x1000))

    def answer(self, step: Step) -> Registers:
        """Write what OP-TEE wrote, in our guest's words."""
        a0, a1, a2, a3 = step.answer
        if a0 in (RpcReturn.CMD, RpcReturn.FREE) and from_pair(a1, a2):
            cookie = self.cookies[from_pair(a1, a2)]
            if a0 == RpcReturn.CMD:
                self.argument = self.pages[cookie]
            a1, a2 = to_pair(cookie)
        if a0 == RpcReturn.CMD:
            assert step.rpc_after is not None
            self.ask(step.rpc_after)
        elif not is_rpc(a0) and step.message_after is not None:
            after = step.message_after
            params = [self.translate(param) for param in after.params]
            whole = Message(*after.header[:-1], params)
            self.ram.write(self.at, whole.pack())
        return a0, a1, a2, a3

    def ask(self, request: Message) -> None:
        params = [self.translate(param) for param in request.params]
        value = params[0]
        if request.cmd == RpcCommand.SHM_FREE:
            assert value.a == ShmType.APPL
            params[0] = value._replace(b=self.cookies[value.b])
        elif request.cmd == RpcCommand.FS and value.a in (FsOperation.OPEN, FsOperation.CREATE):
            reply = self.steps[0].rpc
            missing = reply is not None and reply.ret == Result.ITEM_NOT_FOUND
            self.ram.write(self.lists[params[1].c], MISSING_NAME if missing else FILE_NAME)
        elif request.cmd == RpcCommand.FS:
            params[0] = value._replace(b=self.handles[value.b])
        self.ram.write(self.argument, Message(*request.header[:-1], params).pack())

    def translate(self, param: Param) -> Param:
        if param.attr & TYPE_MASK in MEMORY and param.c in self.cookies:
            return param._replace(c=self.cookies[param.c])
        return param


def flatten(parts: dict[str, list[Step]]) -> Iterator[Step]:
    for steps in parts.values():
        yield from steps
