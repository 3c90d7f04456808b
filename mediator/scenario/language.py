"""The scenario language: a document that says which machine there is, and what its guests do on it.

`docs/reference/scenario.md` explains every key. The steps of each level are models of their own, in `client`,
`driver`, `world` and `flow`: a new step is a class in one of them and an entry in its `STEPS`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, GetCoreSchemaHandler, Tag, model_validator
from pydantic_core import CoreSchema, core_schema

from hv_models.machine import RAM_BASE, RamBlock
from mediator.documents import DocumentError, Path, Places, load_located
from mediator.invariants import TITLES
from mediator.policies import FlowDocument, PolicyDocument
from mediator.scenario import client, driver, flow, load, storage, world
from mediator.scenario.client import TaName, ta_uuid
from mediator.scenario.expressions import EvaluationError, Expression, Number, Seconds, Value
from mediator.scenario.guest import SUPPLICANTS
from mediator.scenario.steps import Name, Step, Strict
from optee.config import DEFAULT, Config
from optee.memory.boards import BOARDS
from optee.storage.options import StorageOptions
from optee.tas.catalogue import BUILT_IN
from optee.trusted_application import TrustedApplication

MAX_GUESTS: Final = 1000
"""VMs of one machine: stops a file from filling memory."""
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


class GuestSpec(Strict):
    """A guest: its VM, and what runs in it."""

    hypervisor: Literal["kvm", "xen", "mixed"] = "kvm"
    """mixed: KVM and Xen in turn."""
    ram: Number = Expression("32 MiB", {})
    ram_base: Number = Expression(RAM_BASE, {})
    """IPA at which RAM begins."""
    vcpus: Annotated[int, Field(ge=1, le=64)] = 2
    driver: Literal["linux", "none"] = "linux"
    """none: the guest makes raw SMCs only."""
    supplicant: Annotated[str, Field(json_schema_extra={"enum": list(SUPPLICANTS)})] = "usual"
    supplicant_delay: Seconds = 0.01
    """For `slow`: time that each request takes."""
    quotas: dict[world.QuotaName, Number] = Field(default={})
    created: bool = True
    """false: the step `create` makes it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.supplicant not in SUPPLICANTS:
            raise ValueError(f"supplicant: {self.supplicant!r} is none of {', '.join(SUPPLICANTS)}")
        if self.ram.references or self.ram_base.references:
            raise ValueError("ram: a size such as 32 MiB is wanted")
        base = self.ram_base.number(_NOTHING)
        if base % 4096 or base >= 1 << 39:
            raise ValueError("ram_base: a whole page below 512 GiB is wanted")
        size = self.ram.number(_NOTHING)
        if size % 4096 or not 64 << 10 <= size <= 16 << 30:
            raise ValueError("ram: whole pages, 64 KiB to 16 GiB")
        return self

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM."""
        return self.ram.number(_NOTHING)

    @property
    def ram_blocks(self) -> list[RamBlock]:
        """RAM as the machine is told."""
        return [RamBlock(self.ram_base.number(_NOTHING), self.ram_bytes)]

    @property
    def has_driver(self) -> bool:
        """Whether a Linux driver is booted."""
        return self.driver == "linux"

    def flavour(self, number: int) -> str:
        """Hypervisor of the guest with this number, counted from 1."""
        return ("xen", "kvm")[number % 2] if self.hypervisor == "mixed" else self.hypervisor

    def over(self, common: GuestSpec) -> GuestSpec:
        """What it says itself, and for the rest what is common to all guests."""
        return common.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


class _Nothing:
    """No names."""

    def look_up(self, name: str) -> Value:
        raise EvaluationError(f"${name} is not known here")


_NOTHING: Final = _Nothing()


class TaSizes(Strict):
    """Sizes of a TA; what is not given stays as it is."""

    stack: Number | None = None
    """TA_STACK_SIZE."""
    heap: Number | None = None
    """TA_DATA_SIZE."""
    code: Number | None = None
    """Code and constants."""

    def over(self, name: str) -> type[TrustedApplication]:
        """The TA of that name with these sizes."""
        uuid = ta_uuid(name)
        known = next((ta for ta in BUILT_IN if ta.uuid == uuid and not ta.is_pseudo), None)
        if known is None:
            raise EvaluationError(f"{name} is no user TA of the model")
        given = {"stack_size": self.stack, "data_size": self.heap, "code_size": self.code}
        sizes = {key: size.number(_NOTHING) for key, size in given.items() if size is not None}
        return type(known.__name__, (known,), sizes)


def _storage_options(options: dict[str, str | int]) -> dict[str, str | int]:
    StorageOptions.parse(options)
    return options


class OpteeSpec(Strict):
    """How OP-TEE is built, by its own options; see `optee.config.Config`."""

    threads: Annotated[int, Field(ge=1, le=256)] = DEFAULT.threads
    """CFG_NUM_THREADS, for each guest."""
    guests: Annotated[int, Field(ge=1, le=MAX_GUESTS)] | None = None
    """Guests for whom there is room; as many as the machine has if not given."""
    early_tas: list[TaName] | Literal["all"] = "all"
    """User TAs inside OP-TEE's image; the others come from each guest's tee-supplicant."""
    board: Literal["qemu_armv8a", "hikey", "hikey960", "rk3399", "rk322x"] | None = None
    """A board of `mediator size`, with its build; what stands here beside it goes first. None: a roomy one."""
    core_heap: Number | None = None
    """CFG_CORE_HEAP_SIZE."""
    rpmb: bool = False
    """CFG_RPMB_FS and CFG_RPMB_WRITE_KEY: a storage in RPMB."""
    anchor: bool = False
    """CFG_REE_FS_INTEGRITY_RPMB: the files of guests are anchored in RPMB."""
    guest_storage_keys: bool = False
    """Ours, not OP-TEE's: guests have storage keys of their own."""
    storage: Annotated[dict[str, str | int], AfterValidator(_storage_options)] = Field(default={})
    """Ours, not OP-TEE's: `memory: managed` and the sizes of the memory manager, see `optee.storage.options`."""
    secure_ram: Number | None = None
    """CFG_TZDRAM_SIZE."""
    preallocated_tables: bool | None = None
    """CFG_CORE_PREALLOC_EL0_TBLS."""
    sizes: dict[TaName, TaSizes] = Field(default={})
    """Other sizes for TAs of the model."""

    def config(self, guests: int, seed: int) -> Config:
        """The same as the model wants it, with room for so many guests."""
        config = Config(guests=guests, threads=self.threads, seed=seed, leak_report=True, listed_primes=True)
        if self.board is not None:
            config = config.built(BOARDS[self.board].build)
        more: dict[str, Any] = {
            "threads": self.threads if "threads" in self.model_fields_set else None,
            "guests": self.guests,
            "core_heap_size": self._bytes(self.core_heap),
            "tzdram_size": self._bytes(self.secure_ram),
            "preallocated_tables": self.preallocated_tables,
        }
        return replace(
            config,
            early_tas=None if self.early_tas == "all" else frozenset(map(ta_uuid, self.early_tas)),
            rpmb_fs=self.rpmb or self.anchor,
            rpmb_write_key=True,
            ree_fs_integrity_rpmb=self.anchor,
            guest_storage_keys=self.guest_storage_keys,
            storage=StorageOptions.parse(self.storage),
            extra_tas=tuple(sizes.over(name) for name, sizes in self.sizes.items()),
            **{name: value for name, value in more.items() if value is not None},
        )

    @staticmethod
    def _bytes(size: Number | None) -> int | None:
        return None if size is None else size.number(_NOTHING)


