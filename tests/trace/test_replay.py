"""Replaying: the real recordings, tampered ones, ones written by hand, and ones of our own stack."""

import gzip
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pytest
import trio

import guests
from guests.parameters import Direction, MemoryResult, Null, Partial, Temporary, Value, Values
from guests.workloads.applications import AES, EXERCISE, HELLO_WORLD, RANDOM, Exercise, HelloWorld
from guests.workloads.applications import Random as RandomCommand
from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.core import fast, yielding
from mediator.core.mediator import Mediator
from mediator.core.records import Call
from mediator.core.steps import Forward, Regs
from mediator.policies import load_policy
from mediator.trace.format import read_trace
from mediator.trace.replay import Replay, ReplayReport, replay
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, HEADER_SIZE, PARAM_SIZE, Command, message_size
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import API_UID, OS_UUID, Function, RpcReturn
from optee.ta_image import build_image
from optee.tas.catalogue import BUILT_IN
from tests.shared import SHARED, needs_shared
from tests.trace.tapes import (
    BASE,
    RPC_SIZE,
    Stack,
    Tape,
    list_memory,
    memory,
    message,
    record_mediated,
    record_native,
    to_pair,
)

TRACES = SHARED / "traces"
RECORDED = [("native", "default"), ("xen", "xen")]
NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
GENERIC, BAD_PARAMETERS, OUT_OF_MEMORY = int(Result.GENERIC), int(Result.BAD_PARAMETERS), int(Result.OUT_OF_MEMORY)
RPC_ARG, ARG = int(Function.CALL_WITH_RPC_ARG), int(Function.CALL_WITH_ARG)
REGD_ARG, RESUME = int(Function.CALL_WITH_REGD_ARG), int(Function.RETURN_FROM_RPC)
ALLOC, FREE, INTERRUPT, CMD = (
    int(code) for code in (RpcReturn.ALLOC, RpcReturn.FREE, RpcReturn.FOREIGN_INTR, RpcReturn.CMD)
)
TMEM_OUT, TMEM_INOUT = 0x20A, 0x20B
KERNEL_POINTER = 0xFFFF_0000_0040_6C00
MESSAGE, LISTS, DATA = BASE + 0x1000, BASE + 0x10_0000, BASE + 0x20_0000


def good(report: ReplayReport) -> ReplayReport:
    assert (report.unexpected, report.first_unexpected) == (0, None)
    assert report.violations == []
    assert report.good
    return report


def bad(report: ReplayReport, what: str, line: int | None = None) -> None:
    assert report.unexpected > 0 and not report.good
    first = report.first_unexpected
    assert first is not None
    assert first["what"] == what, first
    if line is not None:
        assert first["line"] == line, first


# The real recordings


@cache
def lines(name: str) -> tuple[str, ...]:
    return tuple(gzip.decompress((TRACES / f"{name}.jsonl.gz").read_bytes()).decode().splitlines())


@needs_shared
@pytest.mark.parametrize(("name", "policy"), RECORDED)
def test_a_real_recording_goes_through_unnoticed(name: str, policy: str) -> None:
    header, events = read_trace(TRACES / f"{name}.jsonl.gz")
    run = Replay(header, events, load_policy(policy))
    seen: list[tuple[int, int]] = []
    report = good(run.run(lambda done, total: seen.append((done, total))))
    assert seen[-1] == (len(events), len(events))
    assert report.events == len(events) == len(lines(name)) - 1
    kinds = [json.loads(line)["e"] for line in lines(name)[1:]]
    assert report.calls == kinds.count("call") and report.returned == kinds.count("return")
    assert report.peak_pages_pinned > 0
    assert dict(run.mediator.guests) == {}
    assert run.machine.pages.allocated == 0


@needs_shared
def test_what_the_recordings_leave_and_what_their_policies_intend() -> None:
    """The native one ends with its argument page registered, Xen's with OP-TEE's cache of one RPC argument."""
    native = replay(TRACES / "native.jsonl.gz", load_policy("default"))
    assert native.left == {**NOTHING_LEFT, "pages": 1, "buffers": 1}
    assert set(native.expected) == {"capabilities_masked", "regd_arg_as_rpc_arg"}
    xen = replay(TRACES / "xen.jsonl.gz", load_policy("xen"))
    assert xen.left == {**NOTHING_LEFT, "rpc_arguments": 1}
    assert xen.expected == {}
    data = xen.as_data()
    assert data["format"] == "mediator-replay/1"
    assert {"events", "calls", "forwarded", "returned", "expected", "unexpected", "first_unexpected"} <= data.keys()
    assert {"peak_pages_pinned", "left"} <= data.keys()
    json.dumps(data)


@needs_shared
@pytest.mark.parametrize(("name", "policy"), [("native", "xen"), ("native", "minimal")])
def test_a_policy_that_the_driver_was_not_recorded_under_is_told(name: str, policy: str) -> None:
    """A function that is denied: the guest sees that. The replay ends all the same."""
    report = replay(TRACES / f"{name}.jsonl.gz", load_policy(policy))
    bad(report, "guest's registers")
    assert report.violations == []


@needs_shared
@pytest.mark.parametrize("size", [*range(12, 60, 7), 300, 555])
@pytest.mark.parametrize(("name", "policy"), RECORDED)
def test_a_recording_may_end_anywhere(name: str, policy: str, size: int, tmp_path: Path) -> None:
    """In the middle of a call too; `left` says so, and afterwards every sum is zero."""
    path = tmp_path / "cut.jsonl"
    path.write_text("\n".join(lines(name)[:size]) + "\n")
    report = good(replay(path, load_policy(policy)))
    opened, suspended = set(), set()
    for line in lines(name)[1:size]:
        event = json.loads(line)
        if event["e"] == "call" and int(event["regs"][0], 16) in (ARG, RPC_ARG, REGD_ARG, RESUME):
            opened.add(event["id"])
        elif event["e"] == "return" and event["id"] in opened:
            opened.remove(event["id"])
            thread = int(event["regs"][3], 16)
            if int(event["regs"][0], 16) >> 16 == 0xFFFF:
                suspended.add(thread)
            else:
                suspended.discard(thread)
    assert bool(report.left["calls"]) <= bool(opened or suspended)
    if name == "native":
        assert bool(report.left["calls"]) == bool(opened or suspended)


# Tampered recordings


def xen_events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines("xen")]


def tampered(events: list[dict[str, Any]], index: int, directory: Path, policy: str = "xen") -> ReplayReport:
    """Replay with what stands behind the tampered event's call cut off."""
    path = directory / "tampered.jsonl"
    path.write_text("\n".join(map(json.dumps, events[: index + 8])) + "\n")
    return replay(path, load_policy(policy))


def flip(data: str, at: int) -> str:
    octets = bytearray.fromhex(data)
    octets[at] ^= 0x40
    return octets.hex()


def sample(found: Sequence[int], count: int = 4) -> list[int]:
    return sorted(Random(len(found)).sample(list(found), min(count, len(found))))


@needs_shared
@pytest.mark.parametrize("word", range(4))
def test_a_register_that_the_guest_saw_otherwise(word: int, tmp_path: Path) -> None:
    events = xen_events()
    found = [
        index
        for index, event in enumerate(events)
        if event.get("e") == "return" and (word == 0 or int(event["regs"][0], 16) not in (2, 4, 7))
    ]
    for index in sample(found):
        events = xen_events()
        events[index]["regs"][word] = hex(int(events[index]["regs"][word], 16) ^ 0x100)
        bad(tampered(events, index, tmp_path), "guest's registers", index + 1)


