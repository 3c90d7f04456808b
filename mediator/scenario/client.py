"""Steps of a client application: the TEE Client API of a guest's process.

Source: GlobalPlatform TEE Client API Specification 1.0; names of TAs and commands are those of the model's catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, Self
from uuid import UUID

import trio
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from guests import Direction, MemoryResult, Null, Partial, Session, SharedMemory, TeeError, Temporary, Values, Whole
from guests import Value as ValueParameter
from guests.parameters import Output, Parameter
from mediator.scenario.expectations import StateExpectation
from mediator.scenario.expressions import EvaluationError, Expression, Number, Record, Value
from mediator.scenario.memory import check_bytes
from mediator.scenario.messages import Codes, Origins, check_code
from mediator.scenario.steps import (
    Content,
    Expected,
    ExpectedNumbers,
    Name,
    Numbers,
    Octets,
    Step,
    StepFailed,
    Strict,
    check_number,
    octets,
)
from optee.abi.message import Login
from optee.abi.results import Origin, Result
from optee.tas.catalogue import BUILT_IN

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

DIRECTIONS: Final = {"input": Direction.INPUT, "output": Direction.OUTPUT, "inout": Direction.INOUT}
DirectionName = Literal["input", "output", "inout"]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("Ta")).lower()


TAS: Final[Mapping[str, UUID]] = {_snake(ta.__name__): ta.uuid for ta in BUILT_IN}
"""TAs of the model by the name that scenarios use."""
COMMANDS: Final[Mapping[UUID, Mapping[str, int]]] = {
    ta.uuid: {entry.function.__name__.upper(): number for number, entry in ta.commands.items()} for ta in BUILT_IN
}
"""Their commands by name."""
_UUID: Final = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_ALL_COMMANDS: Final = frozenset(name for commands in COMMANDS.values() for name in commands)


def _known_ta(value: str) -> str:
    if value in TAS:
        return value
    if re.fullmatch(_UUID, value):
        return str(UUID(value))
    raise ValueError(f"{value!r} is no UUID and none of {', '.join(TAS)}")


def _known_command(value: object) -> object:
    if isinstance(value, str) and value not in _ALL_COMMANDS and not value.startswith("$"):
        raise ValueError(f"{value!r} is no command of a known TA, and no number")
    if isinstance(value, int) and not 0 <= value < 1 << 32:
        raise ValueError(f"{value} is no command: it has 32 bits")
    return value


_U32: Final = {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}
TaName = Annotated[
    str, AfterValidator(_known_ta), WithJsonSchema({"type": "string", "pattern": f"^({'|'.join(TAS)}|{_UUID})$"})
]
CommandName = Annotated[
    str | int,
    BeforeValidator(_known_command),
    WithJsonSchema({"anyOf": [_U32, {"enum": sorted(_ALL_COMMANDS)}, {"type": "string", "pattern": r"^\$"}]}),
]


def ta_uuid(name: str) -> UUID:
    """The UUID of a TA that is named, or given by UUID."""
    return TAS[name] if name in TAS else UUID(name)


class ParameterSpec(Strict):
    """A parameter of an operation: exactly one of value, temporary, shared, "null".

    value: a, or [a, b]. temporary: bytes, or a number for as many zero bytes; `size` may make the buffer larger.
    shared: `$name` of allocated or registered memory, all of it unless `offset` and `size` say which part.
    "null": a NULL reference of this size.
    """

    value: Numbers | None = None
    temporary: Octets | None = None
    shared: Number | None = None
    null: Number | None = None
    offset: Number | None = None
    size: Number | None = None
    direction: DirectionName | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(given is not None for given in (self.value, self.temporary, self.shared, self.null)) != 1:
            raise ValueError("a parameter is one of value, temporary, shared, null")
        if isinstance(self.value, list) and len(self.value) > 2:
            raise ValueError("a value has two numbers at most")
        return self

    def build(self, actor: Actor) -> Parameter:
        """The parameter as the client API has it. Raises EvaluationError."""
        direction = DIRECTIONS[self.direction or "inout"]
        if self.value is not None:
            numbers = self.value if isinstance(self.value, list) else [self.value]
            a, b = (*[actor.small(number) for number in numbers], 0, 0)[:2]
            return ValueParameter(a, b, direction)
        if self.null is not None:
            return Null(actor.size(self.null), DIRECTIONS[self.direction or "output"])
        if self.temporary is not None:
            size = 0 if self.size is None else actor.size(self.size)
            data = _size_or_data(self.temporary, actor)
            if isinstance(data, int):
                return Temporary(size=max(size, data), direction=direction)
            return Temporary(data, size, direction)
        assert self.shared is not None
        memory = actor.thing(self.shared, "memory").thing
        assert isinstance(memory, SharedMemory)
        if self.offset is None and self.size is None and self.direction is None:
            return Whole(memory)
        offset = 0 if self.offset is None else actor.number(self.offset)
        size = memory.size - offset if self.size is None else actor.number(self.size)
        return Partial(memory, offset, size, direction)


def _size_or_data(source: Content | Expression, actor: Actor) -> int | bytes:
    if isinstance(source, Expression):
        value = actor.value(source)
        if isinstance(value, int):
            return actor.size(source)
    return octets(source, actor)


class OutputExpectation(Strict):
    """What a parameter holds afterwards."""

    value: ExpectedNumbers | None = None
    size: Expected | None = None
    content: Octets | None = None
    one_of: list[Octets] | None = None
    """Contents, one of which it must be."""

    def check(self, output: Output, actor: Actor, what: str) -> None:
        """Compare. Raises StepFailed."""
        if self.value is not None:
            if not isinstance(output, Values):
                raise StepFailed(what, "a value", "none")
            wanted = self.value if isinstance(self.value, list) else [self.value]
            for name, expected, got in zip(("a", "b"), wanted, output, strict=False):
                check_number(f"{what}.{name}", expected, got, actor)
        if self.size is None and self.content is None and self.one_of is None:
            return
        if not isinstance(output, MemoryResult):
            raise StepFailed(what, "memory", "none")
        if self.size is not None:
            check_number(f"{what}.size", self.size, output.size, actor)
        if self.content is not None:
            check_bytes(what, octets(self.content, actor), output.data)
        if self.one_of is not None and output.data not in [octets(source, actor) for source in self.one_of]:
            raise StepFailed(what, f"one of {len(self.one_of)} contents", f"{output.size} other bytes")


class OperationExpectation(StateExpectation):
    """How an operation ends: SUCCESS unless said otherwise."""

    result: Codes | None = None
    origin: Origins | None = None
    params: list[OutputExpectation | None] | None = None
    took: Expected | None = None
    """Milliseconds of virtual time."""


class ClientStep(Step):
    """A step that calls the client API. `process` says in which process of the guest: each has its own context."""

    needs_driver: ClassVar[bool] = True
    process: Name = "client"
    expect: OperationExpectation = OperationExpectation()

    async def run(self, actor: Actor) -> None:
        """Make the call, and compare what comes of it."""
        since = actor.run.world.inboxes[actor.guest.client].total
        began = trio.current_time()
        result, origin = int(Result.SUCCESS), 0
        outputs: Sequence[Output] = ()
        try:
            outputs = await self.call(actor)
        except TeeError as error:
            result, origin, outputs = error.result, error.origin, error.outputs
        self.keep(actor, result, origin, outputs)
        expect = self.expect
        if expect.result is None:
            if result != Result.SUCCESS:
                name = f"{Result(result).name if result in list(Result) else hex(result)}"
                raise StepFailed("result", "SUCCESS", f"{name} from {_origin(origin)}")
        else:
            check_code("result", expect.result, result, Result, actor)
        if expect.origin is not None:
            check_code("origin", expect.origin, origin, Origin, actor)
        for index, (wanted, output) in enumerate(zip(expect.params or (), outputs, strict=False)):
            if wanted is not None:
                wanted.check(output, actor, f"params[{index}]")
        if expect.took is not None:
            took = round((trio.current_time() - began) * 1000)
            check_number("took", expect.took, took, actor, lambda number: f"{number} ms")
        if actor.guest.alive:
            expect.check(actor, since)

    async def call(self, actor: Actor) -> Sequence[Output]:
        """The operation itself. Raises TeeError."""
        raise NotImplementedError

    def keep(self, actor: Actor, result: int, origin: int, outputs: Sequence[Output]) -> None:
        """Give the outcome its name."""


def _origin(origin: int) -> str:
    return Origin(origin).name if origin in list(Origin) else str(origin)


def _answer(result: int, origin: int, outputs: Sequence[Output]) -> Record:
    fields: dict[str, Value] = {"result": result, "origin": origin}
    for index, output in enumerate(outputs):
        if isinstance(output, Values):
            fields[str(index)] = Record("value", output.a, {"a": output.a, "b": output.b})
        elif isinstance(output, MemoryResult):
            fields[str(index)] = Record("bytes", None, {"size": output.size, "data": output.data})
    return Record("answer", None, fields)


class Open(ClientStep):
    """Open a session with a TA; it is called `session` unless `as` says otherwise."""

    verb = "open"
    open: TaName
    params: list[ParameterSpec | None] = Field(default=[], max_length=5)
    login: Literal["PUBLIC", "USER", "GROUP"] = "PUBLIC"
    name: Annotated[Name, Field(alias="as")] = "session"

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        params = [None if spec is None else spec.build(actor) for spec in self.params]
        uuid = ta_uuid(self.open)
        session = await actor.guest.context(self.process).open_session(uuid, *params, login=Login[self.login])
        actor.define(
            self.name,
            Record("session", session.identifier, {"id": session.identifier}, (session, uuid, actor.guest.driver)),
        )
        return session.outputs


def _living_session(name: Expression, actor: Actor) -> tuple[Session, UUID]:
    """A session of the guest's present kernel, and its TA. Raises EvaluationError."""
    thing = actor.thing(name, "session").thing
    assert isinstance(thing, tuple)
    session, uuid, driver = thing
    assert isinstance(session, Session) and isinstance(uuid, UUID)
    if driver is not actor.guest.driver:
        raise EvaluationError(f"{name.text} ended with the kernel that opened it")
    return session, uuid


