"""Cores with one mistake each, and what must notice: a named fast subset of the tests' stories, or the fuzzer.

Each fault replaces a few words in one function of the core.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import pytest

from mediator.core import fast, ledger, rpc, sharing, yielding
from mediator.core.flow import Flow
from mediator.core.mediator import Mediator
from mediator.core.policy import FlowPolicy
from mediator.fuzz import fuzz
from mediator.policies import load_policy

SECONDS = 60.0
"""Time for the fuzzer to find a fault."""


class Fault(NamedTuple):
    """One mistake: where, which words, and what stands there instead."""

    function: Any
    old: str
    new: str
    by: str = "fuzz"


FAULTS = {
    "a buffer stays pinned": Fault(sharing.release_buffer, r"guest\.memory\.unpin\(.*\)", "pass"),
    "a buffer is not refunded": Fault(sharing.release_buffer, r"buffer\.charge\.refund\(\)", "pass"),
    "a buffer is not forgotten": Fault(sharing.release_buffer, r"del guest\.buffers\[.*\]", "pass"),
    "a list page is not taken back": Fault(sharing.release_buffer, r"core\.world\.take_back\(page\)", "pass"),
    "an RPC page stays pinned": Fault(sharing.release_argument, r"guest\.memory\.unpin\(.*\)", "pass"),
    "an RPC page is not taken back": Fault(sharing.release_argument, r"world\.take_back\(.*\)", "pass"),
    "an RPC argument is not refunded": Fault(sharing.release_argument, r"argument\.charge\.refund\(\)", "pass"),
    "an RPC argument is not forgotten": Fault(sharing.release_argument, r"del guest\.arguments\[.*\]", "pass"),
    "an IPA is forwarded": Fault(sharing.translate, r"shadow\.words\[.*\] = .*", "pass"),
    "a live cookie is taken again": Fault(sharing._open, r"if cookie in guest\.buffers", "if False"),
    "a duplicate cookie keeps its charge": Fault(sharing._open, r"charge\.refund\(\)\n(\s+)raise", r"pass\n\1raise"),
    "no pages are charged": Fault(sharing._open, r"charge\(pages, 1", "charge(0, 1"),
    "no buffer is charged": Fault(sharing._open, r"charge\(pages, 1", "charge(pages, 0"),
    "a call is not refunded": Fault(yielding.end, r"call\.charge\.refund\(\)", "pass"),
    "a shadow is not taken back": Fault(yielding.end, r"core\.world\.take_back\(call\.shadow\)", "pass"),
    "a call's buffers stay": Fault(yielding.end, r"release_buffer\(core, guest, buffer\)", "pass"),
    "a refused registration stays": Fault(yielding.end, r"release_buffer\(core, guest, call\.registering\)", "pass"),
    "a call is not forgotten": Fault(yielding.end, r"del guest\.calls\[call\.id\]", "pass"),
    "a7 is another's": Fault(yielding._send, r"call\.guest\.vm\)", "call.guest.vm + 1)"),
    "a7 of a fast call is the guest's word": Fault(fast.enter, r"guest\.vm\)", "regs[7])"),
    "the guest's x0 is forwarded": Fault(fast.enter, r"Forward\(\(int\(function\)", "Forward((regs[0] | 1 << 32"),
    "a refused call is an error": Fault(yielding._count, '"info"', '"error"'),
    "a good registration is dropped": Fault(yielding.completed, r"_registered\(core, call\)\n", "pass\n"),
    "an unregistered buffer stays": Fault(yielding._unregistered, r"release_buffer\(.*\)", "pass"),
    "an RPC is told that was not kept": Fault(
        rpc.suspended, r"guest\.suspended\[thread\] = call\n    return", "return"
    ),
    "a dead call is ended though OP-TEE holds it": Fault(
        Mediator._call_returned, r"if is_rpc:\n        return", "if 0:\n        return"
    ),
    "a live RPC argument is replaced": Fault(rpc._allocate_argument, r"if cookie in guest\.arguments", "if False"),
    "the guest's RPC page is forwarded": Fault(rpc._allocate_argument, r"return page\.pa", "return ipa"),
    "no RPC argument is charged": Fault(rpc._allocate_argument, r"charge\(0, 0, 1", "charge(0, 0, 0"),
    "a page without an argument stays pinned": Fault(
        rpc._allocate_argument, r"guest\.memory\.unpin\(pinned\)", "pass", "exhausted"
    ),
    "a thread in use is not noticed": Fault(rpc.suspended, r"thread in guest\.suspended", "False"),
    "SHM_FREE frees nothing": Fault(rpc._drop, r"release_buffer\(.*\)", "pass"),
    "a resumed thread can be resumed again": Fault(rpc.resume, r"del guest\.suspended\[thread\]", "pass"),
    "a refused offer stays": Fault(rpc._take_allocated, r"release_buffer\(core, guest, buffer\)", "pass"),
    "a refund gives back pages twice": Fault(
        ledger.Charge.refund, r"ledger\.pages -= self\.pages", "ledger.pages -= 2 * self.pages"
    ),
    "a refund forgets memory": Fault(ledger.Charge.refund, r"ledger\.memory -= self\.memory", "pass"),
    "one call more waits than may": Fault(Flow.enter, r"waiting > self", "waiting - 1 > self", "flow"),
    "a call is sent away with none in flight": Fault(Flow.enter, r"waiting > self\.policy\.queue", "True", "flow"),
    "a secure core is not given back": Fault(Flow.leave, r"self\.running -= 1", "pass", "flow"),
    "a guest's share of the cores is not given back": Fault(Flow.leave, r"place\.lane\.inside -= 1", "pass", "flow"),
    "a secure core is not counted": Fault(Flow._grant, r"self\.running \+= 1", "pass", "flow"),
    "a call that is let in is not charged": Fault(Flow._grant, r"place\.charge\.take_call\(\)", "pass", "flow"),
    "a call whose vCPU is away has its turn": Fault(Flow.away, r"place\.stand = Stand\.AWAY", "pass", "flow"),
    "who waits when its guest goes is forgotten": Fault(Flow.drop, r"self\._granted\.append\(place\)", "pass", "flow"),
    "a resumed guest does not line up again": Fault(Flow.unpause, r"self\._lanes\[lane\] = None", "pass", "flow"),
    "a begun call waits behind new ones": Fault(Flow.resume, r"place\.urgent = True", "pass", "flow"),
    "nobody says when the next turn is": Fault(Flow.next_turn, r"return min\(.*\)", "return None", "flow"),
}


@contextmanager
def broken(fault: Fault) -> Iterator[None]:
    """A core with this mistake."""
    function: FunctionType = fault.function
    source = textwrap.dedent(inspect.getsource(function))
    changed, count = re.subn(fault.old, fault.new, source)
    assert count, f"{function.__qualname__} reads differently now: /{fault.old}/ is not in it"
    namespace: dict[str, Any] = {}
    exec(compile(ast.parse(changed), f"<broken {function.__qualname__}>", "exec"), function.__globals__, namespace)
    (made,) = (value for value in namespace.values() if isinstance(value, FunctionType))
    whole, function.__code__ = function.__code__, made.__code__
    try:
        yield
    finally:
        function.__code__ = whole


def found_by_fuzz() -> bool:
    """Whether the fuzzer finds something wrong."""
    return fuzz(load_policy("default"), seed=0, seconds=SECONDS, shrink_it=False).failure is not None


def found_with_flow_control() -> bool:
    """Whether the fuzzer finds something wrong where calls wait for turns."""
    policy = replace(load_policy("default"), flow=FlowPolicy(queue=2, rate=2000.0, burst=2, secure_cores=2))
    return fuzz(policy, seed=0, seconds=SECONDS, shrink_it=False).failure is not None


def found_when_exhausted() -> bool:
    """Whether it is found when the mediator has no page left for an RPC argument."""
    from tests.core.pair import Pair, ask_alloc, interrupt, invoke

    pair = Pair()
    try:
        guest = pair.guest()
        pair.world.script += [ask_alloc(), interrupt()]
        guest.call(invoke())
        pair.host.left = 0
        guest.give_page(0xC0)
        return bool(pair.checker.violations)
    finally:
        pair.close()


BY: dict[str, Callable[[], bool]] = {
    "fuzz": found_by_fuzz,
    "flow": found_with_flow_control,
    "exhausted": found_when_exhausted,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_core_is_caught(name: str) -> None:
    fault = FAULTS[name]
    with broken(fault):
        assert BY[fault.by]()


def test_there_are_enough_faults_and_each_can_still_be_made() -> None:
    assert len(FAULTS) >= 30
    for fault in FAULTS.values():
        with broken(fault):
            pass


def test_a_whole_core_is_not_accused() -> None:
    assert not found_when_exhausted()
