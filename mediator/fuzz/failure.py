"""A failure: what is wrong, by which moves, made short, and as a scenario that shows the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from hv_models.memory import PhysicalFault
from hv_models.stage2 import Stage2Fault
from mediator.core.faults import MediatorBug
from mediator.documents import DocumentError
from mediator.fuzz.moves import Move
from mediator.fuzz.story import Story
from mediator.scenario import load_scenario, run_scenario

LOUD: Final = (
    MediatorBug,
    PhysicalFault,
    Stage2Fault,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What leaves a broken core, or a model that was led by one to an address that is none."""
SHRINK_RUNS: Final = 600
"""Tries to leave moves out."""
STORY_RUNS: Final = 300
"""Tries to leave steps of the scenario out."""

Kinds = frozenset[str]
"""What is wrong, without the circumstances: numbers of invariants, or the name of an exception."""


@dataclass(slots=True)
class Failure:
    """Moves that lead to a violation, or to an exception that leaves the core; the same as a scenario.

    reproduced: whether the scenario fails in the same way.
    """

    moves: list[Move]
    why: list[str]
    shrunk_from: int
    scenario: str = ""
    reproduced: bool = False


def kinds_of(why: list[str]) -> Kinds:
    """Of what is wrong, what does not depend on the circumstances."""
    return frozenset(line.split(" (")[0] if line.startswith("invariant") else line.split(" ")[0] for line in why)


def shrink(moves: list[Move], fails: Callable[[list[Move]], bool]) -> list[Move]:
    """Leave out what is not needed to fail, in ever smaller pieces."""
    runs, size = 0, max(len(moves) // 2, 1)
    while size and runs < SHRINK_RUNS:
        at, changed = 0, False
        while at < len(moves) and runs < SHRINK_RUNS:
            shorter = moves[:at] + moves[at + size :]
            runs += 1
            if fails(shorter):
                moves, changed = shorter, True
            else:
                at += size
        size = size if changed and size == 1 else size // 2
    return moves


def failing(text: str) -> Kinds:
    """What is wrong when a scenario is run, as `kinds_of` says it; nothing if all is well."""
    try:
        scenario = load_scenario(text, "fuzz")
    except DocumentError:
        return frozenset()
    kinds: set[str] = set()
    try:
        outcome = run_scenario(scenario)
        kinds |= {f"invariant {violation.invariant}" for violation in outcome.violations}
        kinds |= {"invariant 2"} if outcome.left else set()
    except* LOUD as group:
        kinds |= set(_names(group))
    return frozenset(kinds)


def _names(error: BaseException) -> Iterator[str]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _names(each)
    else:
        yield type(error).__name__


def make_short(story: Story, kinds: Kinds) -> bool:
    """Leave out steps without which a story fails as well; False if it does not fail in one of these ways."""
    if not failing(story.text()) & kinds:
        return False
    runs = STORY_RUNS
    for steps in story.sequences:
        size = max(len(steps) // 2, 1)
        while size:
            at = len(steps) - size
            while at > -size and runs:
                start = max(at, 0)
                taken = steps[start : at + size]
                del steps[start : at + size]
                runs -= 1
                if not any(story.sequences) or not failing(story.text()) & kinds:
                    steps[start:start] = taken
                at -= size
            size //= 2
    return True
