"""Traces for tests: written by hand, event by event, or recorded from our own guests and OP-TEE's model."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import trio
import trio.testing

import guests
from hv_models.machine import Machine, RamBlock
from hv_models.memory import PAGE_SIZE, Bank, Frames, GuestRam, PageStore, PhysicalMemory
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.steps import Forward, Reply
from mediator.policies import load_policy
from mediator.trace.format import read_trace
from mediator.trace.replay import Replay, ReplayReport
from mediator.world import LocalSecureWorld
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    ParamType,
    message_size,
    page_count,
)
from optee.abi.rpc import RPC_PARAMS
from optee.abi.smc import Function, Registers, RpcReturn, from_pair, is_rpc, to_pair
from optee.config import Config
from optee.secure_world import SecureWorld

BASE = 0x4000_0000
LOW = 0xFFFFFFFF
RPC_SIZE = message_size(RPC_PARAMS)
REAL_ADDRESSES = 64
"""Addresses of a page list that a recording holds; the further ones are made up."""

Memory = list[dict[str, str]]
_TMEM = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_MESSAGE_CALLS = (Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG)


def memory(at: int, kind: str, data: bytes) -> dict[str, str]:
    return {"at": hex(at), "is": kind, "hex": data.hex()}


def hexes(regs: Sequence[int], count: int) -> list[str]:
    return [hex(word) for word in (*regs, *(0,) * count)[:count]]


class Tape:
    """A trace in the making."""

    def __init__(self, ram: Sequence[tuple[int, int]] = ((BASE, 64 << 20),), client_id: int | None = None) -> None:
        self.header: dict[str, Any] = {
            "format": "optee-smc-trace/1",
            "driver": "test",
            "secure_world": "test",
            "machine": "test",
            "rpc_params": RPC_PARAMS,
            "between": "nothing" if client_id is None else "a mediator",
            "ram": [{"ipa": hex(ipa), "size": hex(size)} for ipa, size in ram],
        }
        if client_id is not None:
            self.header["client_id"] = client_id
        self.events: list[dict[str, Any]] = []
        self.calls = 0

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"e": kind, **fields}
        self.events.append(event)
        return event

    def call(self, *regs: int, memory: Memory | None = None, vcpu: int = 0) -> int:
        self.calls += 1
        fields = {"memory": memory} if memory else {}
        self.add("call", id=self.calls, vcpu=vcpu, regs=hexes(regs, 8), **fields)
        return self.calls

    def back(self, call: int, *regs: int, memory: Memory | None = None) -> None:
        fields = {"memory": memory} if memory else {}
        self.add("return", id=call, regs=hexes(regs, 4), **fields)

    def forward(self, call: int | None, regs: Sequence[int], **views: bytes) -> None:
        self.add("forward", id=call, regs=hexes(regs, 8), **{name: data.hex() for name, data in views.items()})

    def answer(self, call: int | None, regs: Sequence[int], **views: bytes) -> None:
        self.add("answer", id=call, regs=hexes(regs, 4), **{name: data.hex() for name, data in views.items()})

    def fast(self, function: int, *operands: int, answer: Sequence[int] = (0,), vcpu: int = 0) -> None:
        self.back(self.call(function, *operands, vcpu=vcpu), *answer)

    def lines(self) -> list[str]:
        return [json.dumps(line) for line in (self.header, *self.events)]

    def write(self, path: Path) -> Path:
        data = ("\n".join(self.lines()) + "\n").encode()
        path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
        return path

    def replay(self, directory: Path, policy: str | Policy = "default") -> ReplayReport:
        header, events = read_trace(self.write(directory / "tape.jsonl"))
        return Replay(header, events, load_policy(policy) if isinstance(policy, str) else policy).run()


def message(
    command: int,
    *params: tuple[int, int, int, int],
    func: int = 0,
    session: int = 0,
    cancel_id: int = 0,
    ret: int = 0,
    origin: int = 0,
) -> bytes:
    header = HEADER.pack(command, func, session, cancel_id, 0, ret, origin, len(params))
    return header + b"".join(PARAM.pack(*param) for param in params)


def list_memory(pages: Sequence[int], lists: Sequence[int]) -> Memory:
    """A page list as recordings hold it: the next pointer of a full page is an entry of its own at +4088."""
    found = []
    for number, place in enumerate(lists):
        part = pages[number * ENTRIES_PER_PAGE : (number + 1) * ENTRIES_PER_PAGE]
        found.append(memory(place, "list", b"".join(page.to_bytes(8, "little") for page in part)))
        if number + 1 < len(lists):
            found.append(memory(place + PAGE_SIZE - 8, "list", lists[number + 1].to_bytes(8, "little")))
    return found


# Recording our own stack


@dataclass
class Asked:
    """A yielding call between its SMCs: where its message is, and where its RPC argument may be."""

    at: int
    params: int
    rpc: int = 0
    last: int = 0
    shadow: int = 0
    behind: bool = False


@dataclass
class Recorder:
    """Writes down what passes a conduit, as the real recordings do.

    `pause` is called at every point where another vCPU can come between.
    """

    ram: GuestRam
    tape: Tape
    choose: Random
    made_up: bool = True
    """Invent addresses behind the first 64 of a page list, in the recording only."""
    suspended: dict[int, Asked] = field(default_factory=dict)
    arguments: dict[int, int] = field(default_factory=dict)
    buffers: dict[int, int] = field(default_factory=dict)
    interrupts: Callable[[], None] | None = None

    async def pause(self) -> None:
        for _ in range(self.choose.choice((1, 1, 1, 2, 3))):
            await trio.lowlevel.checkpoint()

    def call(self, vcpu: int, regs: Registers) -> tuple[int, Asked | None]:
        """Note an SMC and the memory it refers to."""
        function = regs[0] & LOW
        asked: Asked | None = None
        entries: Memory = []
        if function in _MESSAGE_CALLS:
            at = from_pair(regs[1], regs[2])
            if function == Function.CALL_WITH_REGD_ARG:
                at = self.buffers[at] + (regs[3] & LOW)
            count = HEADER.unpack(self.ram.read(at, HEADER_SIZE))[7]
            asked = Asked(at, count)
            if function != Function.CALL_WITH_ARG:
                asked.rpc, asked.behind = at + message_size(count), True
            entries = self._views(asked, rpc=bool(asked.rpc))
            data = self.ram.read(at, message_size(count))
            if HEADER.unpack_from(data)[0] == Command.REGISTER_SHM:
                _, pointer, _, cookie = PARAM.unpack_from(data, HEADER_SIZE)
                self.buffers[cookie] = int.from_bytes(self.ram.read(pointer & ~0xFFF, 8), "little") | pointer & 0xFFF
            entries += self._lists(data)
        elif function == Function.RETURN_FROM_RPC and regs[3] & LOW in self.suspended:
            asked = self.suspended.pop(regs[3] & LOW)
            entries = self._views(asked, rpc=asked.last == RpcReturn.CMD)
            if asked.last == RpcReturn.CMD:
                reply = self.ram.read(asked.rpc, RPC_SIZE)
                entries += self._lists(reply)
            elif asked.last == RpcReturn.ALLOC:
                self.arguments[from_pair(regs[4], regs[5])] = from_pair(regs[1], regs[2])
        return self.tape.call(*regs, memory=entries, vcpu=vcpu), asked

    def back(self, identity: int, asked: Asked | None, answer: Registers) -> None:
        """Note the answer that the guest gets."""
        entries: Memory = []
        if asked is not None:
            if asked.last == RpcReturn.CMD and not asked.behind:
                asked.rpc = self.arguments[from_pair(answer[1], answer[2])]
            entries = self._views(asked, rpc=asked.behind or asked.last == RpcReturn.CMD)
        self.tape.back(identity, *answer[:4], memory=entries)

    def note(self, asked: Asked | None, answer: Registers) -> None:
        """The call is suspended, or not, from now on."""
        if asked is not None:
            asked.last = 0
            if is_rpc(answer[0]):
                asked.last = answer[0] & LOW
                self.suspended[answer[3] & LOW] = asked

    def _views(self, asked: Asked, *, rpc: bool) -> Memory:
        entries = [memory(asked.at, "message", self.ram.read(asked.at, message_size(asked.params)))]
        if rpc:
            entries.append(memory(asked.rpc, "rpc", self.ram.read(asked.rpc, RPC_SIZE)))
        return entries

    def _lists(self, data: bytes) -> Memory:
        found: Memory = []
        count = min(HEADER.unpack_from(data)[7], (len(data) - HEADER_SIZE) // PARAM_SIZE)
        for attribute, pointer, size, _ in PARAM.iter_unpack(data[HEADER_SIZE : message_size(count)]):
            if attribute & TYPE_MASK not in _TMEM or not attribute & NONCONTIG or not pointer:
                continue
            pages: list[int] = []
            lists = [pointer & ~0xFFF]
            left = page_count(size, pointer & 0xFFF)
            while True:
                part = min(left, ENTRIES_PER_PAGE)
                words = self.ram.read(lists[-1], part * 8)
                pages += [int.from_bytes(words[at : at + 8], "little") for at in range(0, part * 8, 8)]
                left -= part
                if not left:
                    break
                lists.append(int.from_bytes(self.ram.read(lists[-1] + PAGE_SIZE - 8, 8), "little"))
            if self.made_up and len(pages) > REAL_ADDRESSES:
                first = BASE + 0x10_0000
                invented = range(first, first + (len(pages) - REAL_ADDRESSES) * PAGE_SIZE, PAGE_SIZE)
                pages = [*pages[:REAL_ADDRESSES], *invented]
            found += list_memory(pages, lists)
        return found


class _Conduit:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.pending: list[int] = []
        self.interrupted = trio.lowlevel.ParkingLot()

    def interrupt(self, *_: int) -> None:
        self.pending.append(219)
        self.interrupted.unpark_all()

    async def wait_for_interrupt(self) -> int:
        await trio.lowlevel.checkpoint()
        while not self.pending:
            await self.interrupted.park()
        return self.pending.pop()


class NativeConduit(_Conduit):
    """Nothing stands between guest and OP-TEE: IPA = PA. `hidden` capability bits are masked, as by a build
    without them."""

    def __init__(self, recorder: Recorder, model: SecureWorld, hidden: int) -> None:
        super().__init__(recorder)
        self.model = model
        self.hidden = hidden

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        recorder = self.recorder
        await recorder.pause()
        with trio.CancelScope(shield=True):
            identity, asked = recorder.call(vcpu, regs)
            await recorder.pause()
            answer: Registers = self.model.call(regs)
            if regs[0] & LOW == Function.EXCHANGE_CAPABILITIES and answer[0] == 0:
                answer = (answer[0], answer[1] & ~self.hidden, answer[2], answer[3] if not self.hidden & 0x40 else 0)
            recorder.note(asked, answer)
            await recorder.pause()
            recorder.back(identity, asked, answer)
        return (*answer, *regs[4:])


class MediatedConduit(_Conduit):
    """Our own mediator stands between; what it forwards is recorded as well."""

    def __init__(self, recorder: Recorder, mediator: Mediator, world: LocalSecureWorld, vm: int) -> None:
        super().__init__(recorder)
        self.mediator = mediator
        self.world = world
        self.vm = vm

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        recorder, tape = self.recorder, self.recorder.tape
        await recorder.pause()
        with trio.CancelScope(shield=True):
            identity, asked = recorder.call(vcpu, regs)
            await recorder.pause()
            step = self.mediator.submit(self.vm, vcpu, regs)
            while not isinstance(step, Reply):
                assert isinstance(step, Forward)
                if asked is not None and step.regs[0] in _MESSAGE_CALLS:
                    asked.shadow = from_pair(step.regs[1], step.regs[2])
                tape.forward(identity, step.regs, **self._views(asked))
                answer = self.world.call(step.regs)
                tape.answer(identity, answer, **self._views(asked, answer))
                step = self.mediator.returned(step.ticket, answer)
            recorder.note(asked, step.regs)
            await recorder.pause()
            recorder.back(identity, asked, step.regs[:4])
        return step.regs

    def _views(self, asked: Asked | None, answer: Registers = ()) -> dict[str, bytes]:
        if asked is None:
            return {}
        views = {"message": bytes(self.world.frame(asked.shadow)[: message_size(asked.params)])}
        if answer and answer[0] & LOW == RpcReturn.CMD:
            cookie = from_pair(answer[1], answer[2])
            if cookie:
                views["rpc"] = bytes(self.mediator.guests[self.vm].arguments[cookie].page.view[:RPC_SIZE])
            else:
                behind = message_size(asked.params)
                views["rpc"] = bytes(self.world.frame(asked.shadow)[behind : behind + RPC_SIZE])
        return views


Work = Callable[[guests.Guest, "Stack"], Any]


@dataclass
class Stack:
    """What a workload of a recording may also do."""

    model: SecureWorld
    vm: int


def record_native(
    work: Work,
    *,
    seed: int = 0,
    threads: int = 2,
    hidden: int = 0,
    pages: int = 8192,
    vcpus: int = 2,
    boots: int = 1,
    images: dict[UUID, bytes] | None = None,
    made_up: bool = True,
) -> Tape:
    """Record a guest whose OP-TEE is its own: `work` runs `boots` times, in a driver loaded anew each time."""
    physical = PhysicalMemory()
    store = PageStore("guest", pages)
    physical.add(Bank("guest", store, Frames(BASE, pages)))
    ram = GuestRam(store, BASE)
    early = None if images is None else frozenset[UUID]()
    config = Config(threads=threads, virtualization=False, early_tas=early, seed=seed, reserved_shm=(1 << 40, 1 << 21))
    model = SecureWorld(physical, config)
    tape = Tape([(BASE, pages * PAGE_SIZE)])
    recorder = Recorder(ram, tape, Random(seed), made_up)

    async def run() -> None:
        for _ in range(boots):
            conduit = NativeConduit(recorder, model, hidden)
            model.on_notification = conduit.interrupt
            recorder.arguments.clear()
            await _guest(ram, conduit, work, Stack(model, 0), vcpus, images, model, 0, recorder)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    store.close()
    return tape


def record_mediated(
    work: Work,
    policy: Policy,
    *,
    seed: int = 0,
    threads: int = 2,
    pages: int = 8192,
    vcpus: int = 2,
    boots: int = 1,
    images: dict[UUID, bytes] | None = None,
    made_up: bool = True,
) -> Tape:
    """Record a guest with our mediator between: it is domain 0, client 1."""
    machine = Machine()
    vm = machine.create_xen("recorded", [RamBlock(BASE, pages * PAGE_SIZE)], vcpus, domain=0)
    early = None if images is None else frozenset[UUID]()
    model = SecureWorld(machine.memory, Config(threads=threads, early_tas=early, seed=seed))
    world = LocalSecureWorld(machine, model)
    mediator = Mediator(policy, world)
    tape = Tape([(BASE, pages * PAGE_SIZE)], client_id=1)
    recorder = Recorder(vm.ram[0], tape, Random(seed), made_up)
    for request in (mediator.probe, lambda: mediator.create(vm.client_id, vm)):
        step = request()
        while not isinstance(step, Reply):
            assert isinstance(step, Forward)
            tape.forward(None, step.regs)
            answer = world.call(step.regs)
            tape.answer(None, answer)
            step = mediator.returned(step.ticket, answer)
        assert step.regs[0] == 0

    async def run() -> None:
        for _ in range(boots):
            conduit = MediatedConduit(recorder, mediator, world, vm.client_id)
            model.on_notification = conduit.interrupt
            await _guest(vm.ram[0], conduit, work, Stack(model, 1), vcpus, images, model, vm.client_id, recorder)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    machine.close()
    return tape


async def _guest(
    ram: GuestRam,
    conduit: _Conduit,
    work: Work,
    stack: Stack,
    vcpus: int,
    images: dict[UUID, bytes] | None,
    model: SecureWorld,
    vm: int,
    recorder: Recorder,
) -> None:
    supplicant = guests.Supplicant(images or {})
    choose = recorder.choose
    model.interrupt_pending = lambda _: choose.random() < 0.05
    recorder.tape.add("mark", name="boot")
    async with guests.open(ram, conduit, vcpus=vcpus, supplicant=supplicant) as guest:
        recorder.tape.add("mark", name="work")
        await work(guest, stack)


__all__ = [name for name in dir() if not name.startswith("_")] + ["to_pair"]
