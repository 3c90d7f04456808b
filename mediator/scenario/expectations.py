"""What a scenario may expect: of the state of things (memory, ledger, events, statistics), and of registers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema

from mediator.core import steps
from mediator.core.ledger import RESOURCES
from mediator.core.records import Counters
from mediator.core.steps import Regs
from mediator.scenario.expressions import (
    EvaluationError,
    Number,
    Status,
)
from mediator.scenario.memory import (
    DirtyExpectation,
    MapsTo,
    MemoryExpectation,
    PinsExpectation,
    page_addresses,
    read_ram,
)
from mediator.scenario.messages import REGISTERS, ForwardedExpectation, MessageExpectation
from mediator.scenario.secure_side import COUNTED_BY_OPERATION
from mediator.scenario.steps import Expected, StepFailed, Strict, check_number
from optee.abi.message import HEADER_SIZE, PARAM_SIZE, Command
from optee.abi.registers import name_of
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, from_pair, is_rpc

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

_LOW: Final = 0xFFFFFFFF
_PAGE: Final = 4096
_COUNTERS: Final = tuple(Counters.__slots__)
_OPTEE: Final = ("optee_panics", "optee_cancels", "optee_thread_limits", "optee_invokes")
StatisticName = Literal[
    "calls",
    "forwarded",
    "rpcs",
    "denied",
    "refused",
    "rejected",
    "translated",
    "optee_panics",
    "optee_cancels",
    "optee_thread_limits",
    "optee_invokes",
    "smcs",
    "thread_limits",
    "waiting_for_thread",
    "foreign_interrupts",
    "rpc_commands",
    "supplicant_requests",
    "pages_used",
    "shared_memory_objects",
]
ResourceName = Literal["pages", "buffers", "rpc_arguments", "calls", "memory"]
AtOpteeName = Literal["threads", "sessions", "buffers"]
StorageMemoryName = Literal[
    "charged",
    "bound",
    "objects",
    "blocks",
    "nodes",
    "rpc_buffers",
    "hits",
    "misses",
    "evictions",
    "collections",
    "longest_pass",
    "collected",
    "wrong_releases",
]

EVENTS: Final = frozenset(value for name, value in vars(steps).items() if name.isupper() and isinstance(value, str))
"""Events of the core by name."""
TRAFFIC: Final = frozenset(
    {member.name for kind in (Command, RpcReturn) for member in kind}
    | {member.name for member in RpcCommand if member not in COUNTED_BY_OPERATION}
    | {f"{command.name}.{each.name}" for command, kind in COUNTED_BY_OPERATION.items() for each in kind}
)
"""Messages and RPCs by the name under which they are counted."""


def _one_of(names: frozenset[str]) -> tuple[AfterValidator, WithJsonSchema]:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(names))}")
        return name

    pattern = "|".join(sorted(names)).replace(".", r"\.")
    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})


EventName = Annotated[str, *_one_of(EVENTS)]
TrafficName = Annotated[str, *_one_of(TRAFFIC)]


def status_name(code: int) -> str:
    """a0 of an answer in words."""
    low = code & _LOW
    return name_of(RpcReturn, low) if is_rpc(low) else name_of(ReturnCode, low)


class StateExpectation(Strict):
    """What may be expected at any time. Events and traffic are counted since they were last expected."""

    memory: list[MemoryExpectation] = Field(default=[])
    message: MessageExpectation | None = None
    maps_to: list[MapsTo] = Field(default=[])
    pins: list[PinsExpectation] = Field(default=[])
    dirty: list[DirtyExpectation] = Field(default=[])
    ledger: dict[ResourceName, Expected] = Field(default={})
    at_optee: dict[AtOpteeName, Expected] = Field(default={})
    storage_memory: dict[StorageMemoryName, Expected] = Field(default={})
    statistics: dict[StatisticName, Expected] = Field(default={})
    events: dict[EventName, Expected] = Field(default={})
    traffic: dict[TrafficName, Expected] = Field(default={})
    """Messages and RPCs at OP-TEE by name, such as REGISTER_SHM, LOAD_TA, FS.READ."""
    forwarded: list[ForwardedExpectation] | None = None
    """The SMCs that reached OP-TEE in this step, all of them."""
    alive: bool | None = None
    console: list[str] = Field(default=[])
    """Pieces of lines that OP-TEE has printed."""

    def check(self, actor: Actor, since: int | None = None) -> None:
        """Look at everything that is mentioned. Raises StepFailed, EvaluationError.

        since: `Inbox.total` when the step began.
        """
        for memory in self.memory:
            memory.check(actor)
        if self.message is not None:
            if self.message.at is None:
                raise EvaluationError("message: at is missing")
            at = actor.number(self.message.at)
            self.message.check(read_ram(actor, at, HEADER_SIZE + PARAM_SIZE * len(self.message.params or ())), actor)
        for mapping in self.maps_to:
            mapping.check(actor)
        for pins in self.pins:
            pins.check(actor)
        if self.ledger or self.statistics or self.at_optee or self.storage_memory:
            self._check_counts(actor)
        if self.alive is not None and actor.guest.alive is not self.alive:
            raise StepFailed(f"{actor.guest.name}", "alive" if self.alive else "gone", "the contrary")
        printed = actor.run.model.console
        for piece in self.console:
            if not any(piece in line for line in printed):
                raise StepFailed("OP-TEE's console", piece, printed[-1] if printed else "nothing")
        if self.forwarded is not None:
            self._check_forwarded(actor, since)
        if self.dirty:
            self._check_dirty(actor)
        self._check_since_last(actor)

    def _check_since_last(self, actor: Actor) -> None:
        """Events and traffic; what was seen counts as expected only when all of it is as it should be."""
        guest = actor.guest
        events, traffic = Counter(guest.event_counts), Counter[str]()
        if self.events:
            self._check_since("event", self.events, events, guest.events_mark, actor)
        if self.traffic:
            traffic = Counter(actor.run.world.inboxes[guest.client].traffic)
            self._check_since("traffic", self.traffic, traffic, guest.traffic_mark, actor)
            guest.traffic_mark = traffic
        if self.events:
            guest.events_mark = events

    def _check_since(
        self, kind: str, expected: dict[str, Any], seen: Counter[str], mark: Counter[str], actor: Actor
    ) -> None:
        for name, count in expected.items():
            check_number(f"{kind} {name}", count, seen[name] - mark[name], actor)

    def _check_counts(self, actor: Actor) -> None:
        guest, model = actor.guest, actor.run.model
        if self.ledger:
            record = actor.run.board.core.guests.get(guest.vm.client_id) if guest.alive else None
            sums = dict.fromkeys(RESOURCES, 0) if record is None else record.ledger.sums()
            for name, count in self.ledger.items():
                check_number(f"ledger {name}", count, sums[name], actor)
        for place, count in self.at_optee.items():
            held = {
                "threads": model.threads_held(guest.client),
                "sessions": model.session_count(guest.client),
                "buffers": len(model.shared_objects(guest.client)),
            }
            check_number(f"{place} at OP-TEE", count, held[place], actor)
        if self.storage_memory:
            memory = model.storage_memory(guest.client)
            if memory is None:
                raise EvaluationError(f"{guest.name} has no memory manager for storage (machine: optee: storage)")
            numbers = memory.numbers()
            for kind, count in self.storage_memory.items():
                check_number(f"storage memory, {kind}", count, numbers[kind], actor)
        for statistic, count in self.statistics.items():
            check_number(statistic, count, _statistic(statistic, actor), actor)

    def _check_forwarded(self, actor: Actor, since: int | None) -> None:
        assert self.forwarded is not None
        inbox = actor.run.world.inboxes[actor.guest.client]
        new = inbox.total - (since or 0)
        seen = list(inbox.forwarded)[-new:] if new else []
        names = [name_of(Function, one.regs[0]) for one in seen]
        if len(seen) != len(self.forwarded):
            raise StepFailed("SMCs to OP-TEE", str(len(self.forwarded)), f"{len(seen)} {' '.join(names)}".strip())
        for index, (expected, one) in enumerate(zip(self.forwarded, seen, strict=True)):
            expected.check(one, actor, f"forwarded[{index}]")

    def _check_dirty(self, actor: Actor) -> None:
        from hv_models.kvm import KvmVm

        vm = actor.guest.vm
        if not isinstance(vm, KvmVm):
            raise EvaluationError(f"{actor.guest.name} is no KVM guest: there is no dirty log")
        log = {int(gfn) for gfn in vm.dirty_pages()}
        for expected in self.dirty:
            for ipa in page_addresses(actor, expected.at, expected.pages):
                if (ipa // _PAGE in log) is not expected.dirty:
                    words = ("clean", "dirty")
                    raise StepFailed(f"page {ipa:#x}", words[expected.dirty], words[not expected.dirty])


def _statistic(name: str, actor: Actor) -> int:
    guest = actor.guest
    if name in _COUNTERS:
        record = actor.run.board.core.guests.get(guest.vm.client_id)
        return 0 if record is None else int(getattr(record.counters, name))
    if name in _OPTEE:
        model = actor.run.model
        return {
            "optee_panics": model.panics,
            "optee_cancels": model.cancels,
            "optee_thread_limits": model.thread_limits,
            "optee_invokes": model.ta_invokes,
        }[name]
    return int(asdict(guest.linux.statistics())[name])


class Bits(Strict):
    """Some bits of a register; those that are not named are not looked at."""

    ones: Annotated[Number | None, Field(alias="set")] = None
    zeros: Annotated[Number | None, Field(alias="clear")] = None

    def check(self, name: str, word: int, actor: Actor) -> None:
        """Compare. Raises StepFailed."""
        ones = 0 if self.ones is None else actor.number(self.ones)
        zeros = 0 if self.zeros is None else actor.number(self.zeros)
        if word & ones != ones or word & zeros:
            raise StepFailed(name, f"bits {ones:#x} set and {zeros:#x} clear", hex(word))


Word = Annotated[
    Annotated[Bits, Tag("<bits>")] | Annotated[Number, Tag("<number>")],
    Discriminator(lambda given: "<bits>" if isinstance(given, dict | Bits) else "<number>"),
]
"""All of a register, or some bits of it."""


StatusWord = Annotated[
    Annotated[Bits, Tag("<bits>")] | Annotated[Status, Tag("<code>")],
    Discriminator(lambda given: "<bits>" if isinstance(given, dict | Bits) else "<code>"),
]
"""The same for a0, which may be a status."""


class RegistersExpectation(StateExpectation):
    """What an SMC answers."""

    a0: StatusWord | None = None
    a1: Word | None = None
    a2: Word | None = None
    a3: Word | None = None
    a4: Number | None = None
    a5: Number | None = None
    a6: Number | None = None
    a7: Number | None = None
    a1_a2: Annotated[Number | None, Field(alias="a1:a2")] = None

    def check_registers(self, regs: Regs, actor: Actor) -> None:
        """Compare. Raises StepFailed."""
        if isinstance(self.a0, Bits):
            self.a0.check("a0", regs[0], actor)
        elif self.a0 is not None and actor.number(self.a0) not in (regs[0], _signed(regs[0])):
            raise StepFailed("a0", status_name(actor.number(self.a0)), status_name(regs[0]))
        for index, name in enumerate(REGISTERS[1:], 1):
            word = getattr(self, name)
            if isinstance(word, Bits):
                word.check(name, regs[index], actor)
            elif word is not None and actor.number(word) != regs[index]:
                raise StepFailed(name, hex(actor.number(word)), hex(regs[index]))
        if self.a1_a2 is not None and actor.number(self.a1_a2) != from_pair(regs[1], regs[2]):
            raise StepFailed("a1:a2", hex(actor.number(self.a1_a2)), hex(from_pair(regs[1], regs[2])))


def _signed(word: int) -> int:
    """UNKNOWN_FUNCTION is -1 in all 64 bits, and reads as that in its low 32."""
    return word & _LOW if word == (1 << 64) - 1 else word
