"""A mediator that is wrong is found by replaying one long story."""

from collections.abc import Callable
from pathlib import Path
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
from tests.trace.stories import ARG, good, story


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
        take_message = yielding._take_message

        def taken(core: Mediator, call: Call) -> bytes:
            message = take_message(core, call)
            call.outputs = tuple(field for field in call.outputs if field.stop - field.start != size)
            return message

        monkeypatch.setattr(yielding, "_take_message", taken)

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
