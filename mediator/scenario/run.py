"""Run a scenario: in virtual time, everything random from the seed, all invariants on.

The same seed makes the same run on any machine; another seed makes another interleaving. See
`mediator.interleaving` for the order of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, ClassVar, Final
from uuid import UUID

import trio

from guests import GuestError, RpmbDevice
from hv_models.conduit import ConduitClosed
from hv_models.machine import Machine
from hv_models.stage2 import Stage2Fault
from hv_models.vm import VirtualMachine
from mediator.board import NOTHING_LEFT, Board, BoardError, images
from mediator.core.ledger import OverLimit
from mediator.core.policy import PolicyLimits
from mediator.core.steps import Event
from mediator.costs import Costs
from mediator.documents import DocumentError
from mediator.interleaving import run as run_seeded
from mediator.invariants import Violation
from mediator.policies import read_quota
from mediator.scenario.actor import WORLD, Actor, Scope
from mediator.scenario.expressions import EvaluationError
from mediator.scenario.flips import FlippingMemory
from mediator.scenario.flow import MAX_TURNS, Flow, side_by_side
from mediator.scenario.guest import GuestDied, ScenarioGuest
from mediator.scenario.language import EVERY, Scenario
from mediator.scenario.secure_side import PatientWorld, ScriptedWorld, SecureSide
from mediator.scenario.steps import Step, StepFailed
from mediator.scenario.witness import Witness
from mediator.service.recording import Recordings
from mediator.shell import GuestMemoryCount
from optee.secure_world import SecureWorld
from optee.tas.catalogue import EXAMPLES, EXERCISES

_UNDER_WAY: Final = 8
"""Steps that a report of a hang names."""


@dataclass
class Outcome:
    """How one run ended."""

    scenario: Scenario
    seed: int
    guests: int
    failure: StepFailed | None = None
    events: list[str] = field(default_factory=list)
    """Of a failure: what last happened to the guest."""
    violations: list[Violation] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    """What was still held after the last guest's end, as far as it is not zero."""
    seconds: float = 0.0
    """Virtual time."""
    steps: int = 0
    smcs: int = 0
    bursts: list[dict[str, Any]] = field(default_factory=list)
    """What became of each burst of calls."""

    @property
    def good(self) -> bool:
        """Whether everything was as expected, no invariant violated, and nothing left."""
        return self.failure is None and not self.violations and not self.left

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        failure = self.failure
        return {
            "scenario": self.scenario.scenario,
            "purpose": self.scenario.purpose,
            "seed": self.seed,
            "guests": self.guests,
            "good": self.good,
            "virtual_seconds": round(self.seconds, 6),
            "steps": self.steps,
            "smcs": self.smcs,
            "bursts": self.bursts,
            "failure": None
            if failure is None
            else {
                "at": failure.place,
                "step": failure.step,
                "guest": failure.guest,
                "what": failure.what,
                "expected": failure.expected,
                "got": failure.got,
                "events": self.events,
            },
            "violations": [violation.as_data() for violation in self.violations],
            "left": self.left,
        }


