"""Mediators that are wrong in one way each, for tests of what must notice."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.core import fast, yielding
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
        found.pas[:] = ipas
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
