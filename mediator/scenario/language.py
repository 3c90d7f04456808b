"""The scenario language: a document that says which machine there is, and what its guests do on it.

`docs/reference/scenario.md` explains every key. The steps of each level are models of their own, in `client`,
`driver`, `world` and `flow`: a new step is a class in one of them and an entry in its `STEPS`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Self

from pydantic import Field, GetCoreSchemaHandler, PrivateAttr, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from mediator.documents import Data, DocumentError, Path, Places, SchemaError, load_located
from mediator.invariants import TITLES
from mediator.scenario import client, driver, flow, load, storage, world
from mediator.scenario.expressions import Expression, Seconds
from mediator.scenario.machine import Machine
from mediator.scenario.memory import MapsTo
from mediator.scenario.steps import Step, Strict

EVERY: Final = "every"
"""The name that stands for each guest of the machine."""
STEPS: Final[tuple[type[Step], ...]] = (
    *client.STEPS,
    *load.STEPS,
    *driver.STEPS,
    *world.STEPS,
    *storage.STEPS,
    *flow.STEPS,
)
VERBS: Final[Mapping[str, type[Step]]] = {step.verb: step for step in STEPS}
_RESERVED: Final = frozenset({"guest", EVERY})


_STEP_LISTS: Final = frozenset({"steps", "sequence", "parallel", "do", "cut_power"})
"""Keys that hold steps."""
_ALSO_KEYS: Final = frozenset({"expect", "pages"})
"""Verbs that other steps have as a key."""


def _tag(verb: str) -> str:
    return f"<{verb}>"


def _verb(given: Any) -> str | None:
    """The key that says which step a mapping is; a step may have `expect` beside it."""
    verbs = [key for key in given if key in VERBS]
    if len(verbs) > 1:
        verbs = [verb for verb in verbs if verb not in _ALSO_KEYS]
    return _tag(verbs[0]) if len(verbs) == 1 else None


class _AnyStep:
    """Tells pydantic which model a step is, by its verb."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A union of all steps, told apart by their verbs."""
        choices: dict[Hashable, CoreSchema] = {_tag(step.verb): handler.generate_schema(step) for step in STEPS}
        union = core_schema.tagged_union_schema(choices, discriminator=_verb)
        return core_schema.no_info_before_validator_function(_one_verb, union)


def _one_verb(given: object) -> object:
    if not isinstance(given, dict):
        raise ValueError("a step is a mapping, such as {open: hello_world}")
    if _verb(given) is None:
        verbs = [key for key in given if key in VERBS]
        found = " and ".join(verbs) or ", ".join(key for key in given if key != "guest") or "nothing"
        raise ValueError(f"a step has one of the keys {', '.join(VERBS)}; here is {found}")
    return given


AnyStep = Annotated[Step, _AnyStep()]
for _step in (*flow.STEPS, *storage.STEPS):
    _step.model_rebuild(_types_namespace={"AnyStep": AnyStep})


class Scenario(Strict):
    """A scenario as it stands in a file."""

    scenario: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
    """Its id: lower-case words with hyphens."""
    purpose: Annotated[str, Field(min_length=1, max_length=300)]
    quick: bool = False
    """Whether it is one of those that are run often, with many seeds."""
    rules: list[Annotated[str, Field(pattern=r"^R([1-9]|1[0-9]|2[0-9])$")]] = Field(default=[])
    """Rules of the mediator that it shows."""
    classes: list[Annotated[str, Field(pattern=r"^B([1-9]|1[0-5])$")]] = Field(default=[])
    """Classes of mistakes that it would find."""
    source: str | None = None
    """What of the ABI, or of which description, it comes from."""
    needs: list[str] = Field(default=[])
    """What a mediator that is tested from outside must offer for it."""
    timeout: Seconds = 3600.0
    """Virtual seconds after which it hangs."""
    violations: list[Annotated[int, Field(ge=1, le=len(TITLES))]] = Field(default=[])
    """Invariants that may be violated, for a secure world that breaks its contract. Normally none."""
    machine: Machine = Machine()
    steps: Annotated[list[AnyStep], Field(min_length=1)]

    _timeout_place: str = PrivateAttr(default="")

    @property
    def timeout_place(self) -> str:
        """file:line of `timeout`, or where that is not said, of the scenario."""
        return self._timeout_place

    @model_validator(mode="after")
    def _timed_once(self) -> Self:
        if self.machine.costs and self.answers_take_time:
            raise ValueError("takes: with costs the table says what takes how long")
        return self

    @property
    def parametrised(self) -> bool:
        """Whether it is written for any number of guests."""
        return isinstance(self.machine.guests, int) and "guests" in self.machine.model_fields_set

    @property
    def only_guest(self) -> str | None:
        """The guest whose the steps are that do not say it; None where there are several."""
        specs = self.machine.specs(None)
        return next(iter(specs)) if len(specs) == 1 and not self.parametrised else None

    @property
    def answers_take_time(self) -> bool:
        """Whether some scripted answer does."""
        scripts = (step for step in all_steps(self.steps) if isinstance(step, world.SecureWorld))
        return any(answer.takes for step in scripts for answer in step.answers)

    def scripts_the_secure_world(self) -> bool:
        """Whether some answers are not OP-TEE's own."""
        return any(isinstance(step, world.SecureWorld) for step in all_steps(self.steps))