@needs_shared
@pytest.mark.parametrize("at", [0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 56])
def test_a_byte_of_a_completed_message_that_the_guest_saw_otherwise(at: int, tmp_path: Path) -> None:
    events = xen_events()
    found = [
        index
        for index, event in enumerate(events)
        if event.get("e") == "return" and event["regs"][0] == "0x0"
        for entry in event.get("memory", ())
        if entry["is"] == "message" and len(entry["hex"]) > 2 * at
    ]
    for index in sample(found, 2):
        events = xen_events()
        entry = next(entry for entry in events[index]["memory"] if entry["is"] == "message")
        entry["hex"] = flip(entry["hex"], at)
        bad(tampered(events, index, tmp_path), "guest's message", index + 1)


@needs_shared
@pytest.mark.parametrize("at", [0, 20, 24, 28, 32, 40, 48, 56])
def test_a_byte_of_an_rpc_request_that_the_guest_saw_otherwise(at: int, tmp_path: Path) -> None:
    events = xen_events()
    found = [
        index for index, event in enumerate(events) if event.get("e") == "return" and int(event["regs"][0], 16) == CMD
    ]
    for index in sample(found, 2):
        events = xen_events()
        entry = next(entry for entry in events[index]["memory"] if entry["is"] == "rpc")
        entry["hex"] = flip(entry["hex"], at)
        bad(tampered(events, index, tmp_path), "guest's rpc", index + 1)


@needs_shared
def test_what_stands_behind_the_parameters_of_an_rpc_request_is_not_compared(tmp_path: Path) -> None:
    events = xen_events()
    for index, event in enumerate(events):
        if event.get("e") == "return" and int(event["regs"][0], 16) == CMD:
            entry = next(entry for entry in event["memory"] if entry["is"] == "rpc")
            size = message_size(HEADER.unpack_from(bytes.fromhex(entry["hex"]))[7])
            if size < len(entry["hex"]) // 2:
                entry["hex"] = flip(entry["hex"], size)
                good(tampered(events, index, tmp_path))
                return
    pytest.fail("no such request")


@needs_shared
@pytest.mark.parametrize("word", range(8))
def test_a_register_that_xen_forwarded_otherwise(word: int, tmp_path: Path) -> None:
    events = xen_events()
    own = (ARG, *([ALLOC] if word in (1, 2) else []))
    found = []
    for index, event in enumerate(events):
        if event.get("e") != "forward" or event["id"] is None:
            continue
        if word in (1, 2) and (int(event["regs"][0], 16) in own or int(event["regs"][4], 16)):
            continue  # addresses of Xen's own pages
        found.append(index)
    for index in sample(found):
        events = xen_events()
        events[index]["regs"][word] = hex(int(events[index]["regs"][word], 16) ^ 0x100)
        bad(tampered(events, index, tmp_path), "forward.regs", index + 1)


@needs_shared
@pytest.mark.parametrize(
    "function", [int(Function.VM_CREATED), int(Function.CALLS_UID), int(Function.GET_THREAD_COUNT)]
)
@pytest.mark.parametrize("word", [1, 3, 7])
def test_a_call_of_xens_own_that_was_otherwise(function: int, word: int, tmp_path: Path) -> None:
    events = xen_events()
    index = next(
        at for at, event in enumerate(events) if event.get("e") == "forward" and event["regs"][0] == hex(function)
    )
    events[index]["regs"][word] = "0x55"
    bad(tampered(events, index, tmp_path), "forward.regs")


@needs_shared
@pytest.mark.parametrize("view", ["message", "rpc"])
def test_a_byte_that_xen_forwarded_otherwise(view: str, tmp_path: Path) -> None:
    events = xen_events()
    found = [
        index
        for index, event in enumerate(events)
        if event.get("e") == "forward"
        and view in event
        and (int(event["regs"][0], 16) == ARG if view == "message" else int(event["regs"][1], 16) == 0)
    ]
    assert found
    for index in sample(found):
        size = message_size(HEADER.unpack_from(bytes.fromhex(events[index][view]))[7])
        for at in (0, 4, 28 if view == "message" else 24, size - 1):
            events = xen_events()
            events[index][view] = flip(events[index][view], at)
            if view == "rpc" and HEADER.unpack_from(bytes.fromhex(events[index][view]))[7] > 4:
                continue
            bad(tampered(events, index, tmp_path), f"forward.{view}", index + 1)


@needs_shared
@pytest.mark.parametrize(("name", "policy"), RECORDED)
def test_a_page_list_that_points_outside_ram(name: str, policy: str, tmp_path: Path) -> None:
    """The mediator refuses what the recorded OP-TEE took: the guest sees another message."""
    events = [json.loads(line) for line in lines(name)]
    calls = [
        index
        for index, event in enumerate(events)
        if event.get("e") == "call" and int(event["regs"][0], 16) != RESUME
        and any(entry["is"] == "list" for entry in event.get("memory", ()))
    ]  # fmt: skip
    for index in sample(calls, 3):
        changed = json.loads(json.dumps(events))
        entry = next(entry for entry in changed[index]["memory"] if entry["is"] == "list")
        entry["hex"] = (0x9_0000_0000).to_bytes(8, "little").hex() + entry["hex"][16:]
        report = tampered(changed, index, tmp_path, policy)
        assert report.unexpected and report.first_unexpected is not None
        if name == "native":
            assert report.first_unexpected["what"] in ("guest's registers", "guest's message")
            assert report.first_unexpected["line"] == index + 2
        else:
            assert report.first_unexpected["what"] == "forward" and report.first_unexpected["line"] == index + 2


@needs_shared
def test_recorded_memory_outside_ram_is_told(tmp_path: Path) -> None:
    events = [json.loads(line) for line in lines("native")]
    index = next(at for at, event in enumerate(events) if event.get("memory"))
    events[index]["memory"][0]["at"] = "0x1000"
    bad(tampered(events, index, tmp_path, "default"), "recorded memory", index + 1)


@needs_shared
@pytest.mark.parametrize("at", [0, 32, 40])
def test_a_reply_that_changes_what_it_must_not_is_told(at: int, tmp_path: Path) -> None:
    """Command, attribute and input of a reply are the request's own (R16): OP-TEE sees those."""
    events = [json.loads(line) for line in lines("native")]
    for index, event in enumerate(events):
        reply = next((entry for entry in event.get("memory", ()) if entry["is"] == "rpc"), None)
        if event.get("e") == "call" and reply and HEADER.unpack_from(bytes.fromhex(reply["hex"]))[0] == RpcCommand.FS:
            reply["hex"] = flip(reply["hex"], at)
            report = tampered(events, index, tmp_path, "default")
            if at == 32:
                # The attribute is OP-TEE's own whatever the guest writes there: Linux writes its own idea of it.
                return
            bad(report, "forwarded rpc", index + 1)
            return
    pytest.fail("no such reply")


# A mediator that is wrong


