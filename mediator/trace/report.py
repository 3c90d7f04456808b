"""What a replay found."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mediator.invariants import Violation


@dataclass(slots=True)
class ReplayReport:
    """Counts of one replay; `expected` counts differences that the policy intends, by kind."""

    events: int = 0
    calls: int = 0
    forwarded: int = 0
    returned: int = 0
    expected: Counter[str] = field(default_factory=Counter)
    unexpected: int = 0
    first_unexpected: dict[str, Any] | None = None
    peak_pages_pinned: int = 0
    left: dict[str, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing was unexpected and no invariant was violated."""
        return not self.unexpected and not self.violations

    def as_data(self) -> dict[str, Any]:
        """The JSON document of `mediator replay`."""
        return {
            "format": "mediator-replay/1",
            "events": self.events,
            "calls": self.calls,
            "forwarded": self.forwarded,
            "returned": self.returned,
            "expected": dict(sorted(self.expected.items())),
            "unexpected": self.unexpected,
            "first_unexpected": self.first_unexpected,
            "peak_pages_pinned": self.peak_pages_pinned,
            "left": self.left,
            "violations": [violation.as_data() for violation in self.violations],
        }
