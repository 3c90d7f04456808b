"""A mediator that is wrong is found by replaying one long story."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mediator.core import yielding
from mediator.core.mediator import Mediator
from mediator.core.records import Call
from mediator.core.steps import Forward, Regs
from tests.trace.stories import ARG, good, story
from tests.wrong_mediators import (
    messages_are_forwarded_by_ipa,
    pages_are_forwarded_as_ipas,
    pages_stay_pinned,
    reserved_memory_is_offered,
)


def _forward_changes(word: int, value: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Mediator.forward

        def forwarded(self: Mediator, call: Call, regs: Regs) -> Forward:
            return forward(self, call, (*regs[:word], value, *regs[word + 1 :]))

        monkeypatch.setattr(Mediator, "forward", forwarded)

    return patch


def _outputs_forgotten(size: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        take_message = yielding._take_message

        def taken(core: Mediator, call: Call) -> bytes:
            message = take_message(core, call)
            call.outputs = tuple(field for field in call.outputs if field.stop - field.start != size)
            return message

        monkeypatch.setattr(yielding, "_take_message", taken)

    return patch


def test_the_long_story_is_good_with_the_right_mediator(tmp_path: Path) -> None:
    good(story().replay(tmp_path))


@pytest.mark.parametrize(
    ("patch", "what"),
    [
        (pages_are_forwarded_as_ipas, "translated page"),
        (messages_are_forwarded_by_ipa, "forwarded message"),
        (_forward_changes(7, 2), "forwarded a7"),
        (_forward_changes(0, ARG), "forwarded function"),
        (_forward_changes(3, 63), "resumed thread"),
        (reserved_memory_is_offered, "guest's registers"),
        (_outputs_forgotten(8), "guest's message"),
        (_outputs_forgotten(24), "guest's message"),
        (pages_stay_pinned, "left after the end"),
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