def _pin_forwards_ipas(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = VirtualMachine.pin

    def pinned(self: VirtualMachine, ipas: npt.NDArray[np.uint64]) -> Pinned:
        found = pin(self, ipas)
        found.pas[:] = ipas
        return found

    monkeypatch.setattr(VirtualMachine, "pin", pinned)


def _message_forwards_ipa(monkeypatch: pytest.MonkeyPatch) -> None:
    send = yielding._send

    def sent(core: Mediator, call: Call) -> Any:
        step = send(core, call)
        return Forward((step.regs[0], call.regs[1], call.regs[2], *step.regs[3:]), step.ticket)

    monkeypatch.setattr(yielding, "_send", sent)


def _forward_changes(word: int, value: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Mediator.forward

        def forwarded(self: Mediator, call: Call, regs: Regs) -> Forward:
            return forward(self, call, (*regs[:word], value, *regs[word + 1 :]))

        monkeypatch.setattr(Mediator, "forward", forwarded)

    return patch


def _capability_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaked(core: Mediator, regs: Regs, answer: Regs) -> Any:
        return core.answer(Function.EXCHANGE_CAPABILITIES, regs, answer)

    monkeypatch.setattr(fast, "_capabilities", leaked)


def _outputs_forgotten(size: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        look_at = yielding._look_at

        def looked_at(call: Call, *rest: Any) -> None:
            look_at(call, *rest)
            call.outputs = [(start, stop) for start, stop in call.outputs if stop - start != size]

        monkeypatch.setattr(yielding, "_look_at", looked_at)

    return patch


def _pins_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualMachine, "unpin", lambda self, pinned: None)


def test_the_long_story_is_good_with_the_right_mediator(tmp_path: Path) -> None:
    good(story().replay(tmp_path))


@pytest.mark.parametrize(
    ("patch", "what"),
    [
        (_pin_forwards_ipas, "translated page"),
        (_message_forwards_ipa, "forwarded message"),
        (_forward_changes(7, 2), "forwarded a7"),
        (_forward_changes(0, ARG), "forwarded function"),
        (_forward_changes(3, 63), "resumed thread"),
        (_capability_leaks, "guest's registers"),
        (_outputs_forgotten(8), "guest's message"),
        (_outputs_forgotten(24), "guest's message"),
        (_pins_kept, "left after the end"),
    ],
    ids=lambda value: getattr(value, "__qualname__", value).replace("<locals>.", ""),
)
def test_a_mediator_that_is_wrong_is_found(
    patch: Callable[[pytest.MonkeyPatch], None], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = story()
    patch(monkeypatch)
    report = tape.replay(tmp_path)
    assert report.unexpected
    # By whatever event it is noticed first, what is wrong is said in the right word.
    assert report.first_unexpected is not None and report.first_unexpected["what"] == what, report.first_unexpected


# Traces written by hand


def probe(tape: Tape, capabilities: int = 0xF5) -> None:
    """What Linux does first."""
    tape.add("mark", name="probe")
    tape.fast(Function.CALLS_UID, answer=API_UID)
    tape.fast(Function.GET_OS_REVISION, answer=(4, 10, 0xABCD1234, 0))
    tape.fast(Function.CALLS_REVISION, answer=(2, 0, 0, 0))
    rpc_arg = bool(capabilities & 0x40)
    tape.fast(Function.EXCHANGE_CAPABILITIES, answer=(0, capabilities, 0x42, 4 if rpc_arg else 0))
    if capabilities & 0x20:
        tape.fast(Function.ENABLE_ASYNC_NOTIF)
    tape.fast(Function.DISABLE_SHM_CACHE, answer=(7,))
    if not rpc_arg:
        tape.fast(Function.ENABLE_SHM_CACHE)


def done(data: bytes, *, session: int | None = None, ret: int = 0, origin: int = 4, **changes: bytes) -> bytes:
    """A message as OP-TEE completes it; `at40=b'..'` writes bytes at 40."""
    octets = bytearray(data)
    if session is not None:
        octets[8:12] = session.to_bytes(4, "little")
    octets[20:24], octets[24:28] = ret.to_bytes(4, "little"), origin.to_bytes(4, "little")
    for name, value in changes.items():
        at = int(name[2:])
        octets[at : at + len(value)] = value
    return bytes(octets)


def views(at: int, data: bytes, rpc: bytes = b"") -> list[dict[str, str]]:
    """Message and the RPC argument behind it."""
    behind = rpc + bytes(RPC_SIZE - len(rpc))
    return [memory(at, "message", data), memory(at + len(data), "rpc", behind)]


def simple(tape: Tape, function: int, at: int, data: bytes, after: bytes, *more: dict[str, str], vcpu: int = 0) -> None:
    """A call that is answered without RPC."""
    here = views if function == RPC_ARG else lambda at, data: [memory(at, "message", data)]
    call = tape.call(function, *to_pair(at), vcpu=vcpu, memory=[*here(at, data), *more])
    tape.back(call, 0, memory=here(at, after))


def register(
    tape: Tape, cookie: int, pages: Sequence[int], *, function: int = RPC_ARG, at: int = MESSAGE, offset: int = 0
) -> None:
    """REGISTER_SHM of these pages, listed from LISTS on."""
    count = max(1, -(-len(pages) // ENTRIES_PER_PAGE))
    lists = [LISTS + number * 4096 for number in range(count)]
    data = message(Command.REGISTER_SHM, (TMEM_OUT, lists[0] | offset, len(pages) * 4096 - offset, cookie))
    simple(tape, function, at, data, done(data), *list_memory(pages, lists))


def unregister(tape: Tape, cookie: int, *, function: int = RPC_ARG, at: int = MESSAGE) -> None:
    data = message(Command.UNREGISTER_SHM, (5, 0, 0, cookie))
    simple(tape, function, at, data, done(data))


def start(capabilities: int = 0xF5, ram: Sequence[tuple[int, int]] = ((BASE, 128 << 20),)) -> Tape:
    tape = Tape(ram)
    probe(tape, capabilities)
    return tape


def pages(count: int, first: int = DATA) -> list[int]:
    return [first + number * 4096 for number in range(count)]


def invoke(*params: tuple[int, int, int, int], session: int = 1) -> bytes:
    return message(Command.INVOKE_COMMAND, *params, func=3, session=session)


def story() -> Tape:
    """Something of everything: a registered page, messages in it, values, sizes, temporary memory, RPCs."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = message(Command.OPEN_SESSION, (0x101, 1, 2, 0), (0x101, 3, 4, 0))
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x180, memory=views(DATA + 0x180, data))
    tape.back(call, 0, memory=views(DATA + 0x180, done(data, session=9)))
    lists = [LISTS, LISTS + 4096]
    listed = pages(600, DATA + 0x10000)
    data = invoke(
        (3, 1, 2, 3), (TMEM_INOUT, LISTS | 0x10, 600 * 4096 - 0x10, 0x55), (6, 0, 64, KERNEL_POINTER), session=9
    )
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=[*views(MESSAGE, data), *list_memory(listed, lists)])
    tape.back(call, INTERRUPT, 0, 0, 1, memory=views(MESSAGE, data))
    call = tape.call(RESUME, 0, 0, 1, memory=[memory(MESSAGE, "message", data)])
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(call, CMD, 0, 0, 1, memory=views(MESSAGE, data, request))
    reply = message(RpcCommand.GET_TIME, (2, 77, 88, 0))
    call = tape.call(RESUME, 0, 0, 1, memory=views(MESSAGE, data, reply))
    after = done(data, at40=bytes(range(24)), at80=(1000).to_bytes(8, "little"), at112=(32).to_bytes(8, "little"))
    tape.back(call, 0, memory=views(MESSAGE, after, reply))
    unregister(tape, KERNEL_POINTER)
    return tape


@pytest.mark.parametrize("count", [1, 63, 64, 65, 510, 511, 512, 1021, 1022, 1023, 1533, 1534, 16383, 16384])
def test_page_lists_of_any_length_are_registered(count: int, tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(count))
    unregister(tape, KERNEL_POINTER)
    register(tape, KERNEL_POINTER, pages(count))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count
    assert report.left == {**NOTHING_LEFT, "pages": count, "buffers": 1}


@pytest.mark.parametrize("count", [511, 512, 1022, 1023, 16384])
@pytest.mark.parametrize("offset", [0, 0xF00])
def test_page_lists_of_any_length_are_temporary(count: int, offset: int, tmp_path: Path) -> None:
    tape = start()
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    data = invoke((TMEM_INOUT, lists[0] | offset, count * 4096 - offset, 0x1234), (1, 1, 2, 3))
    after = done(data, at48=(7).to_bytes(8, "little"))
    simple(tape, RPC_ARG, MESSAGE, data, after, *list_memory(pages(count), lists))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count and report.left == NOTHING_LEFT


@pytest.mark.parametrize("count", [512, 1022, 1023, 16384])
def test_a_wrong_entry_far_behind_in_a_page_list_is_found(count: int, tmp_path: Path) -> None:
    for at in (count - 1, 511, 510):
        tape = start()
        listed = pages(count)
        listed[at] = 0x7000_0000
        register(tape, KERNEL_POINTER, listed)
        report = tape.replay(tmp_path)
        bad(report, "guest's message")
        assert report.left == NOTHING_LEFT and report.violations == []


@pytest.mark.parametrize("count", [512, 1023, 16384])
def test_a_mediator_that_is_wrong_behind_the_first_list_page_is_found(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(count))
    pin = VirtualMachine.pin

    def swapped(self: VirtualMachine, ipas: npt.NDArray[np.uint64]) -> Pinned:
        found = pin(self, ipas)
        if len(found.pas) == count:
            found.pas[[0, -1]] = found.pas[[-1, 0]]
        return found

    monkeypatch.setattr(VirtualMachine, "pin", swapped)
    bad(tape.replay(tmp_path), "translated page")


@pytest.mark.parametrize("count", [1, 511, 512, 700, 1023])
def test_a_buffer_for_optee_of_any_length(count: int, tmp_path: Path) -> None:
    """SHM_ALLOC's reply, and the kernel's pointer used again as soon as it is free."""
    tape = start()
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    data = invoke((3, 1, 2, 3))
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    for _ in range(3):
        request = message(RpcCommand.SHM_ALLOC, (1, 0, count * 4096, 8), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        reply = message(RpcCommand.SHM_ALLOC, (TMEM_OUT, lists[0], count * 4096, KERNEL_POINTER), origin=2)
        call = tape.call(RESUME, memory=[*views(MESSAGE, data, reply), *list_memory(pages(count), lists)])
        request = message(RpcCommand.FS, (1, 2, 0, 0), (5, 0, 100, KERNEL_POINTER), (2, 0, 0, 0), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        reply = message(RpcCommand.FS, (1, 2, 0, 0), (5, 0, 100, KERNEL_POINTER), (2, 5, 0, 0), origin=2)
        call = tape.call(RESUME, memory=views(MESSAGE, data, reply))
        request = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, 0), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        call = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, 0))))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count and report.left == NOTHING_LEFT


@pytest.mark.parametrize("reply_attribute", [6, 10])
def test_a_null_reference_that_changes_its_type_in_a_reply(reply_attribute: int, tmp_path: Path) -> None:
    """Linux writes back its own idea of a NULL reference: TMEM where OP-TEE asked with RMEM."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    request = message(RpcCommand.LOAD_TA, (1, 1, 2, 0), (6, 0, 0, 0), ret=GENERIC)
    tape.back(call, CMD, memory=views(MESSAGE, data, request))
    reply = message(RpcCommand.LOAD_TA, (1, 1, 2, 0), (reply_attribute, 0, 0x5000, 0), origin=2)
    call = tape.call(RESUME, memory=views(MESSAGE, data, reply))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_an_rpc_argument_that_optee_prepares_while_it_is_interrupted(tmp_path: Path) -> None:
    """Without a mediator the guest can see a request that is not made yet: a resume of FOREIGN_INTR compares none."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    early = message(RpcCommand.FS, (1, 2, 0, 0), ret=GENERIC)
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    tape.back(call, INTERRUPT, memory=views(MESSAGE, data, early))
    call = tape.call(RESUME, memory=views(MESSAGE, data, early))
    tape.back(call, CMD, memory=views(MESSAGE, data, early))
    call = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.FS, (1, 2, 0, 0))))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_a_message_that_optee_writes_early(tmp_path: Path) -> None:
    tape = start()
    data = invoke((3, 1, 2, 3), (6, 0, 100, KERNEL_POINTER))
    early = done(data, ret=GENERIC, at40=b"\x09", at80=b"\x20")
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    tape.back(call, INTERRUPT, memory=views(MESSAGE, early))
    call = tape.call(RESUME, memory=[memory(MESSAGE, "message", early)])
    tape.back(call, 0, memory=views(MESSAGE, done(early)))
    good(tape.replay(tmp_path))


def test_calls_of_two_vcpus_overlap(tmp_path: Path) -> None:
    tape = start()
    first, second = invoke((3, 1, 2, 3)), invoke((3, 4, 5, 6))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, first), vcpu=0)
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, second), vcpu=1)
    tape.back(b, INTERRUPT, 0, 0, 1, memory=views(MESSAGE + 4096, second))
    b = tape.call(RESUME, 0, 0, 1, memory=[memory(MESSAGE + 4096, "message", second)], vcpu=1)
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(a, CMD, 0, 0, 0, memory=views(MESSAGE, first, request))
    a = tape.call(RESUME, memory=views(MESSAGE, first, message(RpcCommand.GET_TIME, (2, 8, 9, 0))), vcpu=0)
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(second, at40=b"\x05")))
    tape.back(a, 0, memory=views(MESSAGE, done(first, at40=b"\x02")))
    good(tape.replay(tmp_path))


def test_a_thread_is_used_again_before_its_last_call_has_returned(tmp_path: Path) -> None:
    tape = start()
    first, second = invoke((3, 1, 2, 3)), invoke((3, 4, 5, 6))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, first), vcpu=0)
    tape.back(a, INTERRUPT, 0, 0, 0, memory=views(MESSAGE, first))
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", first)], vcpu=0)  # ends in OP-TEE at once
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, second), vcpu=1)
    tape.back(b, INTERRUPT, 0, 0, 0, memory=views(MESSAGE + 4096, second))
    b = tape.call(RESUME, memory=[memory(MESSAGE + 4096, "message", second)], vcpu=1)
    tape.back(a, 0, memory=views(MESSAGE, done(first)))
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(second)))
    good(tape.replay(tmp_path))


@pytest.mark.parametrize("leftovers", [(0, 0, 0), (0x55, 0xDEAD, 3)])
@pytest.mark.parametrize("code", [1, 2, 4, 5, 6, 7, 0xFFFFFFFF])
def test_an_error_of_optee_in_a0_whatever_stands_beside_it(
    code: int, leftovers: tuple[int, ...], tmp_path: Path
) -> None:
    """ETHREAD_LIMIT first of all; x1..x3 are leftovers, the message is as it was."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    for _ in range(2):
        call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
        tape.back(call, code, *leftovers, memory=views(MESSAGE, data))
    simple(tape, RPC_ARG, MESSAGE, data, done(data))
    good(tape.replay(tmp_path))


def test_the_mediators_own_thread_limit_is_the_recorded_one(tmp_path: Path) -> None:
    """Three calls on two threads: the third never reached OP-TEE, in the recording and in the replay."""
    tape = mediated(threads=2)
    data = invoke((3, 1, 2, 3))
    for thread in (0, 1):
        at = MESSAGE + thread * 4096
        call = tape.call(ARG, *to_pair(at), memory=[memory(at, "message", data)])
        tape.forward(call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), message=done(data, ret=GENERIC, origin=0))
        tape.answer(call, (INTERRUPT, 0, 0, thread), message=data)
        tape.back(call, INTERRUPT, 0, 0, thread, memory=[memory(at, "message", data)])
    at = MESSAGE + 2 * 4096
    call = tape.call(ARG, *to_pair(at), memory=[memory(at, "message", data)])
    tape.back(call, 1, *to_pair(at), 0, memory=[memory(at, "message", data)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left["calls"] == 2 and report.forwarded == 2


def mediated(threads: int = 2, client: int = 5) -> Tape:
    """A recording with a mediator between, as far as the guest's creation."""
    tape = Tape([(BASE, 128 << 20)], client_id=client)
    own = [
        ((Function.CALLS_UID,), API_UID),
        ((Function.GET_THREAD_COUNT,), (0, threads)),
        ((Function.VM_DESTROYED,), (7,)),
        ((Function.VM_CREATED, client), (0, client)),
    ]
    for regs, answer in own:
        tape.forward(None, regs)
        tape.answer(None, answer)
    return tape


def forwarded(tape: Tape, call: int, regs: Sequence[int], answer: Sequence[int], before: bytes, after: bytes) -> None:
    tape.forward(call, regs, message=before)
    tape.answer(call, answer, message=after)


def test_a_slot_that_becomes_free_between_call_and_forward(tmp_path: Path) -> None:
    """The other mediator decided when it forwarded; by then the first call's slot was free."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    regs = (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5)
    second = MESSAGE + 4096
    a = tape.call(ARG, *to_pair(MESSAGE), vcpu=0, memory=[memory(MESSAGE, "message", data)])
    tape.forward(a, regs, message=data)
    b = tape.call(ARG, *to_pair(second), vcpu=1, memory=[memory(second, "message", data)])
    tape.answer(a, (0,), message=after)
    forwarded(tape, b, regs, (0,), data, after)
    tape.back(a, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    tape.back(b, 0, *to_pair(second), memory=[memory(second, "message", after)])
    good(tape.replay(tmp_path, "xen"))


def test_a_refused_call_does_not_take_the_slot_of_a_forwarded_one(tmp_path: Path) -> None:
    """b comes before c, but c is decided first: b finds the slot taken."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    regs = (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5)
    at = [MESSAGE, MESSAGE + 4096]
    b = tape.call(ARG, *to_pair(at[0]), vcpu=0, memory=[memory(at[0], "message", data)])
    c = tape.call(ARG, *to_pair(at[1]), vcpu=1, memory=[memory(at[1], "message", data)])
    tape.forward(c, regs, message=data)
    tape.back(b, 1, *to_pair(at[0]), memory=[memory(at[0], "message", data)])
    tape.answer(c, (0,), message=after)
    tape.back(c, 0, *to_pair(at[1]), memory=[memory(at[1], "message", after)])
    good(tape.replay(tmp_path, "xen"))


def test_a_slot_that_is_free_for_us_a_little_earlier_than_it_was(tmp_path: Path) -> None:
    """The other mediator refused a call while it copied another's outputs; that one's answer is recorded before."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    second = MESSAGE + 4096
    a = tape.call(ARG, *to_pair(MESSAGE), vcpu=0, memory=[memory(MESSAGE, "message", data)])
    forwarded(tape, a, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (0,), data, after)
    b = tape.call(ARG, *to_pair(second), vcpu=1, memory=[memory(second, "message", data)])
    tape.back(b, 1, *to_pair(second), memory=[memory(second, "message", data)])
    tape.back(a, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == NOTHING_LEFT


@pytest.mark.parametrize("what", ["pages", "buffers"])
def test_a_quota_that_the_other_mediator_has_as_well(what: str, tmp_path: Path) -> None:
    """130 pages, or a 17th buffer: a0 = 0, OUT_OF_MEMORY from COMMS, nothing forwarded."""
    tape = mediated()
    registers = 17 if what == "buffers" else 1
    for number in range(registers):
        count = 130 if what == "pages" else 1
        data = message(Command.REGISTER_SHM, (TMEM_OUT, LISTS, count * 4096, KERNEL_POINTER + number))
        entries = [memory(MESSAGE, "message", data), *list_memory(pages(count), [LISTS])]
        call = tape.call(ARG, *to_pair(MESSAGE), memory=entries)
        if number + 1 < registers:
            after = done(data)
            forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (0,), data, after)
        else:
            after = done(data, ret=OUT_OF_MEMORY, origin=Origin.COMMS)
        tape.back(call, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    good(tape.replay(tmp_path, "xen"))


def argument_cycle(tape: Tape, cookie: int, at: int, message_at: int = MESSAGE) -> tuple[int, bytes]:
    """Under Xen: a call and the RPC ALLOC of its first RPC; returns the open resume and the message."""
    data = invoke((3, 1, 2, 3))
    call = tape.call(ARG, *to_pair(message_at), memory=[memory(message_at, "message", data)])
    forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (ALLOC, 0xA0, 0, 0), data, data)
    tape.back(call, ALLOC, 0xA0, 0, 0, memory=[memory(message_at, "message", data)])
    upper, lower = cookie >> 32, cookie & 0xFFFFFFFF
    call = tape.call(RESUME, *to_pair(at), 0, upper, lower, memory=[memory(message_at, "message", data)])
    tape.forward(call, (RESUME, 0x10, 0x2000, 0, upper, lower, 0, 5), message=data)
    return call, data


@pytest.mark.parametrize("count", [130, 512, 1023])
def test_a_buffer_for_optee_that_is_more_than_the_other_mediator_allows(count: int, tmp_path: Path) -> None:
    """It has the guest free the buffer again and tells OP-TEE; what it asks with is no request of OP-TEE's."""
    tape = mediated()
    cookie = 0xFFFF_0000_1111_0080
    pair = (cookie >> 32, cookie & 0xFFFFFFFF)
    argument = BASE + 0x9000
    call, data = argument_cycle(tape, cookie, argument)
    request = message(RpcCommand.SHM_ALLOC, (1, 0, count * 4096, 8), ret=GENERIC)
    tape.answer(call, (CMD, *pair, 0), message=data, rpc=request + bytes(RPC_SIZE - len(request)))
    here = memory(MESSAGE, "message", data)
    tape.back(call, CMD, *pair, 0, memory=[here, memory(argument, "rpc", request + bytes(RPC_SIZE - len(request)))])
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    reply = message(RpcCommand.SHM_ALLOC, (TMEM_OUT, lists[0], count * 4096, KERNEL_POINTER), origin=2)
    free = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, KERNEL_POINTER), ret=GENERIC, origin=2)
    tail = bytes(RPC_SIZE - len(reply))
    call = tape.call(
        RESUME, *pair, 0, *pair, memory=[here, memory(argument, "rpc", reply + tail), *list_memory(pages(count), lists)]
    )
    tape.back(call, CMD, *pair, 0, memory=[here, memory(argument, "rpc", free + tail)])
    freed = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, KERNEL_POINTER), origin=2)
    call = tape.call(RESUME, *pair, 0, *pair, memory=[here, memory(argument, "rpc", freed + tail)])
    told = HEADER.pack(RpcCommand.SHM_FREE, 0, 0, 0, 0, GENERIC, 2, 0)
    tape.forward(call, (RESUME, 0, 0, 0, 0, 0, 0, 5), message=data, rpc=told + bytes(RPC_SIZE - len(told)))
    after = done(data, ret=OUT_OF_MEMORY, origin=3)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *pair, 0, memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == {**NOTHING_LEFT, "rpc_arguments": 1}


@pytest.mark.parametrize("full", [False, True])
def test_cached_rpc_arguments_are_given_back_with_whole_cookies(full: bool, tmp_path: Path) -> None:
    """DISABLE_SHM_CACHE answers the cookie's high half in x1, and all 64 bits of it in x2."""
    tape = mediated()
    cookie = 0xFFFF_0000_7BC0_2180
    upper, lower = cookie >> 32, cookie & 0xFFFFFFFF
    call, data = argument_cycle(tape, cookie, BASE + 0x9000)
    after = done(data)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *to_pair(BASE + 0x9000), 0, memory=[memory(MESSAGE, "message", after)])
    for answer in ((0, upper, cookie if full else lower, 0), (7, 0, 0, 0)):
        call = tape.call(Function.DISABLE_SHM_CACHE)
        tape.forward(call, (Function.DISABLE_SHM_CACHE, 0, 0, 0, 0, 0, 0, 5))
        tape.answer(call, answer)
        tape.back(call, *(answer if not answer[0] else (7, 0, 0, 0)))
    # The page, and the pointer that names it, are the guest's again.
    call, data = argument_cycle(tape, cookie, BASE + 0x9000)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *to_pair(BASE + 0x9000), 0, memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == {**NOTHING_LEFT, "rpc_arguments": 1}


def test_rpc_free_and_the_same_page_and_cookie_again(tmp_path: Path) -> None:
    tape = mediated()
    cookie = 0xFFFF_0000_7BC0_2180
    pair = (cookie >> 32, cookie & 0xFFFFFFFF)
    for _ in range(3):
        call, data = argument_cycle(tape, cookie, BASE + 0x9000)
        here = memory(MESSAGE, "message", data)
        tape.answer(call, (FREE, *pair, 0), message=data)
        tape.back(call, FREE, *pair, 0, memory=[here])
        call = tape.call(RESUME, *pair, 0, *pair, memory=[here])
        forwarded(tape, call, (RESUME, *pair, 0, 0, 0, 0, 5), (0,), data, done(data))
        tape.back(call, 0, *pair, 0, memory=[memory(MESSAGE, "message", done(data))])
    assert good(tape.replay(tmp_path, "xen")).left == NOTHING_LEFT


def test_a_guest_without_memory_for_an_rpc_argument(tmp_path: Path) -> None:
    """Linux answers RPC ALLOC with address and cookie 0; OP-TEE gives the call up."""
    tape = mediated()
    data = invoke((3, 1, 2, 3))
    here = memory(MESSAGE, "message", data)
    call = tape.call(ARG, *to_pair(MESSAGE), memory=[here])
    forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (ALLOC, 0xA0, 0, 0), data, data)
    tape.back(call, ALLOC, 0xA0, 0, 0, memory=[here])
    call = tape.call(RESUME, 0, 0, 0, 0, 0, memory=[here])
    after = done(data, ret=OUT_OF_MEMORY, origin=3)
    forwarded(tape, call, (RESUME, 0, 0, 0, 0, 0, 0, 5), (0,), data, after)
    tape.back(call, 0, 0, 0, 0, memory=[memory(MESSAGE, "message", after)])
    assert good(tape.replay(tmp_path, "xen")).left == NOTHING_LEFT