class Machine(Strict):
    """The machine: guests, policy, OP-TEE."""

    guests: Annotated[
        Annotated[int, Field(ge=1, le=MAX_GUESTS), Tag("<number>")]
        | Annotated[dict[Name, GuestSpec | None], Tag("<names>")],
        Discriminator(lambda given: "<names>" if isinstance(given, dict) else "<number>"),
    ] = 1
    """By name; or how many, which `--guests` may change: kvm-1, xen-2, ..."""
    each: GuestSpec = GuestSpec()
    """What is common to all guests."""
    policy: Annotated[
        Annotated[str, Tag("<name>")] | Annotated[PolicyDocument, Tag("<document>")],
        Discriminator(lambda given: "<document>" if isinstance(given, dict) else "<name>"),
    ] = "default"
    rpmb_owner: Name | None = None
    """The guest that the RPMB device belongs to, if not whom the policy says. Each VM has the one device."""
    flow: FlowDocument | None = None
    """Flow control, if it is not what the policy says."""
    costs: bool = False
    """Whether calls take virtual time, as the table of `mediator.costs` says; interrupts come by its tick then."""
    optee: OpteeSpec = OpteeSpec()
    interrupts: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Probability that an interrupt is pending at a moment at which secure code can be interrupted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.costs and self.interrupts:
            raise ValueError("interrupts: with costs they come by the table's tick")
        return self

    def specs(self, count: int | None) -> dict[str, GuestSpec]:
        """The guests by name. count: as many, where only their number is given."""
        if isinstance(self.guests, dict):
            return {name: self.each if spec is None else spec.over(self.each) for name, spec in self.guests.items()}
        numbers = range(1, (self.guests if count is None else count) + 1)
        return {f"{self.each.flavour(number)}-{number}": self.each for number in numbers}


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
    scenario, places = load_located(Scenario, text, name)
    scenario.stand_at(name)
    errors = list(_Check(scenario, places).errors())
    if errors:
        raise DocumentError(errors)
    return scenario


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

    def errors(self) -> Iterator[str]:
        """One line for each thing that is wrong."""
        for name in self._specs:
            if name in _RESERVED:
                yield self._places.error(("machine", "guests", name), f"{name!r} is no name for a guest")
        self._steps(self._scenario.steps, ("steps",), self._scenario.only_guest or "")
        yield from self._errors
        for path, reference in self._references:
            if reference[0] not in self._defined and reference[0] not in {*self._specs, "guest"}:
                yield self._places.error(path, f"${reference[0]} is defined nowhere")

    def _steps(self, steps: list[Step], path: Path, guest: str) -> None:
        for index, step in enumerate(steps):
            self._step(step, (*path, index), guest)

    def _step(self, step: Step, path: Path, guest: str) -> None:
        step.stand_at(self._places.line(path))
        if step.guest is not None:
            self._known(step.guest, (*path, "guest"), every=True)
            guest = step.guest
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
                self._steps(value, place, guest)
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