class Run:
    """One run of a scenario, inside trio."""

    guest_kind: ClassVar[type[ScenarioGuest]] = ScenarioGuest

    def __init__(self, scenario: Scenario, seed: int, guests: int | None, record: Path | None = None) -> None:
        self.scenario = scenario
        self.seed = seed
        self.witness: Witness | None = None
        """Who looks on, if anybody does."""
        self._record = record
        self.recordings: Recordings | None = None
        specs = scenario.machine.specs(guests)
        self.images = _images()
        self.rpmb = RpmbDevice()
        self.by_client: dict[int, ScenarioGuest] = {}
        self.began = 0.0
        self.steps = 0
        self.turns = 0
        self.bursts: list[dict[str, Any]] = []
        """What became of each burst of calls, in the order in which they ended."""
        self.guests = {
            name: self.guest_kind(self, name, number, spec) for number, (name, spec) in enumerate(specs.items(), 1)
        }
        self._world: ScriptedWorld | None = None
        self._board: Board | None = None
        self._nursery: trio.Nursery | None = None
        self._died: str | None = None
        self._given_up: StepFailed | None = None
        self._play_scope = trio.CancelScope()
        self._interrupted: list[tuple[float, Step, str | None]] = []
        """Steps that did not end by themselves: when, and whose."""

    @property
    def board(self) -> Board:
        """The machine."""
        assert self._board is not None
        return self._board

    @property
    def world(self) -> SecureSide:
        """What stands before OP-TEE's model."""
        return self.host.side

    @property
    def host(self) -> ScriptedWorld:
        """The same as the mediator sees it, with memory for it that fails on demand."""
        assert self._world is not None
        return self._world

    @property
    def model(self) -> SecureWorld:
        """OP-TEE."""
        return self.board.model

    @property
    def nursery(self) -> trio.Nursery:
        """Where guests live."""
        assert self._nursery is not None
        return self._nursery

    def guest(self, name: str) -> ScenarioGuest:
        """A guest by name. Raises EvaluationError."""
        if name not in self.guests:
            raise EvaluationError(f"there is no guest {name}")
        return self.guests[name]

    async def play(self) -> Outcome:
        """Do all of it."""
        outcome = Outcome(self.scenario, self.seed, len(self.guests))
        self.began = trio.current_time()
        async with self._make_board() as board:
            with self._recording(board):
                await self._judge(board, outcome)
        outcome.violations = self._violations()
        return self._counted(outcome)

    def _counted(self, outcome: Outcome) -> Outcome:
        outcome.seconds = trio.current_time() - self.began
        outcome.steps, outcome.bursts = self.steps, self.bursts
        outcome.smcs = sum(guest.smcs for guest in self.guests.values())
        return outcome

    def _recording(self, board: Board) -> AbstractContextManager[object]:
        if self._record is None:
            return nullcontext()
        self.recordings = Recordings(
            board, self._record, f"scenario {self.scenario.scenario}", alone=len(self.guests) == 1
        )
        return self.recordings

    async def _judge(self, board: Board, outcome: Outcome) -> None:
        """Play, and say how it ended."""
        finished = False
        try:
            with trio.fail_after(self.scenario.timeout) as self._play_scope:
                await self._play()
            finished = True
        except* (StepFailed, trio.TooSlowError) as group:
            finished = True
            outcome.failure = self._given_up or self._failure(group)
            outcome.events = list(self.guests[outcome.failure.guest].events) if outcome.failure.guest else []
            if self._violations():  # a core that has gone wrong may fail to end its guests, and that is no news
                board.machine.close()
        else:
            outcome.left = {name: count for name, count in board.left().items() if count != NOTHING_LEFT[name]}
            if board.model.leaks:
                outcome.left["optee_memory"] = sum(leak.size for leak in board.model.leaks)
        finally:
            if not finished:  # a bug of ours: what the mediator is in the middle of will not end by itself
                board.machine.close()
        if self._died is not None:
            outcome.failure = StepFailed("OP-TEE", "alive", f"dead: {self._died}")

    def _make_board(self) -> Board:
        machine = self.scenario.machine
        config = machine.optee.config(len(self.guests), self.seed)
        self._board = board = Board(
            machine.load_policy(),
            config,
            world=self._make_world,
            threads_held=self._threads_held if self.scenario.scripts_the_secure_world() else None,
            on_event=self._told,
            costs=Costs() if machine.costs else None,
        )
        board.service.memory_of = self._make_memory
        board.service.on_fault = self._note_fault
        draw = Random(f"{self.seed} interrupts")
        if machine.interrupts:
            board.model.interrupt_pending = lambda _: draw.random() < machine.interrupts
        board.model.clock = lambda: round((trio.current_time() - self.began) * 1000)
        return board

    def _threads_held(self, client: int) -> int:
        return self.world.threads_held(client)

    def _note_fault(self, why: str) -> None:
        self._died = why

    def _make_world(self, machine: Machine, model: SecureWorld) -> ScriptedWorld:
        kind = PatientWorld if self.scenario.answers_take_time else ScriptedWorld
        self._world = kind(machine, model, self.witness)
        return self._world

    def _make_memory(self, vm: VirtualMachine) -> GuestMemoryCount:
        guest = self.guests[vm.name]
        guest.memory = FlippingMemory(vm)
        return guest.memory

    def _told(self, event: Event) -> None:
        guest = self.by_client.get(event.vm)
        if guest is not None:
            guest.told(event)

    async def _play(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            present = [guest for guest in self.guests.values() if guest.spec.created]
            for guest in present:
                await self.create(guest)
            async with trio.open_nursery() as boots:
                for guest in present:
                    boots.start_soon(guest.boot, nursery)
            scopes = {name: Scope() for name in (WORLD, *self.guests)}
            only = self.scenario.only_guest
            actor = Actor(self, scopes, None if only is None else self.guests[only])
            await self._do_all(actor)
            self._look_at_all()
            async with trio.open_nursery() as ends:
                for guest in self.guests.values():
                    ends.start_soon(guest.shut_down)

    async def _do_all(self, actor: Actor) -> None:
        """Do the steps of the scenario. A guest's death ends its branch, but must not end the whole unnoticed."""
        steps = self.scenario.steps
        for number, step in enumerate(steps, 1):
            living = {name for name, guest in self.guests.items() if guest.alive}
            try:
                await self.do(step, actor)
            except GuestDied as died:
                if number == len(steps) and str(died) in living:
                    return
                self.abort()
                failed = StepFailed("this step and those after it", "done", f"{died} is dead, which ends the sequence")
                failed.place, failed.step, failed.guest = step.place, step.words(), str(died)
                raise failed from None

    def take_turns(self, count: int) -> int:
        """A loop is about to have so many turns. Raises EvaluationError where all loops together have too many."""
        self.turns += count
        if self.turns > MAX_TURNS:
            raise EvaluationError(f"more than {MAX_TURNS} turns of all loops together")
        return count

    async def create(self, guest: ScenarioGuest) -> None:
        """Make a guest's VM. Raises StepFailed if there is no room for it, at OP-TEE or in the pool."""
        try:
            await guest.create()
        except (BoardError, OverLimit) as error:
            failed = StepFailed("its VM", "created", str(error))
            failed.place, failed.step, failed.guest = self.scenario.machine.place, "machine", guest.name
            raise failed from None

    async def do(self, step: Step, actor: Actor) -> None:
        """Do a step as whoever it names. Raises StepFailed, GuestDied."""
        if step.guest == EVERY:
            branches = [(actor.of(name).branch(), [step.model_copy(update={"guest": name})]) for name in self.guests]
            await side_by_side(branches, actor)
            return
        actor = actor.of(step.guest)
        try:
            if isinstance(step, Flow) or actor.guest_name is None or not step.needs_guest:
                await self._do(step, actor)
                return
            scope = actor.guest.enter_step()
            try:
                with scope:
                    await self._do(step, actor)
            finally:
                actor.guest.leave_step(scope)
            if scope.cancelled_caught:
                raise GuestDied(actor.guest.name)
        except StepFailed as failed:
            if not failed.place:
                failed.place, failed.step, failed.guest = step.place, step.words(), actor.guest_name
            raise

    async def _do(self, step: Step, actor: Actor) -> None:
        self.steps += 1
        failed = True
        try:
            with _Blaming(self._check_invariants):
                await step.run(actor)
            failed = False
        except GuestDied:
            failed = False
            raise
        except ConduitClosed:
            failed = False
            raise GuestDied(actor.guest_name) from None
        except EvaluationError as error:
            raise StepFailed("this step", "names and numbers that fit", str(error)) from None
        except (GuestError, Stage2Fault, ValueError) as error:
            if actor.guest_name is not None and not actor.guest.alive:
                failed = False
                raise GuestDied(actor.guest_name) from None
            raise StepFailed("this step", "no error", f"{type(error).__name__}: {error}") from None
        except trio.Cancelled:
            failed = False
            if not isinstance(step, Flow):
                self._interrupted.append((trio.current_time(), step, actor.guest_name))
            raise
        finally:
            if failed:
                self.abort()

    def _look_at_all(self) -> None:
        """The steps are done: let the checker look at everything once."""
        if self.board.checker is not None:
            self.board.checker.scan(memory=True)

    def _check_invariants(self) -> None:
        """A violation is noticed at the step after which it is there. Raises StepFailed."""
        for violation in self._violations():
            raise StepFailed(f"invariant {violation.invariant}", violation.expected, violation.got)

    def _violations(self) -> list[Violation]:
        """Invariants that were violated although the scenario does not say so."""
        assert self.board.checker is not None
        allowed = self.scenario.violations
        return [one for one in self.board.checker.violations if one.invariant not in allowed]

    def give_up(self, failure: StepFailed) -> None:
        """End the run with a failure that was noticed where no step can raise it."""
        self._given_up = self._given_up or failure
        self._play_scope.cancel()
        self.abort()

    def abort(self) -> None:
        """The run has failed: no wait in a guest's kernel may hold up its end."""
        for guest in self.guests.values():
            if guest.driver is not None:
                guest.driver.uninterruptible.lift()

    def limit(self, guest: ScenarioGuest) -> None:
        """Give a new guest the quotas that its description says. Raises OverLimit."""
        self._change(guest, guest.spec.limits(self.board.core.policy, guest.name), self.board.core.pool.capacity)

    def set_limits(self, guest: ScenarioGuest, given: Mapping[str, int]) -> None:
        """Change what a guest may hold, and the host's pool (R21, R22). Raises OverLimit, ValueError."""
        core, client = self.board.core, guest.vm.client_id
        quotas = dict(given)
        pool = quotas.pop("pool_pages", core.pool.capacity)
        try:
            limits = read_quota(quotas).apply(core.guests[client].limits)
        except DocumentError as error:
            raise ValueError("; ".join(error.lines)) from None
        self._change(guest, limits, pool)

    def _change(self, guest: ScenarioGuest, limits: PolicyLimits, pool: int | None) -> None:
        for event in self.board.core.change_limits({guest.vm.client_id: limits}, pool):
            self._told(event)

    def _failure(self, group: BaseExceptionGroup[Exception]) -> StepFailed:
        """The first failure of a group; a hang is one as well, of the first step that still waits."""
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if isinstance(first, StepFailed):
            return first
        now = trio.current_time()
        waiting = [(step, guest) for time, step, guest in self._interrupted if time == now][:_UNDER_WAY]
        words = [f"{step.place}: {step.words()}{f' of {guest}' if guest else ''}" for step, guest in waiting]
        got = "still waiting: " + "; ".join(words) if words else "still waiting for guests to end"
        failed = StepFailed("the scenario", f"an end within {self.scenario.timeout:g} s of virtual time", got)
        failed.place, failed.step = self.scenario.timeout_place, "timeout"
        if waiting:
            step, failed.guest = waiting[0]
            failed.place, failed.step = step.place, step.words()
        return failed


class _Blaming:
    """Looks at the invariants after a step; what is raised inside of it by a core that has broken one is no news."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, Exception) and not isinstance(error, StepFailed | GuestDied)):
            self._check()


@cache
def _images() -> Mapping[UUID, bytes]:
    """Images of all user TAs that the model knows."""
    return images(*EXAMPLES, *EXERCISES)


def run_scenario(scenario: Scenario, seed: int = 1, guests: int | None = None, record: Path | None = None) -> Outcome:
    """Run a scenario once. guests: how many, where it is written for any number. record: where to write a trace.

    With several guests each has a trace of its own, see `mediator.service.recording`. Raises DocumentError where a
    trace cannot be written.
    """
    return run_seeded(Run(scenario, seed, guests, record).play, seed)
