"""What a run of a case was at its two ends: the guest's conduit, and OP-TEE's entry.

From it `coverage` knows which items of the ABI a run has shown, and `explain` draws its diagram.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from mediator.core.fast import IDENTITIES
from mediator.scenario.guest import ScenarioGuest
from mediator.scenario.secure_side import Forwarded
from optee.abi.message import HEADER_SIZE, META, NONCONTIG, TYPE_MASK, Command, Message, ParamType
from optee.abi.registers import Named
from optee.abi.rpc import RpcCommand
from optee.abi.smc import (
    Function,
    NsecCapability,
    Registers,
    ReturnCode,
    RpcReturn,
    SecCapability,
    from_pair,
    is_rpc,
)

_LOW: Final = 0xFFFFFFFF
_WITH_MESSAGE: Final = (Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG)
_DATA: Final = IDENTITIES | {Function.CALLS_COUNT}
"""Functions whose a0 is data, not a status."""


@dataclass(frozen=True)
class Called:
    """A guest executed an SMC; message: the one that it points to."""

    guest: str
    regs: Registers
    message: Message | None


@dataclass(frozen=True)
class AtOptee:
    """OP-TEE was called, and answered; request: the RPC argument of an RPC CMD."""

    seen: Forwarded
    answer: Registers
    request: Message | None


@dataclass(frozen=True)
class Answered:
    """The guest got an answer; message: what it finds then where its message is."""

    guest: str
    regs: Registers
    answer: Registers
    message: Message | None


Entry = Called | AtOptee | Answered


class Journal:
    """Keeps what happens in order, and which items of the ABI were seen on the way.

    shown: items as `coverage` names them, such as "Function.CALLS_UID".
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.shown: set[str] = set()

    # What a scenario's witness is told

    def called(self, guest: ScenarioGuest, vcpu: int, regs: Registers) -> None:
        """See `Witness`."""
        message = _message_of(guest, regs)
        self.entries.append(Called(guest.name, regs, message))
        self._call(regs, message)

    def answered(self, guest: ScenarioGuest, vcpu: int, regs: Registers, answer: Registers) -> None:
        """See `Witness`."""
        self.entries.append(Answered(guest.name, regs, answer, _message_of(guest, regs)))
        self._answer(regs, answer)

    def forwarded(self, client: int, seen: Forwarded, answer: Registers, request: Message | None) -> None:
        """See `SecureWitness`. What the mediator asks for itself before there is a guest is no part of a case."""
        if not client:
            return
        self.entries.append(AtOptee(seen, answer, request))
        self._call(seen.regs, seen.message)
        self._answer(seen.regs, answer)
        if seen.argument is not None:
            self._attributes(seen.argument)
        if request is not None:
            self._named(RpcCommand, request.cmd)
            self._attributes(request)

    # What of it is an item of the ABI

    def _call(self, regs: Registers, message: Message | None) -> None:
        self._named(Function, regs[0] & _LOW)
        if regs[0] & _LOW == Function.EXCHANGE_CAPABILITIES:
            self._bits(NsecCapability, regs[1])
        if message is not None:
            self._named(Command, message.cmd)
            self._attributes(message)

    def _answer(self, regs: Registers, answer: Registers) -> None:
        function, code = regs[0] & _LOW, answer[0] & _LOW
        if function in _DATA and code != ReturnCode.UNKNOWN_FUNCTION:
            return
        self._named(RpcReturn if is_rpc(code) else ReturnCode, code)
        if function == Function.EXCHANGE_CAPABILITIES and code == 0:
            self._bits(SecCapability, answer[1])

    def _attributes(self, message: Message) -> None:
        for param in message.params:
            self._named(ParamType, param.attr & TYPE_MASK)
            self.shown.update(name for name, bit in (("META", META), ("NONCONTIG", NONCONTIG)) if param.attr & bit)

    def _named(self, kind: type[Named], number: int) -> None:
        self.shown.update(f"{kind.__name__}.{member.name}" for member in kind if member == number)

    def _bits(self, kind: Iterable[IntFlag], word: int) -> None:
        self.shown.update(f"{type(bit).__name__}.{bit.name}" for bit in kind if word & bit)


def _message_of(guest: ScenarioGuest, regs: Registers) -> Message | None:
    """The message in guest RAM that a call points to; None if there is none that can be read."""
    if regs[0] & _LOW not in _WITH_MESSAGE or not guest.alive:
        return None
    at = from_pair(regs[1], regs[2])
    for ram in guest.vm.ram:
        room = min(ram.base + ram.size - at, 4096)
        if ram.base <= at and room >= HEADER_SIZE:
            try:
                return Message.unpack(ram.read(at, room))
            except ValueError:
                return None
    return None