def all_steps(steps: Sequence[Step]) -> Iterator[Step]:
    """Steps and the steps inside them."""
    for step in steps:
        yield step
        for name in type(step).model_fields:
            value = getattr(step, name)
            if isinstance(value, list) and value and isinstance(value[0], Step):
                yield from all_steps(value)


def load_scenario(text: str, name: str) -> Scenario:
    """Read a scenario.

    Raises:
        DocumentError: with file:line:column for each thing that is wrong.

    """
    try:
        scenario, places = load_located(Scenario, text, name)
    except SchemaError as error:
        raise DocumentError([*error.lines, *_errors_of_the_rest(error)]) from None
    scenario.stand_at(name)
    scenario._timeout_place = places.line(("timeout",))
    errors = list(_Check(scenario, places).errors())
    if errors:
        raise DocumentError(errors)
    return scenario


def _errors_of_the_rest(error: SchemaError) -> list[str]:
    """What refers to nothing in a file some steps of which are wrong already: so that all is said at once."""
    rest = _without(error.data, error.wrong)
    try:
        scenario = Scenario.model_validate(rest)
    except ValidationError:
        return []
    return list(_Check(scenario, error.places).errors(whole=False))


def _without(data: Data, wrong: Sequence[Path]) -> Data:
    """The scenario with nothing in the place of each step that is wrong."""
    if not isinstance(data, dict):
        return None
    rest: Data = data
    for path in wrong:
        at = _innermost_step(path)
        rest = _replaced(rest, at or path[:1], {"sequence": []} if at else None)
    return {**rest, "scenario": "x", "purpose": "x"} if isinstance(rest, dict) else None


def _innermost_step(path: Path) -> Path:
    """Where in a document's path its innermost step stands; nothing if it is in none."""
    ends = [end for end in range(2, len(path) + 1) if isinstance(path[end - 1], int) and path[end - 2] in _STEP_LISTS]
    return path[: ends[-1]] if ends else ()


def _replaced(data: Data, path: Path, new: Data) -> Data:
    """The same with something else in one place: a mapping has no such key then, if that is None."""
    if not path:
        return new
    if isinstance(data, dict) and path[0] in data:
        key = str(path[0])
        if len(path) == 1 and new is None:
            return {name: value for name, value in data.items() if name != key}
        return {**data, key: _replaced(data[key], path[1:], new)}
    if isinstance(data, list) and isinstance(path[0], int) and path[0] < len(data):
        return [_replaced(item, path[1:], new) if index == path[0] else item for index, item in enumerate(data)]
    return data


