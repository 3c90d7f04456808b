"""The machine of a scenario: guests, policy, OP-TEE. `docs/reference/scenario.md` explains every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from hv_models.machine import RAM_BASE, RamBlock
from mediator.core.policy import Policy, PolicyLimits
from mediator.policies import FlowDocument, PolicyDocument, QuotaDocument, check_quota, load_policy
from mediator.scenario.client import TaName, ta_uuid
from mediator.scenario.expressions import NOTHING, Expression, Number, Seconds
from mediator.scenario.guest import SUPPLICANTS
from mediator.scenario.steps import Name, Strict
from mediator.scenario.world import LimitName
from optee.config import DEFAULT, Config
from optee.memory.boards import BOARDS
from optee.storage.options import StorageOptions
from optee.tas.catalogue import BUILT_IN
from optee.trusted_application import TrustedApplication

MAX_GUESTS: Final = 1000
"""VMs of one machine: stops a file from filling memory."""
MAX_SIZE: Final = 1 << 40
"""Bytes of one size in the machine's description."""


def _size(size: Expression) -> Expression:
    if size.references:
        raise ValueError("a size such as 32 MiB is wanted")
    if size.number(NOTHING) > MAX_SIZE:
        raise ValueError(f"{size} is more than {MAX_SIZE >> 40} TiB")
    return size


Size = Annotated[Number, AfterValidator(_size)]


def _user_ta(name: str) -> str:
    _known_ta(name)
    return name


def _known_ta(name: str) -> type[TrustedApplication]:
    uuid = ta_uuid(name)
    known = next((ta for ta in BUILT_IN if ta.uuid == uuid and not ta.is_pseudo), None)
    if known is None:
        raise ValueError(f"{name} is no user TA of the model")
    return known


def _quotas(quotas: dict[LimitName, Number]) -> dict[LimitName, Number]:
    _quota(quotas)
    return quotas


def _quota(quotas: Mapping[LimitName, Expression]) -> QuotaDocument:
    """The same as a policy has it. Raises Problems."""
    return check_quota({name: value.number(NOTHING) for name, value in quotas.items()})


class GuestSpec(Strict):
    """A guest: its VM, and what runs in it."""

    hypervisor: Literal["kvm", "xen", "mixed"] = "kvm"
    """mixed: KVM and Xen in turn."""
    ram: Size = Expression("32 MiB", {})
    ram_base: Size = Expression(RAM_BASE, {})
    """IPA at which RAM begins."""
    vcpus: Annotated[int, Field(ge=1, le=64)] = 2
    driver: Literal["linux", "none"] = "linux"
    """none: the guest makes raw SMCs only."""
    supplicant: Annotated[str, Field(json_schema_extra={"enum": list(SUPPLICANTS)})] = "usual"
    supplicant_delay: Seconds = 0.01
    """For `slow`: time that each request takes."""
    quotas: Annotated[dict[LimitName, Number], AfterValidator(_quotas)] = Field(default={})
    created: bool = True
    """false: the step `create` makes it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.supplicant not in SUPPLICANTS:
            raise ValueError(f"supplicant: {self.supplicant!r} is none of {', '.join(SUPPLICANTS)}")
        base = self.ram_base.number(NOTHING)
        if base % 4096 or base >= 1 << 39:
            raise ValueError("ram_base: a whole page below 512 GiB is wanted")
        size = self.ram.number(NOTHING)
        if size % 4096 or not 64 << 10 <= size <= 16 << 30:
            raise ValueError("ram: whole pages, 64 KiB to 16 GiB")
        if base + size > 1 << 39:
            raise ValueError("ram: it ends beyond 512 GiB")
        return self

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM."""
        return self.ram.number(NOTHING)

    @property
    def ram_blocks(self) -> list[RamBlock]:
        """RAM as the machine is told."""
        return [RamBlock(self.ram_base.number(NOTHING), self.ram_bytes)]

    @property
    def has_driver(self) -> bool:
        """Whether a Linux driver is booted."""
        return self.driver == "linux"

    def flavour(self, number: int) -> str:
        """Hypervisor of the guest with this number, counted from 1."""
        return ("xen", "kvm")[number % 2] if self.hypervisor == "mixed" else self.hypervisor

    def limits(self, policy: Policy, name: str) -> PolicyLimits:
        """What the guest of this name may hold. Raises ValueError where its quotas do not go with the policy's."""
        return _quota(self.quotas).apply(policy.limits_of(name))

    def over(self, common: GuestSpec) -> GuestSpec:
        """What it says itself, and for the rest what is common to all guests."""
        return common.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


class TaSizes(Strict):
    """Sizes of a TA; what is not given stays as it is."""

    stack: Size | None = None
    """TA_STACK_SIZE."""
    heap: Size | None = None
    """TA_DATA_SIZE."""
    code: Size | None = None
    """Code and constants."""

    def over(self, name: str) -> type[TrustedApplication]:
        """The TA of that name with these sizes."""
        known = _known_ta(name)
        given = {"stack_size": self.stack, "data_size": self.heap, "code_size": self.code}
        sizes = {key: size.number(NOTHING) for key, size in given.items() if size is not None}
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
    early_tas: Annotated[
        Annotated[list[TaName], Tag("<list>")] | Annotated[Literal["all"], Tag("<all>")],
        Discriminator(lambda given: "<list>" if isinstance(given, list) else "<all>"),
    ] = "all"
    """User TAs inside OP-TEE's image; the others come from each guest's tee-supplicant."""
    board: Literal["qemu_armv8a", "hikey", "hikey960", "rk3399", "rk322x"] | None = None
    """A board of `mediator size`, with its build; what stands here beside it goes first. None: a roomy one."""
    core_heap: Size | None = None
    """CFG_CORE_HEAP_SIZE."""
    rpmb: bool = False
    """CFG_RPMB_FS and CFG_RPMB_WRITE_KEY: a storage in RPMB."""
    anchor: bool = False
    """CFG_REE_FS_INTEGRITY_RPMB: the files of guests are anchored in RPMB."""
    guest_storage_keys: bool = False
    """Ours, not OP-TEE's: guests have storage keys of their own."""
    storage: Annotated[dict[str, str | int], AfterValidator(_storage_options)] = Field(default={})
    """Ours, not OP-TEE's: `memory: managed` and the sizes of the memory manager, see `optee.storage.options`."""
    secure_ram: Size | None = None
    """CFG_TZDRAM_SIZE."""
    preallocated_tables: bool | None = None
    """CFG_CORE_PREALLOC_EL0_TBLS."""
    sizes: dict[Annotated[TaName, AfterValidator(_user_ta)], TaSizes] = Field(default={})
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
        return None if size is None else size.number(NOTHING)


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

    def load_policy(self) -> Policy:
        """The policy with what is said here instead. Raises DocumentError for one that is not there, or wrong."""
        policy = load_policy(self.policy) if isinstance(self.policy, str) else self.policy.policy()
        if self.flow is not None:
            policy = replace(policy, flow=self.flow.flow())
        return policy if self.rpmb_owner is None else replace(policy, rpmb_owner=self.rpmb_owner)