class SessionStep(ClientStep):
    """A step in a session: the one called `session` unless named."""

    session: Number = Expression("$session", {})

    def in_session(self, actor: Actor) -> tuple[Session, UUID]:
        """The session, and its TA. Raises EvaluationError."""
        return _living_session(self.session, actor)


class Invoke(SessionStep):
    """Invoke a command, by its name in the TA or by number."""

    verb = "invoke"
    invoke: CommandName
    params: list[ParameterSpec | None] = Field(default=[], max_length=5)
    name: Annotated[Name | None, Field(alias="as")] = None

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        session, uuid = self.in_session(actor)
        params = [None if spec is None else spec.build(actor) for spec in self.params]
        return await session.invoke(self._number(actor, uuid), *params)

    def _number(self, actor: Actor, uuid: UUID) -> int:
        if isinstance(self.invoke, int):
            return self.invoke
        if self.invoke.startswith("$"):
            return actor.small(Expression(self.invoke, {}))
        known = COMMANDS.get(uuid, {})
        if self.invoke not in known:
            raise EvaluationError(f"this TA has no command {self.invoke}: {', '.join(known) or 'none that is known'}")
        return known[self.invoke]

    def keep(self, actor: Actor, result: int, origin: int, outputs: Sequence[Output]) -> None:
        """`$name.result`, `$name.origin`, `$name.0.a`, `$name.1.size`."""
        actor.define(self.name, _answer(result, origin, outputs))