def test_two_calls_each_with_an_rpc_argument_of_its_own(tmp_path: Path) -> None:
    """A driver without RPC_ARG, and nothing between."""
    tape = start(0x14)
    here = [MESSAGE, MESSAGE + 4096]
    arguments, cookies = [BASE + 0x9000, BASE + 0xA000], [KERNEL_POINTER, KERNEL_POINTER + 0x80]
    data = invoke((3, 1, 2, 3))
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    reply = message(RpcCommand.GET_TIME, (2, 8, 9, 0))
    for n in (0, 1):
        call = tape.call(ARG, *to_pair(here[n]), memory=[memory(here[n], "message", data)], vcpu=n)
        tape.back(call, ALLOC, 0xA0, 0, n, memory=[memory(here[n], "message", data)])
    for n in (1, 0):
        entry = memory(here[n], "message", data)
        upper, lower = cookies[n] >> 32, cookies[n]  # Linux puts all 64 bits into x5
        call = tape.call(RESUME, *to_pair(arguments[n]), n, upper, lower, memory=[entry], vcpu=1 - n)
        tape.back(call, CMD, upper, lower, n, memory=[entry, memory(arguments[n], "rpc", request)])
    for n in (0, 1):
        entry = memory(here[n], "message", data)
        pair = (cookies[n] >> 32, cookies[n])
        call = tape.call(RESUME, *pair, n, memory=[entry, memory(arguments[n], "rpc", reply)])
        tape.back(call, 0, memory=[memory(here[n], "message", done(data))])
    assert good(tape.replay(tmp_path)).left == {**NOTHING_LEFT, "rpc_arguments": 2}


