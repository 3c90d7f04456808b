"""A case as a sequence diagram: what the guest, the mediator and OP-TEE say to each other when it is run."""

from __future__ import annotations

from typing import Final

from mediator.conformance.journal import Answered, AtOptee, Called, Entry, Journal
from mediator.scenario.language import Scenario
from mediator.scenario.secure_side import Forwarded
from mediator.trace.diagram import GUEST, MEDIATOR, OPTEE, Arrow, Journey
from optee.abi.message import NONCONTIG, TYPE_MASK, Command, Message, ParamType
from optee.abi.registers import name_of
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, Registers, ReturnCode, RpcReturn, is_rpc

MAX_ARROWS: Final = 80
"""Arrows of a diagram that is to be read, not searched."""
_LOW: Final = 0xFFFFFFFF
_WITH_RESULT: Final = (Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG)


def explain(case: Scenario, journal: Journal) -> Journey:
    """Draw what a run of a case was."""
    several = len(case.machine.specs(None)) > 1
    arrows = [arrow for entry in journal.entries for arrow in _arrows(entry, several=several)]
    left = len(arrows) - MAX_ARROWS
    if left > 0:
        arrows = [*arrows[:MAX_ARROWS], Arrow(GUEST, MEDIATOR, f"... and {left} more")]
    return Journey(f"{case.scenario}: {case.purpose}\n{case.source} ({', '.join(case.rules)})", arrows)


def _arrows(entry: Entry, *, several: bool) -> list[Arrow]:
    if isinstance(entry, Called):
        whose = f"{entry.guest}: " if several else ""
        return [Arrow(GUEST, MEDIATOR, whose + _call(entry.regs, entry.message), _parameters(entry.message))]
    if isinstance(entry, Answered):
        whose = f"{entry.guest}: " if several else ""
        return [Arrow(MEDIATOR, GUEST, whose + _answer(entry.regs, entry.answer, entry.message))]
    return _at_optee(entry)


def _at_optee(entry: AtOptee) -> list[Arrow]:
    seen = entry.seen
    asked = "" if entry.request is None else f" {name_of(RpcCommand, entry.request.cmd)}"
    return [
        Arrow(MEDIATOR, OPTEE, _forwarded(seen), _parameters(seen.argument)),
        Arrow(OPTEE, MEDIATOR, _answer(seen.regs, entry.answer, None) + asked, _parameters(entry.request)),
    ]


def _forwarded(seen: Forwarded) -> str:
    words = [_call(seen.regs, seen.message), f"a7 = {seen.regs[7]}"]
    if seen.argument is not None:
        words.append(f"ret {name_of(Result, seen.argument.ret)}")
    return ", ".join(words)


def _call(regs: Registers, message: Message | None) -> str:
    function = regs[0] & _LOW
    words = name_of(Function, function)
    if function == Function.RETURN_FROM_RPC:
        words += f" thread {regs[3] & _LOW:#x}"
    return words if message is None else f"{words} {name_of(Command, message.cmd)}"


def _answer(regs: Registers, answer: Registers, message: Message | None) -> str:
    code = answer[0] & _LOW
    if is_rpc(code):
        return f"RPC {name_of(RpcReturn, code)} thread {answer[3] & _LOW:#x}"
    if code and code not in list(ReturnCode):
        return " ".join(f"{word:x}" for word in answer[:4])
    words = name_of(ReturnCode, code)
    if message is not None and code == 0 and regs[0] & _LOW in _WITH_RESULT:
        origin = f" from {name_of(Origin, message.ret_origin)}" if message.ret else ""
        words += f", ret {name_of(Result, message.ret)}{origin}"
    return words


def _parameters(message: Message | None) -> tuple[str, ...]:
    if message is None:
        return ()
    return tuple(
        f"{name_of(ParamType, attr & TYPE_MASK)}{' list' if attr & NONCONTIG else ''} {a:#x} {b:#x} {c:#x}"
        for attr, a, b, c in message.params[:4]
    )
