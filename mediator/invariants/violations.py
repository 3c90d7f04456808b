"""What the invariants say, and what it is to violate one."""

from dataclasses import dataclass
from typing import Any, Final

TITLES: Final = {
    1: "pins of a page = live objects that contain it",
    2: "pages of live objects = ledger; all zero after the guest is gone",
    3: "live calls of a guest = OP-TEE threads that it holds",
    4: "no host address is visible to a guest; no forwarded address is outside pinned or own pages",
    5: "one live object per guest, name space and cookie",
    6: "every request got exactly one final answer",
    7: "states move only along table edges",
    8: "guest bytes are read once per stage, and written only where outputs are",
    9: "OP-TEE sees only allowed functions, with a7 = the caller's id",
    10: "work of a request is bounded by its pages",
    11: "no error event was caused by a guest",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One violation: which invariant, whose, at which step, what was expected and what was found."""

    invariant: int
    guest: int | None
    step: int
    expected: str
    got: str

    def __str__(self) -> str:
        whose = "" if self.guest is None else f" guest {self.guest},"
        return (
            f"invariant {self.invariant} ({TITLES[self.invariant]}):{whose} step {self.step}: "
            f"expected {self.expected}, got {self.got}"
        )

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "invariant": self.invariant,
            "title": TITLES[self.invariant],
            "guest": self.guest,
            "step": self.step,
            "expected": self.expected,
            "got": self.got,
        }