def test_notifications_in_the_middle_of_calls(tmp_path: Path) -> None:
    """GET_ASYNC_NOTIF_VALUE comes from interrupt context, DO_BOTTOM_HALF and STOP_ASYNC_NOTIF are messages."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 0, 3, 0), vcpu=1)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 9, 1, 0), vcpu=1)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 0, 0, 0), vcpu=1)
    bottom = message(Command.DO_BOTTOM_HALF)
    b = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x180, memory=views(DATA + 0x180, bottom), vcpu=1)
    tape.back(a, INTERRUPT, 0, 0, 0, memory=views(MESSAGE, data))
    tape.back(b, 0, memory=views(DATA + 0x180, done(bottom)))
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 1, 1, 0), vcpu=1)
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", data)])
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    stop = message(Command.STOP_ASYNC_NOTIF)
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0, memory=views(DATA, stop))
    tape.back(call, 0, memory=views(DATA, done(stop)))
    unregister(tape, KERNEL_POINTER)
    assert good(tape.replay(tmp_path)).left == NOTHING_LEFT


@pytest.mark.parametrize("offset", [0, 8, 0x180, 0xE00, 4096, 4096 + 0x180, 2 * 4096 + 0xF00 - 160])
def test_a_registered_message_at_any_offset(offset: int, tmp_path: Path) -> None:
    """In any page of its buffer, whose pages need not be neighbours."""
    tape = start()
    listed = [DATA + 0x8000, DATA, DATA + 0x4000]
    register(tape, KERNEL_POINTER, listed)
    data = invoke((3, 1, 2, 3), (3, 4, 5, 6), session=offset + 1)

    def here(data: bytes) -> list[dict[str, str]]:
        """The message and the empty RPC argument behind it, where each begins."""
        return [
            memory(listed[at // 4096] + at % 4096, kind, octets)
            for kind, at, octets in (("message", offset, data), ("rpc", offset + len(data), bytes(RPC_SIZE)))
        ]

    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), offset, memory=here(data))
    tape.back(call, 0, memory=here(done(data, at40=b"\x77", at72=b"\x88")))
    report = good(tape.replay(tmp_path))
    assert report.expected["regd_arg_as_rpc_arg"] == 1


def test_a_registered_message_in_a_buffer_with_an_offset(tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, [DATA], offset=0x40)
    data = invoke((3, 1, 2, 3))
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x100, memory=views(DATA + 0x140, data))
    tape.back(call, 0, memory=views(DATA + 0x140, done(data)))
    good(tape.replay(tmp_path))


def test_a_driver_that_is_loaded_again(tmp_path: Path) -> None:
    """The same pointers, the same pages, a new driver."""
    tape = Tape([(BASE, 128 << 20)])
    for _ in range(3):
        probe(tape)
        register(tape, KERNEL_POINTER, [DATA])
        register(tape, KERNEL_POINTER + 0x100, pages(600))
        unregister(tape, KERNEL_POINTER + 0x100)
        stop = message(Command.STOP_ASYNC_NOTIF)
        call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0, memory=views(DATA, stop))
        tape.back(call, 0, memory=views(DATA, done(stop)))
        unregister(tape, KERNEL_POINTER)
    assert good(tape.replay(tmp_path)).left == NOTHING_LEFT


def test_cancellation_and_what_it_ends_with(tmp_path: Path) -> None:
    tape = start()
    data = message(Command.INVOKE_COMMAND, (1, 5000, 1, 0), session=4, cancel_id=17)
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    request = message(RpcCommand.SUSPEND, (1, 10, 0, 0), ret=GENERIC)
    tape.back(a, CMD, memory=views(MESSAGE, data, request))
    cancel = message(Command.CANCEL, session=4, cancel_id=17)
    simple(tape, RPC_ARG, MESSAGE + 4096, cancel, done(cancel), vcpu=1)
    a = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.SUSPEND, (1, 10, 0, 0))))
    tape.back(a, 0, memory=views(MESSAGE, done(data, ret=Result.CANCEL)))
    good(tape.replay(tmp_path))


def test_wait_and_wake_by_notification_rpcs(tmp_path: Path) -> None:
    tape = start()
    data = invoke((3, 1, 2, 3))
    wait = message(RpcCommand.NOTIFICATION, (1, 0, 70, 0), ret=GENERIC)
    send = message(RpcCommand.NOTIFICATION, (1, 1, 70, 0), ret=GENERIC)
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.back(a, CMD, memory=views(MESSAGE, data, wait))
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, data), vcpu=1)
    tape.back(b, CMD, 0, 0, 1, memory=views(MESSAGE + 4096, data, send))
    b = tape.call(RESUME, 0, 0, 1, memory=views(MESSAGE + 4096, data, done(send, origin=0)), vcpu=1)
    a = tape.call(RESUME, 0, 0, 0, memory=views(MESSAGE, data, done(wait, origin=0)), vcpu=0)
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(data)))
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_a_size_that_optee_makes_greater(tmp_path: Path) -> None:
    """SHORT_BUFFER: the size that would be needed, in registered and in temporary memory, in NULL too."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = invoke((6, 0, 64, KERNEL_POINTER), (TMEM_OUT, LISTS, 4096, 0x99), (10, 0, 0, 0), (7, 8, 64, KERNEL_POINTER))
    size = (5000).to_bytes(8, "little")
    after = done(data, ret=Result.SHORT_BUFFER, at48=size, at80=size, at112=size, at144=size)
    simple(tape, RPC_ARG, MESSAGE, data, after, *list_memory([DATA + 4096], [LISTS]))
    good(tape.replay(tmp_path))


