"""Differences that a rule demands, declared by kind in `intended.yaml`."""

from collections.abc import Callable
from importlib import resources
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from mediator.conformance.run import Facts
from mediator.documents import load_document
from optee.abi.message import NONCONTIG, TYPE_MASK, Command, ParamType
from optee.abi.smc import Function

_TMEM: Final = frozenset({ParamType.TMEM_INPUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT})


def register_refused_in_a0(facts: Facts) -> bool:
    """OP-TEE ended a REGISTER_SHM with an error in a0."""
    return facts.command == Command.REGISTER_SHM and bool(facts.final_answer)


def shm_alloc_refused(facts: Facts) -> bool:
    """The mediator asked the guest to free what it offered for SHM_ALLOC."""
    return facts.asked_free


def malformed_registration(facts: Facts) -> bool:
    """A REGISTER_SHM or UNREGISTER_SHM that has not the one parameter that it needs."""
    if facts.command == Command.UNREGISTER_SHM:
        return len(facts.attributes) != 1
    if facts.command != Command.REGISTER_SHM:
        return False
    if len(facts.attributes) != 1:
        return True
    attribute = facts.attributes[0]
    return (
        attribute & TYPE_MASK not in _TMEM
        or attribute & ~TYPE_MASK != NONCONTIG
        or facts.pointers[0] == 0
        or facts.cookies[0] == 0
    )


def reply_does_not_fit(facts: Facts) -> bool:
    """An RPC reply changes more of the request that OP-TEE made than normal world may."""
    return facts.reply_strays


def buffer_of_another_call(facts: Facts) -> bool:
    """An UNREGISTER_SHM or SHM_FREE names a buffer that a live call made for itself."""
    return facts.names_another_calls_buffer


CONDITIONS: Final[dict[str, Callable[[Facts], bool]]] = {
    condition.__name__: condition
    for condition in (
        register_refused_in_a0,
        shm_alloc_refused,
        malformed_registration,
        reply_does_not_fit,
        buffer_of_another_call,
    )
}


class Declaration(BaseModel):
    """One kind of difference."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rule: Annotated[str, Field(pattern=r"^R([1-9]|[12][0-9])$")]
    step: Literal["probe", "create", "smc", "relinquish"]
    functions: list[str]
    fields: Annotated[list[str], Field(min_length=1)]
    condition: str
    holds: Literal["nothing", "buffer", "quota_pages"]
    why: str

    @field_validator("functions")
    @classmethod
    def _known_functions(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in Function.__members__:
                raise ValueError(f"{name} is no function")
        return names

    @field_validator("condition")
    @classmethod
    def _known_condition(cls, name: str) -> str:
        if name not in CONDITIONS:
            raise ValueError(f"{name} is none of {', '.join(CONDITIONS)}")
        return name

    def covers(self, op: str, facts: Facts, field: str) -> bool:
        """Whether this kind explains a difference of `field` in a step with these facts."""
        if op != self.step or (op == "smc" and facts.function not in {Function[name] for name in self.functions}):
            return False
        nested = field.split(".")[1:] if field.startswith("forwarded[") else []
        if field not in self.fields and not any(name in self.fields for name in nested):
            return False
        return CONDITIONS[self.condition](facts)


class _Declarations(RootModel[list[Declaration]]):
    pass


def declarations() -> list[Declaration]:
    """All declared kinds."""
    text = resources.files(__package__).joinpath("intended.yaml").read_text(encoding="utf-8")
    return load_document(_Declarations, text, "intended.yaml").root
