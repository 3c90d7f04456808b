"""The recordings of the real driver and the real OP-TEE: whole, cut short, and tampered with."""

import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mediator.policies import load_policy
from mediator.trace.format import read_trace
from mediator.trace.replay import Replay, ReplayReport, replay
from optee.abi.message import HEADER, message_size
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function
from tests.shared import SHARED, needs_shared
from tests.trace.stories import ALLOC, ARG, CMD, NOTHING_LEFT, REGD_ARG, RESUME, RPC_ARG, bad, good

TRACES = SHARED / "traces"
RECORDED = [("native", "default"), ("xen", "xen")]


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
        if event.get("e") == "call"
        and int(event["regs"][0], 16) != RESUME
        and any(entry["is"] == "list" for entry in event.get("memory", ()))
    ]
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
@pytest.mark.parametrize("at", [0, 40])
def test_a_reply_that_changes_what_it_must_not_is_told(at: int, tmp_path: Path) -> None:
    """Command and input of a reply are the request's own (R16): OP-TEE sees those."""
    events = [json.loads(line) for line in lines("native")]
    for index, event in enumerate(events):
        reply = next((entry for entry in event.get("memory", ()) if entry["is"] == "rpc"), None)
        if event.get("e") == "call" and reply and HEADER.unpack_from(bytes.fromhex(reply["hex"]))[0] == RpcCommand.FS:
            reply["hex"] = flip(reply["hex"], at)
            bad(tampered(events, index, tmp_path, "default"), "forwarded rpc", index + 1)
            return
    pytest.fail("no such reply")


@needs_shared
def test_a_call_that_the_other_mediator_did_not_forward_is_told(tmp_path: Path) -> None:
    """OP-TEE's answer, and no forward before it: ours forwarded what the recorded one seems to have answered."""
    events = xen_events()
    calls = [event["id"] for event in events if event.get("e") == "forward" and event["id"] is not None]
    for identity in sample(calls):
        left = [event for event in events if event.get("e") not in ("forward", "answer") or event["id"] != identity]
        returned = next(event for event in left if event.get("e") == "return" and event["id"] == identity)
        if int(returned["regs"][0], 16) == CMD:
            continue  # may be a request of the mediator's own
        bad(tampered(left, left.index(returned), tmp_path), "forward", left.index(returned) + 1)