class Cancel(ClientStep):
    """Ask for the cancellation of what a session is doing."""

    verb = "cancel"
    cancel: Number

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        session, _ = _living_session(self.cancel, actor)
        await session.request_cancellation()
        return ()


class Close(ClientStep):
    """Close a session."""

    verb = "close"
    close: Number

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        session, _ = _living_session(self.close, actor)
        await session.close()
        return ()


class MemoryStep(ClientStep):
    """A step that makes shared memory."""

    direction: DirectionName = "inout"
    content: Octets | None = None
    """What it holds; zeros if not given."""
    name: Annotated[Name, Field(alias="as")] = "memory"

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        memory = await self.make(actor)
        if self.content is not None:
            memory.write(octets(self.content, actor))
        kernel = memory.kernel_memory
        fields: dict[str, Value] = {
            "cookie": kernel.cookie,
            "size": memory.size,
            "page": kernel.buffer.pages[0],
        }
        actor.define(self.name, Record("memory", kernel.cookie, fields, memory))
        return ()

    async def make(self, actor: Actor) -> SharedMemory:
        """Make it. Raises TeeError."""
        raise NotImplementedError


class Allocate(MemoryStep):
    """Allocate so many bytes of shared memory (TEEC_AllocateSharedMemory)."""

    verb = "allocate"
    allocate: Number

    async def make(self, actor: Actor) -> SharedMemory:
        """See `MemoryStep`."""
        context = actor.guest.context(self.process)
        return await context.allocate(actor.size(self.allocate), DIRECTIONS[self.direction])


class Register(MemoryStep):
    """Register so many bytes of the process's own (TEEC_RegisterSharedMemory), `offset` bytes into a page."""

    verb = "register"
    register_: Annotated[Number, Field(alias="register")]
    offset: Number | None = None

    async def make(self, actor: Actor) -> SharedMemory:
        """See `MemoryStep`."""
        context = actor.guest.context(self.process)
        offset = 0 if self.offset is None else actor.size(self.offset)
        buffer = context.buffer(actor.size(self.register_), offset)
        try:
            return await context.register(buffer, DIRECTIONS[self.direction])
        except TeeError:
            context.free(buffer)
            raise

    def words(self) -> str:
        """See `Step`."""
        return f"register: {self.register_}"


class Release(ClientStep):
    """Release shared memory."""

    verb = "release"
    release: Number

    async def call(self, actor: Actor) -> Sequence[Output]:
        """See `ClientStep`."""
        memory = actor.thing(self.release, "memory").thing
        assert isinstance(memory, SharedMemory)
        await memory.release()
        return ()


STEPS: Final = (Open, Invoke, Cancel, Close, Allocate, Register, Release)
