"""Steps below the driver: raw SMCs with registers, guest memory, messages and page lists by field names."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import Field, model_validator

from guests import SharedMemory
from hv_models.memory import PAGE_SIZE
from mediator.scenario.client import TaName, ta_uuid
from mediator.scenario.expectations import RegistersExpectation, StateExpectation
from mediator.scenario.expressions import (
    EvaluationError,
    Expression,
    FunctionId,
    MessageCommand,
    Number,
    OriginCode,
    Record,
    ResultCode,
    Value,
    as_number,
)
from mediator.scenario.memory import check_bytes, page_addresses, read_ram
from mediator.scenario.messages import REGISTERS, Words
from mediator.scenario.steps import Name, Numbers, Octets, Step, octets
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, HEADER_SIZE, META, PARAM, Param, ParamType
from optee.abi.smc import Function, RpcReturn, from_pair, is_rpc, to_pair

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

_OCTETS: Final = struct.Struct("<2Q")
_MAX_RPCS: Final = 10_000
_META_VALUE: Final = ParamType.VALUE_INPUT | META


def write_ram(actor: Actor, at: int, data: bytes) -> None:
    """Write guest RAM as the guest does. Raises EvaluationError outside of it."""
    vm = actor.guest.vm
    for ram in vm.ram:
        if ram.base <= at and at + len(data) <= ram.base + ram.size:
            ram.write(at, data)
            return
    raise EvaluationError(f"{len(data)} bytes at {at:#x} are not RAM of {vm.name}")


class Pages(Step):
    """Take so many pages of the guest's RAM, adjacent by IPA and zeroed: `$name` is the first one's address."""

    verb = "pages"
    pages: Number
    name: Annotated[Name, Field(alias="as")] = "pages"

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        _ = guest.vm
        count = max(actor.size(self.pages), 1)
        taken = tuple(int(page) for page in guest.allocator.run(count))
        guest.ram.clear(taken)
        fields: dict[str, Value] = {"size": count * PAGE_SIZE, "count": count, "last": taken[-1]}
        actor.define(self.name, Record("pages", taken[0], fields, taken))


class Write(Step):
    """Write bytes into guest memory: at an address, or into shared memory."""

    verb = "write"
    write: Number
    offset: Number | None = None
    content: Octets

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        value, data = actor.value(self.write), octets(self.content, actor)
        offset = 0 if self.offset is None else actor.number(self.offset)
        if isinstance(value, Record) and isinstance(value.thing, SharedMemory):
            value.thing.write(data, offset)
        else:
            at = actor.number(self.write) + offset
            actor.guest.vm.touch(at, len(data), write=True)
            write_ram(actor, at, data)


class Read(Step):
    """Read bytes of guest memory: give them a name, or compare them."""

    verb = "read"
    read: Number
    offset: Number | None = None
    size: Number | None = None
    content: Octets | None = None
    name: Annotated[Name | None, Field(alias="as")] = None

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.content is None and self.name is None:
            raise ValueError("read: give the bytes a name by as, or compare them with content")
        return self

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        value = actor.value(self.read)
        wanted = None if self.content is None else octets(self.content, actor)
        offset = 0 if self.offset is None else actor.number(self.offset)
        size = None if self.size is None else actor.size(self.size)
        if size is None and wanted is not None:
            size = len(wanted)
        if isinstance(value, Record) and isinstance(value.thing, SharedMemory):
            data = value.thing.read(offset, size)
        else:
            if size is None:
                raise EvaluationError("read: size is missing")
            data = read_ram(actor, actor.number(self.read) + offset, size)
        if wanted is not None:
            check_bytes(f"memory at {self.read}", wanted, data)
        actor.define(self.name, data)


class ParamSpec(Words):
    """A parameter of a message. `uuid` writes a TA's UUID into a and b, as OPEN_SESSION has it."""

    uuid: TaName | None = None

    def build(self, actor: Actor) -> Param:
        """The four words. Raises EvaluationError."""
        if self.uuid is not None:
            a, b = _OCTETS.unpack(ta_uuid(self.uuid).bytes)
            attr = _META_VALUE if self.attr is None else actor.number(self.attr)
            return Param(attr, a, b, 0)
        attr = 0 if self.attr is None else actor.number(self.attr)
        return Param(attr, *[0 if word is None else actor.number(word) for word in self.words()])