@pytest.mark.parametrize("function", [0x3200_0020, 0xB200_0030, 0xBF00_FF02])
@pytest.mark.parametrize("unknown", [0xFFFFFFFF, 0xFFFFFFFF_FFFFFFFF])
def test_a_function_that_nobody_knows(function: int, unknown: int, tmp_path: Path) -> None:
    """OP-TEE's -1 has 32 bits, the mediator's 64 (R2): no Linux can tell them apart."""
    tape = start()
    tape.fast(function, 1, 2, 3, answer=(unknown, 1, 2, 3))
    good(tape.replay(tmp_path))


def test_identities_and_counts(tmp_path: Path) -> None:
    tape = start()
    tape.fast(Function.GET_OS_UUID, answer=OS_UUID)
    tape.fast(Function.CALLS_COUNT, answer=(12, 0, 0, 0))
    tape.fast(Function.GET_THREAD_COUNT, answer=(0, 2, 0, 0))
    report = good(tape.replay(tmp_path))
    assert report.expected["calls_count"] == 1


@pytest.mark.parametrize("client", [1, 5, 65535])
def test_a_guest_with_any_client_id(client: int, tmp_path: Path) -> None:
    tape = mediated(client=client)
    call = tape.call(Function.CALLS_UID, 0, 0, 0, 0, 0, 0, 9)
    tape.forward(call, (Function.CALLS_UID, 0, 0, 0, 0, 0, 0, client))
    tape.answer(call, API_UID)
    tape.back(call, *API_UID)
    good(tape.replay(tmp_path, "xen"))


