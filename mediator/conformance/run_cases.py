"""Run conformance cases in this process, and say how each ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mediator.conformance.journal import Journal
from mediator.interleaving import run as run_seeded
from mediator.scenario.language import Scenario
from mediator.scenario.run import Outcome, Run


@dataclass
class Verdict:
    """How a case ended: with an outcome, or skipped with a reason."""

    case: Scenario
    outcome: Outcome | None = None
    skipped: str | None = None
    shown: set[str] = field(default_factory=set)
    """Items of the ABI that were seen at either end."""

    @property
    def passed(self) -> bool:
        """Whether it was run, and everything was as expected."""
        return self.outcome is not None and self.outcome.good

    @property
    def word(self) -> str:
        """For tables and JSON."""
        return "skipped" if self.outcome is None else "passed" if self.outcome.good else "failed"

    @property
    def why(self) -> str:
        """Why it failed or was skipped, in one line; empty if it passed."""
        if self.outcome is None:
            return self.skipped or ""
        failure = self.outcome.failure
        if failure is not None:
            where = f"{failure.place}: {failure.step}: " if failure.place else ""
            return f"{where}{failure.what}: expected {failure.expected}, got {failure.got}"
        left = [f"left behind: {count} {name}" for name, count in self.outcome.left.items()]
        return "; ".join([*map(str, self.outcome.violations), *left])

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": self.case.scenario,
            "purpose": self.case.purpose,
            "source": self.case.source,
            "rules": self.case.rules,
            "needs": self.case.needs,
            "verdict": self.word,
            "why": self.why,
            "smcs": 0 if self.outcome is None else self.outcome.smcs,
        }


def run_case(case: Scenario, journal: Journal | None = None) -> Verdict:
    """Run one case in this process, with the mediator of this project, in virtual time."""
    journal = journal or Journal()
    run = Run(case, 1, None)
    run.witness = journal
    outcome = run_seeded(run.play, 1)
    return Verdict(case, outcome, shown=journal.shown)


def run_cases(cases: Sequence[Scenario], progress: Callable[[int], None] = lambda done: None) -> list[Verdict]:
    """Run cases one after the other. progress: told how many are done."""
    verdicts = []
    for done, case in enumerate(cases):
        progress(done)
        verdicts.append(run_case(case))
    return verdicts