class MessageStep(Step):
    """Write a message, or the reply to an RPC: `$name` is its address. What is not given is 0.

    at: where; a fresh page if not given. num_params: what the header says, if not the truth.
    """

    verb = "message"
    message: MessageCommand
    at: Number | None = None
    func: Number | None = None
    session: Number | None = None
    cancel_id: Number | None = None
    pad: Number | None = None
    ret: ResultCode | None = None
    ret_origin: OriginCode | None = None
    num_params: Number | None = None
    params: list[ParamSpec | None] = Field(default=[])
    name: Annotated[Name, Field(alias="as")] = "message"

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        _ = guest.vm
        at = int(guest.allocator.run(1)[0]) if self.at is None else actor.number(self.at)
        if self.at is None:
            guest.ram.clear([at])
        given = (self.message, self.func, self.session, self.cancel_id, self.pad, self.ret, self.ret_origin)
        header = [0 if field is None else actor.small(field) for field in given]
        params = [Param(0) if spec is None else spec.build(actor) for spec in self.params]
        count = len(params) if self.num_params is None else actor.small(self.num_params)
        data = HEADER.pack(*header, count) + b"".join(PARAM.pack(*param) for param in params)
        write_ram(actor, at, data)
        fields: dict[str, Value] = {"size": len(data), "params": at + HEADER_SIZE}
        actor.define(self.name, Record("message", at, fields))