@pytest.mark.parametrize(
    "ram",
    [
        ((BASE, 1 << 20), (0x1_0000_0000, 1 << 20)),
        ((0x1_0000_0000, 1 << 20), (BASE, 1 << 20)),
        ((BASE, 1 << 20), (BASE + (2 << 20), 1 << 20), (BASE + (8 << 20), 1 << 20)),
    ],
)
def test_ram_in_pieces(ram: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """A page list names pages of all of them."""
    tape = start(ram=ram)
    listed = [base + number * 4096 for number in range(16, 40) for base, _ in ram]
    data = message(Command.REGISTER_SHM, (TMEM_OUT, ram[-1][0] + 0x2000, len(listed) * 4096, KERNEL_POINTER))
    lists = list_memory(listed, [ram[-1][0] + 0x2000])
    simple(tape, RPC_ARG, ram[0][0] + 0x1000, data, done(data), *lists)
    assert good(tape.replay(tmp_path)).peak_pages_pinned == len(listed)


def test_a_trace_that_ends_within_calls_of_each_kind(tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(600))
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(a, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
    temporary = invoke((TMEM_INOUT, LISTS, 3 * 4096, 0x99))
    at = MESSAGE + 4096
    tape.call(RPC_ARG, *to_pair(at), memory=[*views(at, temporary), *list_memory(pages(3), [LISTS])])
    tape.call(Function.GET_ASYNC_NOTIF_VALUE)
    report = good(tape.replay(tmp_path))
    assert report.left == {"pages": 603, "calls": 2, "buffers": 2, "rpc_arguments": 0}
    assert report.returned == report.calls - 2


@pytest.mark.parametrize("policy", ["xen", "default"])
@pytest.mark.parametrize("end", ["call", "forward", "answer"])
def test_a_mediated_trace_that_ends_within_a_call(end: str, policy: str, tmp_path: Path) -> None:
    tape = mediated()
    data = invoke((3, 1, 2, 3))
    call = tape.call(ARG, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", data)])
    if end != "call":
        tape.forward(call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), message=data)
    if end == "answer":
        tape.answer(call, (INTERRUPT, 0, 0, 0), message=data)
    good(tape.replay(tmp_path, policy))


def test_an_observer_sees_each_call_and_answer(tmp_path: Path) -> None:
    header, events = read_trace(story().write(tmp_path / "tape.jsonl.gz"))
    seen: list[tuple[str, str]] = []
    run = Replay(
        header,
        events,
        load_policy("default"),
        lambda event, step: seen.append((type(event).__name__, type(step).__name__)),
    )
    good(run.run())
    assert set(seen) == {("CallEvent", "Forward"), ("ReturnEvent", "Reply")}


# Our own guests, on OP-TEE's model


async def busy(guest: guests.Guest, stack: Stack) -> None:
    """Six clients on two vCPUs and two threads; notifications in between; one wait is cancelled, one TA panics."""
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(_client, guest, number)
        nursery.start_soon(_notify, stack)
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        with pytest.raises(guests.TeeError):
            await session.invoke(Exercise.PANIC, Value(7, direction=Direction.INPUT))
        await session.close()
        session = await context.open_session(EXERCISE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancelled, session)
            await trio.sleep(0.05)
            await session.request_cancellation()
        await session.close()


async def _notify(stack: Stack) -> None:
    for value in (0, 5, 0, 63):
        await trio.sleep(0.004)
        stack.model.notify(stack.vm, value)


async def _cancelled(session: guests.Session) -> None:
    """The request to cancel needs a thread too: it may come too late."""
    with suppress(guests.TeeError):
        await session.invoke(Exercise.WAIT, Value(200, 1, Direction.INPUT))


async def _client(guest: guests.Guest, number: int) -> None:
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        await session.invoke(Exercise.WAIT, Value(10, 0, Direction.INPUT))
        text = bytes([number]) * 5000
        source = Temporary(text, direction=Direction.INPUT)
        _, output = await session.invoke(8, source, Temporary(size=6000, direction=Direction.OUTPUT))
        assert output == MemoryResult(5000, text)
        async with await context.allocate(3 * 4096) as shared:
            shared.write(text)
            target = Partial(shared, 6000, 5000, Direction.OUTPUT)
            await session.invoke(8, Partial(shared, 0, 5000, Direction.INPUT), target)
            assert shared.read(6000, 5000) == text
        await session.invoke(10, Value(direction=Direction.OUTPUT))
        await session.close()
        session = await context.open_session(HELLO_WORLD)
        assert await session.invoke(HelloWorld.INC_VALUE, Value(number)) == (Values(number + 1, 0),)
        await session.close()
        session = await context.open_session(RANDOM)
        assert await session.invoke(RandomCommand.GENERATE, Null()) == (MemoryResult(0),)
        await session.close()


RPC_ARG_BITS = 0x60


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hidden", [0, RPC_ARG_BITS])
def test_a_busy_guest_of_our_own_without_a_mediator(seed: int, hidden: int, tmp_path: Path) -> None:
    tape = record_native(busy, seed=seed, hidden=hidden, boots=2)
    assert any(event.get("regs", [""])[0] == "0x1" for event in tape.events), "nobody met the thread limit"
    report = good(tape.replay(tmp_path))
    assert report.left == NOTHING_LEFT
    assert report.calls == report.returned > 200


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["xen", "default"])
def test_a_busy_guest_of_our_own_with_a_mediator(seed: int, policy: str, tmp_path: Path) -> None:
    tape = record_mediated(busy, load_policy(policy), seed=seed, boots=2)
    report = good(tape.replay(tmp_path, policy))
    assert report.left == NOTHING_LEFT
    assert report.calls == report.returned > 200


def images(more: int = 0) -> dict[UUID, bytes]:
    """Images of all TAs, so many bytes larger than they are."""
    found = {}
    for ta in BUILT_IN:
        if not ta.is_pseudo:
            larger = type(ta.__name__, (ta,), {"image_size": ta.image_size + more})
            found[ta.uuid] = build_image(larger)
    return found


async def loads(guest: guests.Guest, stack: Stack) -> None:
    """TAs come from the supplicant: LOAD_TA, SHM_ALLOC and the file operations around them."""
    for uuid in (HELLO_WORLD, AES, RANDOM):
        async with guest.context() as context:
            session = await context.open_session(uuid)
            await session.close()


@pytest.mark.parametrize("padding", [0, 64 * 4096, 600 * 4096])
@pytest.mark.parametrize("hidden", [0, RPC_ARG_BITS])
def test_tas_that_the_supplicant_loads(padding: int, hidden: int, tmp_path: Path) -> None:
    tape = record_native(loads, hidden=hidden, images=images(padding))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned > padding // 4096
    commands = {
        HEADER.unpack_from(bytes.fromhex(entry["hex"]))[0]
        for event in tape.events
        if event["e"] == "return" and event["regs"][0] == hex(CMD)
        for entry in event["memory"]
        if entry["is"] == "rpc"
    }
    assert {RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE} <= commands


@pytest.mark.parametrize("policy", ["xen", "default"])
def test_tas_that_the_supplicant_loads_through_a_mediator(policy: str, tmp_path: Path) -> None:
    good(record_mediated(loads, load_policy(policy), images=images()).replay(tmp_path, policy))


def test_a_recorded_ta_that_is_larger_than_xen_allows(tmp_path: Path) -> None:
    """The mediator asks the guest to free OP-TEE's buffer again; opening the session fails, which is recorded too."""

    async def refused(guest: guests.Guest, stack: Stack) -> None:
        async with guest.context() as context:
            with pytest.raises(guests.TeeError):
                await context.open_session(HELLO_WORLD)

    tape = record_mediated(refused, load_policy("xen"), images=images(200 * 4096))
    good(tape.replay(tmp_path, "xen"))


async def shares(guest: guests.Guest, stack: Stack) -> None:
    """Buffers of many pages, and many buffers at once."""
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        for size in (512, 1022, 1023, 2000):
            async with await context.allocate(size * 4096) as shared:
                shared.write(b"x" * 100, (size - 1) * 4096)
                source = Partial(shared, (size - 1) * 4096, 100, Direction.INPUT)
                await session.invoke(8, source, Partial(shared, 0, 100, Direction.OUTPUT))
                assert shared.read(0, 100) == b"x" * 100
        held = [await context.allocate(4096 * (number % 5 + 1)) for number in range(40)]
        for shared in held[::2] + held[1::2]:
            await shared.release()
        await session.close()


@pytest.mark.parametrize("made_up", [False, True])
def test_buffers_of_many_pages_of_a_guest_of_our_own(made_up: bool, tmp_path: Path) -> None:
    report = good(record_native(shares, made_up=made_up).replay(tmp_path))
    assert report.peak_pages_pinned >= 2000 and report.left == NOTHING_LEFT


def test_a_policy_of_another_limit_answers_for_itself(tmp_path: Path) -> None:
    """Where the mediator says ETHREAD_LIMIT itself, the recorded answer is not taken for another call's."""
    policy = load_policy("default")
    policy = replace(policy, limits=replace(policy.limits, calls=1))
    tape = start()
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.back(a, INTERRUPT, memory=views(MESSAGE, data))
    at = MESSAGE + 4096
    b = tape.call(RPC_ARG, *to_pair(at), memory=views(at, data), vcpu=1)
    tape.back(b, 1, 5, 6, 7, memory=views(at, data))
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", data)])
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    report = good(tape.replay(tmp_path, policy))
    assert report.forwarded == report.calls - 1


assert HEADER_SIZE == PARAM_SIZE == 32  # the offsets above count on it
