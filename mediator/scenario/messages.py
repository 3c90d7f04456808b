"""Messages and SMCs in a scenario, by their fields: in guest memory, and as they reached OP-TEE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mediator.scenario.expressions import (
    Attribute,
    Expression,
    FunctionId,
    MessageCommand,
    Number,
    OriginCode,
    ResultCode,
)
from mediator.scenario.memory import frames_of, in_words, page_addresses
from mediator.scenario.secure_side import Forwarded
from mediator.scenario.steps import StepFailed, Strict
from optee.abi.message import HEADER, HEADER_SIZE, PARAM, PARAM_SIZE, Command, Header, Param
from optee.abi.registers import Named, name_of
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

REGISTERS: Final = ("a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7")

Codes = Annotated[
    Annotated[list[ResultCode], Tag("<list>")] | Annotated[ResultCode, Tag("<code>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<code>"),
]
"""A result, or a list of those that will do."""
Origins = Annotated[
    Annotated[list[OriginCode], Tag("<list>")] | Annotated[OriginCode, Tag("<code>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<code>"),
]


def check_code(what: str, expected: list[Expression] | Expression, got: int, kind: type[Named], actor: Actor) -> None:
    """Compare a code that has a name. Raises StepFailed."""
    wanted = [actor.small(one) for one in (expected if isinstance(expected, list) else [expected])]
    if got not in wanted:
        raise StepFailed(what, " or ".join(name_of(kind, code) for code in wanted), name_of(kind, got))


class Words(Strict):
    """A parameter of a message: `attr`, and its three words by the names of its type.

    VALUE: a, b, c. TMEM: buf_ptr, size, shm_ref. RMEM: offs, size, shm_ref.
    """

    attr: Attribute | None = None
    a: Number | None = None
    b: Number | None = None
    c: Number | None = None
    buf_ptr: Number | None = None
    offs: Number | None = None
    size: Number | None = None
    shm_ref: Number | None = None

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        for names in (("a", "buf_ptr", "offs"), ("b", "size"), ("c", "shm_ref")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} are the same word")
        return self

    def words(self) -> tuple[Expression | None, Expression | None, Expression | None]:
        """The three words, whatever they are called."""
        first = next((word for word in (self.a, self.buf_ptr, self.offs) if word is not None), None)
        return first, self.b if self.b is not None else self.size, self.c if self.c is not None else self.shm_ref


class MessageExpectation(Strict):
    """Fields of a message, or RPC argument, in guest memory (or at OP-TEE, for `forwarded`)."""

    at: Number | None = None
    cmd: MessageCommand | None = None
    func: Number | None = None
    session: Number | None = None
    cancel_id: Number | None = None
    ret: ResultCode | None = None
    ret_origin: OriginCode | None = None
    num_params: Number | None = None
    params: list[Words | None] | None = None

    def check(self, data: bytes, actor: Actor, what: str = "message") -> None:
        """Compare. Raises StepFailed."""
        header = Header._make(HEADER.unpack_from(data))
        if self.cmd is not None:
            cmd = actor.small(self.cmd)
            names = RpcCommand if self.cmd.text in RpcCommand.__members__ else Command
            if cmd != header.cmd:
                raise StepFailed(f"{what}.cmd", name_of(names, cmd), name_of(names, header.cmd))
        if self.ret is not None:
            check_code(f"{what}.ret", self.ret, header.ret, Result, actor)
        if self.ret_origin is not None:
            check_code(f"{what}.ret_origin", self.ret_origin, header.ret_origin, Origin, actor)
        for name in ("func", "session", "cancel_id", "num_params"):
            wanted = getattr(self, name)
            if wanted is not None and actor.small(wanted) != getattr(header, name):
                raise StepFailed(f"{what}.{name}", hex(actor.small(wanted)), hex(getattr(header, name)))
        for index, expected in enumerate(self.params or ()):
            if expected is None:
                continue
            start = HEADER_SIZE + PARAM_SIZE * index
            got = Param._make(PARAM.unpack_from(data, start))
            for name, word, found in zip(("attr", "a", "b", "c"), (expected.attr, *expected.words()), got, strict=True):
                if word is not None and actor.number(word) != found:
                    raise StepFailed(f"{what}.params[{index}].{name}", hex(actor.number(word)), hex(found))


class ForwardedExpectation(Strict):
    """One SMC that reached OP-TEE. Registers that are not named are not looked at."""

    a0: FunctionId
    a1: Number | None = None
    a2: Number | None = None
    a3: Number | None = None
    a4: Number | None = None
    a5: Number | None = None
    a6: Number | None = None
    a7: Number | None = None
    message: MessageExpectation | None = None
    argument: MessageExpectation | None = None
    """The RPC argument of a resumed call: the reply as OP-TEE sees it."""
    lists: list[Number | None] = Field(default=[])
    """For each parameter, the guest's pages whose frames its page list names, in order."""

    def check(self, seen: Forwarded, actor: Actor, what: str) -> None:
        """Compare. Raises StepFailed."""
        function = actor.small(self.a0)
        if function != seen.regs[0]:
            raise StepFailed(f"{what}.a0", name_of(Function, function), name_of(Function, seen.regs[0]))
        for index, name in enumerate(REGISTERS[1:], 1):
            word = getattr(self, name)
            if word is not None and actor.number(word) != seen.regs[index]:
                raise StepFailed(f"{what}.{name}", hex(actor.number(word)), hex(seen.regs[index]))
        for name, wanted, got in (
            ("message", self.message, seen.message),
            ("argument", self.argument, seen.argument),
        ):
            if wanted is not None:
                if got is None:
                    raise StepFailed(f"{what}.{name}", "there is one", "none")
                wanted.check(got.pack(), actor, f"{what}.{name}")
        for index, pages in enumerate(self.lists):
            if pages is not None:
                frames = frames_of(actor, page_addresses(actor, pages, None))
                listed = [int(address) for address in seen.lists.get(index, ())]
                if listed != frames:
                    raise StepFailed(f"{what}.lists[{index}]", in_words(frames), in_words(listed))