class ListStep(Step):
    """Write a page list: `$name` is its first page. Further list pages follow by themselves.

    list: `$name` of pages or shared memory, or addresses. next: what the last list page's next pointer says, if not
    0. at: where the first list page is; a fresh one if not given.
    """

    verb = "list"
    entries: Annotated[Numbers, Field(alias="list")]
    at: Number | None = None
    next: Number | None = None
    name: Annotated[Name, Field(alias="as")] = "list"

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        _ = guest.vm
        if isinstance(self.entries, Expression):
            entries = [int(page) for page in page_addresses(actor, self.entries, None)]
        else:
            entries = [actor.number(entry) for entry in self.entries]
        count = max(-(-len(entries) // ENTRIES_PER_PAGE), 1)
        given = [] if self.at is None else [actor.number(self.at)]
        wanted = count - len(given)
        places = given + ([int(page) for page in guest.allocator.run(wanted)] if wanted else [])
        for number, place in enumerate(places):
            part = entries[number * ENTRIES_PER_PAGE : (number + 1) * ENTRIES_PER_PAGE]
            write_ram(actor, place, struct.pack(f"<{len(part)}Q", *part))
            if number + 1 < len(places):
                write_ram(actor, place + ENTRIES_PER_PAGE * 8, struct.pack("<Q", places[number + 1]))
        if self.next is not None:
            write_ram(actor, places[-1] + ENTRIES_PER_PAGE * 8, struct.pack("<Q", actor.number(self.next)))
        fields: dict[str, Value] = {"entries": len(entries), "last": places[-1]}
        actor.define(self.name, Record("pages", places[0], fields, tuple(places)))


class Smc(Step):
    """Execute one SMC (or HVC) with these registers; those not given are 0. `$name.a0` ... is the answer."""

    verb = "smc"
    smc: FunctionId
    a1: Number | None = None
    a2: Number | None = None
    a3: Number | None = None
    a4: Number | None = None
    a5: Number | None = None
    a6: Number | None = None
    a7: Number | None = None
    a1_a2: Annotated[Number | None, Field(alias="a1:a2")] = None
    """A 64-bit word in two registers: the upper half in a1."""
    a4_a5: Annotated[Number | None, Field(alias="a4:a5")] = None
    vcpu: int = Field(default=0, ge=0)
    name: Annotated[Name, Field(alias="as")] = "answer"
    expect: RegistersExpectation | None = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        for pair, singles in (("a1_a2", ("a1", "a2")), ("a4_a5", ("a4", "a5"))):
            if getattr(self, pair) is not None and any(getattr(self, single) is not None for single in singles):
                raise ValueError(f"{pair.replace('_', ':')} and {' or '.join(singles)} are the same register")
        return self

    def registers(self, actor: Actor) -> list[int]:
        """x0..x7. Raises EvaluationError."""
        regs = [actor.number(self.smc)]
        for name in REGISTERS[1:]:
            word = getattr(self, name)
            regs.append(0 if word is None else actor.number(word))
        if self.a1_a2 is not None:
            regs[1:3] = to_pair(actor.number(self.a1_a2))
        if self.a4_a5 is not None:
            regs[4:6] = to_pair(actor.number(self.a4_a5))
        return regs

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        since = actor.run.world.inboxes[actor.guest.client].total
        answer = await actor.guest.smc(self.vcpu, tuple(self.registers(actor)))
        actor.define(self.name, _answer(answer))
        if self.expect is not None:
            self.expect.check_registers(answer, actor)
            if self.expect.message is not None and self.expect.message.at is None and self.a1_a2 is not None:
                self.expect.message.check(read_ram(actor, actor.number(self.a1_a2), PAGE_SIZE), actor)
                self.expect.model_copy(update={"message": None}).check(actor, since)
            else:
                self.expect.check(actor, since)


class DeclineRpcs(Step):
    """Bring a suspended call to its end: answer each of its RPCs as a guest does that has neither memory nor
    tee-supplicant. `$name.a0` ... is the last answer.
    """

    verb = "decline_rpcs"
    decline_rpcs: Number
    vcpu: int = Field(default=0, ge=0)
    name: Annotated[Name, Field(alias="as")] = "answer"
    expect: RegistersExpectation | None = None

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        since = actor.run.world.inboxes[actor.guest.client].total
        fields = actor.thing(self.decline_rpcs, "answer").fields
        answer = tuple(as_number(fields[name], name) for name in REGISTERS)
        for _ in range(_MAX_RPCS):
            if not is_rpc(answer[0]):
                break
            pair = (0, 0) if answer[0] == RpcReturn.ALLOC else answer[1:3]
            answer = await actor.guest.smc(self.vcpu, (int(Function.RETURN_FROM_RPC), *pair, answer[3], 0, 0, 0, 0))
        actor.define(self.name, _answer(answer))
        if self.expect is not None:
            self.expect.check_registers(answer, actor)
            self.expect.check(actor, since)


def _answer(regs: Sequence[int]) -> Record:
    """`$name.a0` ... and the pair in a1:a2."""
    fields: dict[str, Value] = dict(zip(REGISTERS, regs, strict=False))
    fields["pair"] = from_pair(regs[1], regs[2])
    return Record("answer", regs[0], fields)


class Let(Step):
    """Give numbers or bytes a name."""

    verb = "let"
    let: dict[Name, Octets]

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        for name, source in self.let.items():
            actor.define(name, actor.value(source) if isinstance(source, Expression) else octets(source, actor))

    def definitions(self) -> Sequence[str]:
        """See `Step`."""
        return list(self.let)


class Expect(Step):
    """Look at the state of things."""

    verb = "expect"
    expect: StateExpectation

    @model_validator(mode="after")
    def _about_a_state(self) -> Self:
        if self.expect.forwarded is not None:
            raise ValueError("forwarded: what a step sent to OP-TEE is expected beside that step")
        return self

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        self.expect.check(actor)


STEPS: Final = (Pages, Write, Read, MessageStep, ListStep, Smc, DeclineRpcs, Let, Expect)