class _Check:
    """What a schema cannot say: guests and names that steps refer to exist. Tells each piece where it stands."""

    def __init__(self, scenario: Scenario, places: Places) -> None:
        self._scenario = scenario
        self._places = places
        self._specs = scenario.machine.specs(None)
        self._parametrised = scenario.parametrised
        self._defined: set[str] = set()
        self._references: list[tuple[Path, tuple[str, ...]]] = []
        self._errors: list[str] = []

    def errors(self, *, whole: bool = True) -> Iterator[str]:
        """One line for each thing that is wrong; names may be defined by what is missing, where it is not `whole`."""
        self._scenario.machine.stand_at(self._places.line(("machine",)))
        for name in self._specs:
            if name in _RESERVED:
                yield self._places.error(("machine", "guests", name), f"{name!r} is no name for a guest")
        yield from self._machine()
        self._steps(self._scenario.steps, ("steps",), self._scenario.only_guest or "")
        yield from self._errors
        for path, reference in self._references if whole else ():
            if reference[0] not in self._defined and reference[0] not in {*self._specs, "guest"}:
                yield self._places.error(path, f"${reference[0]} is defined nowhere")

    def _machine(self) -> Iterator[str]:
        """What the machine's description refers to, and what only fits together with the policy."""
        machine = self._scenario.machine
        if machine.rpmb_owner is not None and machine.rpmb_owner not in self._specs:
            names = ", ".join(self._specs)
            yield self._places.error(
                ("machine", "rpmb_owner"), f"{machine.rpmb_owner!r} is no guest of this machine: {names}"
            )
        try:
            policy = machine.load_policy()
        except DocumentError as error:
            for line in error.lines:
                yield self._places.error(("machine", "policy"), line)
            return
        for name, spec in self._specs.items():
            try:
                spec.limits(policy, name)
            except ValueError as error:
                own = isinstance(machine.guests, dict) and machine.guests[name] is not None
                path = ("machine", "guests", name, "quotas") if own else ("machine", "each", "quotas")
                yield self._places.error(path, f"quotas of {name}: {error}")
                if not own:
                    return

    def _steps(self, steps: list[Step], path: Path, guest: str, turns: int = 1) -> None:
        for index, step in enumerate(steps):
            self._step(step, (*path, index), guest, turns)

    def _step(self, step: Step, path: Path, guest: str, turns: int) -> None:
        """`turns`: how often the loops around it have it done."""
        step.stand_at(self._places.line(path))
        if isinstance(step, flow.Flow):
            around, turns = turns, turns * step.turns()
            if turns > flow.MAX_TURNS >= around:
                what = f"{turns} turns of the loops that hold each other, where {flow.MAX_TURNS} are possible"
                self._errors.append(self._places.error((*path, step.verb), f"{step.verb}: {what}"))
        if step.guest is not None:
            self._known(step.guest, (*path, "guest"), every=True)
            guest = step.guest
        if isinstance(step, world.Stage2) and step.source is not None:
            self._known(step.source, (*path, "from"), every=False)
        if isinstance(step, world.OnGuest):
            self._known(getattr(step, step.verb), (*path, step.verb), every=False)
        elif step.needs_guest and not guest:
            self._errors.append(self._places.error(path, f"{step.verb}: whose step is it? guest is missing"))
        elif step.needs_driver and guest in self._specs and not self._specs[guest].has_driver:
            self._errors.append(self._places.error(path, f"{step.verb}: {guest} has no driver"))
        self._defined.update(step.definitions())
        for name, field in type(step).model_fields.items():
            value = getattr(step, name)
            place = (*path, field.alias or name)
            if isinstance(value, list) and value and isinstance(value[0], Step):
                self._steps(value, place, guest, turns)
            else:
                self._walk(value, place)

    def _known(self, guest: str, path: Path, *, every: bool) -> None:
        if guest in self._specs or (every and guest == EVERY):
            return
        names = ", ".join([*self._specs, EVERY] if every else self._specs)
        self._errors.append(self._places.error(path, f"{guest!r} is no guest of this machine: {names}"))

    def _walk(self, value: object, path: Path) -> None:
        if isinstance(value, Expression):
            self._references += [(path, reference) for reference in value.references]
        elif isinstance(value, Strict):
            value.stand_at(self._places.line(path))
            if isinstance(value, MapsTo) and value.guest is not None:
                self._known(value.guest, (*path, "guest"), every=False)
            for name, field in type(value).model_fields.items():
                self._walk(getattr(value, name), (*path, field.alias or name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._walk(item, (*path, index))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._walk(item, (*path, key))
        elif isinstance(value, str) and value.startswith("$"):
            self._references.append((path, tuple(value[1:].split("."))))
