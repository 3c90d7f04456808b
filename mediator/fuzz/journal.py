"""What happened in a run, one thing after the other: enough to tell it again as a scenario."""

from dataclasses import dataclass, field

from hv_models.stage2 import PageKind
from mediator.core.steps import Forward, Preempt, Queue, Regs, Step, Ticket

Writes = list[tuple[str, int, bytes]]
"""What OP-TEE writes before it answers: into the call's "message" or "argument", at which offset, which bytes."""


@dataclass(slots=True)
class Wrote:
    """A guest writes its RAM."""

    vm: str
    at: int
    data: bytes


@dataclass(slots=True)
class Answer:
    """OP-TEE answers a call of this function; `moment` counts what has happened so far."""

    moment: int
    function: int
    regs: Regs
    writes: Writes


@dataclass(slots=True)
class Called:
    """A guest executes an SMC."""

    vm: str
    moment: int
    regs: Regs
    answers: list[Answer] = field(default_factory=list)


@dataclass(slots=True)
class Changed:
    """A host changes an entry of a guest's stage-2 table."""

    vm: str
    ipa: int
    kind: PageKind


@dataclass(slots=True)
class Asked:
    """A host asks the mediator for something, by the name of the scenario's step. refused: OP-TEE says no."""

    vm: str
    what: str
    refused: bool


Happening = Wrote | Called | Changed | Asked


class Journal:
    """Told by an `Arena` what happens; `happenings` has each with its moment."""

    def __init__(self) -> None:
        self.happenings: list[tuple[int, Happening]] = []
        self._moment = 0
        self._calls: dict[Ticket, Called] = {}
        self._with_optee: dict[Ticket, int] = {}

    def close(self) -> None:
        """Nothing more happens: what OP-TEE still has is answered after all the rest."""
        for ticket, function in reversed(self._with_optee.items()):
            self._calls[ticket].answers.append(Answer(self._tick(), function, (0, 0, 0, 0), []))
        self._with_optee.clear()

    def _note(self, what: Happening) -> None:
        self.happenings.append((self._tick(), what))

    def _tick(self) -> int:
        self._moment += 1
        return self._moment

    def wrote(self, vm: str, at: int, data: bytes) -> None:
        """A guest writes its RAM."""
        self._note(Wrote(vm, at, data))

    def changed(self, vm: str, ipa: int, kind: PageKind) -> None:
        """A host changes a page's type."""
        self._note(Changed(vm, ipa, kind))

    def asked(self, vm: str, what: str, *, refused: bool = False) -> None:
        """A host asks for something."""
        self._note(Asked(vm, what, refused))

    def called(self, vm: str, regs: Regs, step: Step) -> None:
        """A guest executed an SMC, and the core said what to do."""
        call = Called(vm, self._moment + 1, regs)
        self._note(call)
        self._goes_on(call, step)

    def answered(self, step: Forward, answer: Regs, writes: Writes) -> None:
        """OP-TEE answers."""
        call = self._calls.get(step.ticket)
        if call is not None:
            del self._with_optee[step.ticket]
            call.answers.append(Answer(self._tick(), step.regs[0], answer, writes))

    def went_on(self, ticket: Ticket, then: Step) -> None:
        """What the core said then."""
        call = self._calls.pop(ticket, None)
        if call is not None:
            self._goes_on(call, then)

    def _goes_on(self, call: Called, step: Step) -> None:
        if isinstance(step, Forward | Preempt | Queue) and step.ticket is not None:
            self._calls[step.ticket] = call
        if isinstance(step, Forward):
            self._with_optee[step.ticket] = step.regs[0]
