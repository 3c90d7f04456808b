"""Mediators that are wrong in one way each, for tests of what must notice."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.core import fast, ledger, rpc, sharing, yielding
from mediator.core.flow import Flow
from mediator.core.mediator import Mediator
from mediator.core.records import Call
from mediator.core.steps import Forward, Regs
from optee.abi.smc import Function


def pages_stay_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualMachine, "unpin", lambda self, pinned: None)


def pages_are_forwarded_as_ipas(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = VirtualMachine.pin

    def pinned(self: VirtualMachine, ipas: npt.NDArray[np.uint64]) -> Pinned:
        found = pin(self, ipas)
        found.pas = ipas.copy()  # the VM knows its own pages still
        return found

    monkeypatch.setattr(VirtualMachine, "pin", pinned)


def messages_are_forwarded_by_ipa(monkeypatch: pytest.MonkeyPatch) -> None:
    send = yielding._send

    def sent(core: Mediator, call: Call) -> Any:
        step = send(core, call)
        return Forward((step.regs[0], call.regs[1], call.regs[2], *step.regs[3:]), step.ticket)

    monkeypatch.setattr(yielding, "_send", sent)


def reserved_memory_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaked(core: Mediator, regs: Regs, answer: Regs) -> Any:
        return core.answer(Function.EXCHANGE_CAPABILITIES, regs, answer)

    monkeypatch.setattr(fast, "_capabilities", leaked)


class Fault(NamedTuple):
    """One mistake: in which function, which words, what stands there instead; which of the fuzz tests finds it."""

    function: Any
    old: str
    new: str
    by: str = "fuzz"


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


FAULTS = {
    "a buffer stays pinned": Fault(sharing.release_shared, r"guest\.memory\.unpin\(.*\)", "pass"),
    "a buffer is not refunded": Fault(sharing.release_shared, r"shared\.charge\.refund\(\)", "pass"),
    "a buffer is not forgotten": Fault(sharing.release_shared, r"del guest\.buffers\[.*\]", "pass"),
    "a list page is not taken back": Fault(sharing.release_shared, r"core\.world\.take_back\(page\)", "pass"),
    "an RPC page stays pinned": Fault(sharing.release_argument, r"guest\.memory\.unpin\(.*\)", "pass"),
    "an RPC page is not taken back": Fault(sharing.release_argument, r"world\.take_back\(.*\)", "pass"),
    "an RPC argument is not refunded": Fault(sharing.release_argument, r"argument\.charge\.refund\(\)", "pass"),
    "an RPC argument is not forgotten": Fault(sharing.release_argument, r"del guest\.arguments\[.*\]", "pass"),
    "an IPA is forwarded": Fault(sharing.translate, r"shadow\.words\[.*\] = .*", "pass"),
    "a live cookie is taken again": Fault(sharing._open_singly, r"if cookie not in guest\.buffers", "if True"),
    "a live cookie is taken again beside others": Fault(
        sharing._open, r"and guest\.buffers\.keys\(\)\.isdisjoint\(shared\.pages\)", ""
    ),
    "a duplicate cookie keeps its charge": Fault(sharing._open_singly, r"charge\.refund\(\)", "pass"),
    "no pages are charged": Fault(sharing._open_singly, r"charge\(count, 1", "charge(0, 1"),
    "no buffer is charged": Fault(sharing._open_singly, r"charge\(count, 1", "charge(count, 0"),
    "no pages of several buffers are charged": Fault(sharing._open, r"charge\(pages, buffers", "charge(0, buffers"),
    "one of several buffers is charged": Fault(sharing._open, r"charge\(pages, buffers", "charge(pages, 1"),
    "a call is not refunded": Fault(yielding.end, r"call\.charge\.refund\(\)", "pass"),
    "a shadow is not taken back": Fault(yielding.end, r"core\.world\.take_back\(call\.shadow\)", "pass"),
    "a call's buffers stay": Fault(yielding.end, r"release_shared\(core, guest, call\.shared\)", "pass"),
    "a refused registration stays": Fault(yielding.end, r"release_shared\(core, guest, call\.registering\)", "pass"),
    "a call is not forgotten": Fault(yielding.end, r"del guest\.calls\[call\.id\]", "pass"),
    "a7 is another's": Fault(yielding._send, r"call\.guest\.vm\)", "call.guest.vm + 1)"),
    "a7 of a fast call is the guest's word": Fault(fast.enter, r"guest\.vm\)", "regs[7])"),
    "the guest's x0 is forwarded": Fault(fast.enter, r"Forward\(\(int\(function\)", "Forward((regs[0] | 1 << 32"),
    "a refused call is an error": Fault(yielding._count, '"info"', '"error"'),
    "a good registration is dropped": Fault(yielding.completed, r"_registered\(core, call\)\n", "pass\n"),
    "an unregistered buffer stays": Fault(yielding._unregistered, r"release_shared\(.*\)", "pass"),
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
    "SHM_FREE frees nothing": Fault(rpc._deliver, r"release_shared\(.*\)", "pass"),
    "a resumed thread can be resumed again": Fault(rpc.resume, r"del guest\.suspended\[thread\]", "pass"),
    "a refused offer stays": Fault(rpc._take_allocated, r"release_shared\(core, guest, offered\)", "pass"),
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
