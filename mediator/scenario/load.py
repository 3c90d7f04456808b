"""Steps that put load on a TA: many calls of many clients, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import Field

from guests import GuestError, TeeError
from guests.workloads.burst import Burst, Form, burst
from mediator.scenario.client import TaName, ta_uuid
from mediator.scenario.expressions import EvaluationError, Number, Record, Seconds, where_constant
from mediator.scenario.steps import Expected, Name, Step, StepFailed, Strict, check_number

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

MAX_CALLS: Final = 1_000_000
"""Calls of one burst: stops a file from running for ever."""
FormName = Literal["bare", "delay", "pool", "back-pressure"]


class BurstExpectation(Strict):
    """What became of a burst; the times are microseconds of virtual time."""

    answered: Expected | None = None
    """Calls that were answered; all of them if it is not said."""
    thread_limits: Expected | None = None
    """Answers ETHREAD_LIMIT to the driver."""
    p50_us: Expected | None = None
    p99_us: Expected | None = None
    per_second: Expected | None = None
    queue: Expected | None = None
    """The most that waited: in the clients or the driver; with back-pressure in the mediator."""
    ta_heap: Expected | None = None
    """Bytes that the heaps of the guest's TAs ever had in use together."""


def _calls(count: int) -> int:
    """A number of calls. Raises EvaluationError for what is none."""
    if not 1 <= count <= MAX_CALLS:
        raise EvaluationError(f"{count} calls, where 1 to {MAX_CALLS} are possible")
    return count


class BurstStep(Step):
    """Have 16 clients call command 0 of a TA, with a number; one more is the answer."""

    verb = "burst"
    needs_driver: ClassVar[bool] = True
    burst: FormName
    ta: TaName
    calls: Annotated[Number, where_constant(_calls)]
    within: Seconds = 0.0
    """Seconds over which the calls come evenly; 0: each client calls again as soon as it has its answer."""
    name: Annotated[Name, Field(alias="as")] = "burst"
    expect: BurstExpectation = BurstExpectation()

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest, calls = actor.guest, _calls(actor.number(self.calls))
        form = Form(self.burst)
        failed: list[BaseException] = []
        try:
            found = await burst(guest.booted, ta_uuid(self.ta), form, calls=calls, within=self.within)
        except* (GuestError, TeeError) as errors:
            failed += errors.exceptions
        if failed:
            raise StepFailed("burst", "an answer to each call", str(_innermost(failed[0])))
        board, client = actor.run.board, guest.vm.client_id
        queue = board.core.guests[client].lane.peak if form is Form.BACK_PRESSURE else found.queue
        numbers = _numbers(found) | {"queue": queue, "ta_heap": board.model.ta_heap_peak(client)}
        actor.define(self.name, Record("burst", None, numbers))
        what = {"guest": guest.name, "ta": self.ta, "calls": calls, "within": self.within, "form": self.burst}
        actor.run.bursts.append(what | numbers)
        if self.expect.answered is None and found.answered != calls:
            raise StepFailed("answered", str(calls), str(found.answered))
        for name, number in numbers.items():
            expected = getattr(self.expect, name)
            if expected is not None:
                check_number(name, expected, number, actor)


def _innermost(error: BaseException) -> BaseException:
    return _innermost(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _numbers(found: Burst) -> dict[str, int]:
    return {
        "answered": found.answered,
        "thread_limits": found.thread_limits,
        "p50_us": round(1e6 * found.took(0.5)),
        "p99_us": round(1e6 * found.took(0.99)),
        "per_second": round(found.rate),
    }


STEPS: Final = (BurstStep,)
