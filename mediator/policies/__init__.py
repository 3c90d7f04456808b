"""Policies as YAML documents: the built-in ones beside this file, and a user's own."""

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mediator.core.mediator import HANDLED
from mediator.core.policy import FlowPolicy, Policy, PolicyLimits, Word, Words
from mediator.documents import DocumentError, Problems, load_document, read_document
from optee.abi.message import META, Attr, Command
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, NsecCapability, SecCapability

BUILT_IN: Final = ("default", "xen", "minimal")

_CAPABILITY_NEEDS: Final = {
    SecCapability.RPC_ARG: {Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG},
    SecCapability.ASYNC_NOTIF: {Function.ENABLE_ASYNC_NOTIF, Function.GET_ASYNC_NOTIF_VALUE},
}
_NEVER_OFFERED: Final = (
    SecCapability.HAVE_RESERVED_SHM,
    SecCapability.VIRTUALIZATION,
    SecCapability.PROTMEM,
    SecCapability.DYNAMIC_PROTMEM,
)
_RPMB_COMMANDS: Final = {RpcCommand.RPMB_PROBE_RESET, RpcCommand.RPMB_PROBE_NEXT, RpcCommand.RPMB_FRAMES}
_NULLABLE: Final = ("calls", "rpc_arguments")
_STATUS_ANSWERS: Final = ("completed", "suspended", "failed", "local")


def _named(enum: Any) -> BeforeValidator:
    def convert(value: object) -> object:
        if isinstance(value, str):
            try:
                return enum[value]
            except KeyError:
                raise ValueError(f"{value!r} is none of {', '.join(enum.__members__)}") from None
        raise ValueError(f"a name is wanted, one of {', '.join(enum.__members__)}")

    return BeforeValidator(convert)


def _word(value: object) -> object:
    try:
        return Word(value)
    except ValueError:
        raise ValueError(f"{value!r} is none of pass, keep, zero") from None


_Function = Annotated[Function, _named(Function)]
_Command = Annotated[Command, _named(Command)]
_RpcCommand = Annotated[RpcCommand, _named(RpcCommand)]
_Nsec = Annotated[NsecCapability, _named(NsecCapability)]
_Sec = Annotated[SecCapability, _named(SecCapability)]
_Word = Annotated[Word, BeforeValidator(_word)]


def _check_reserved(reserved: int, pages: int) -> None:
    if reserved > pages:
        raise ValueError(f"reserved_pages: {reserved} of at most {pages} pages")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


MAX_PAGES: Final = 1 << 32
"""Pages of one quota, and of the pool."""
_Pages = Annotated[int, Field(ge=1, le=MAX_PAGES)]
_Reserved = Annotated[int, Field(ge=0, le=MAX_PAGES)]
_Buffers = Annotated[int, Field(ge=1, le=1 << 20)]
_PagesPerBuffer = Annotated[int, Field(ge=1, le=1 << 24)]
_Arguments = Annotated[int, Field(ge=1, le=1 << 20)] | None
_Calls = Annotated[int, Field(ge=1, le=1 << 16)] | None
_Kib = Annotated[int, Field(ge=16, le=1 << 24)]


class _Limits(_Strict):
    pages: _Pages
    reserved_pages: _Reserved = 0
    buffers: _Buffers
    pages_per_buffer: _PagesPerBuffer
    rpc_arguments: _Arguments = None
    calls: _Calls = None
    memory_kib: _Kib

    def limits(self) -> PolicyLimits:
        """The same as the core wants it."""
        return PolicyLimits(
            pages=self.pages,
            buffers=self.buffers,
            pages_per_buffer=self.pages_per_buffer,
            rpc_arguments=self.rpc_arguments,
            calls=self.calls,
            memory=self.memory_kib * 1024,
            reserved_pages=self.reserved_pages,
        )

    @model_validator(mode="after")
    def _within(self) -> Self:
        _check_reserved(self.reserved_pages, self.pages)
        return self


class QuotaDocument(_Strict):
    """Limits of one guest that are not those of all: what is left out stays as it is."""

    pages: _Pages | None = None
    reserved_pages: _Reserved | None = None
    buffers: _Buffers | None = None
    pages_per_buffer: _PagesPerBuffer | None = None
    rpc_arguments: _Arguments = None
    calls: _Calls = None
    memory_kib: _Kib | None = None

    def apply(self, limits: PolicyLimits) -> PolicyLimits:
        """Return `limits` with what is given changed; null for `calls` or `rpc_arguments` counts as given.

        Raises ValueError if more pages are reserved than allowed then.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        kib = given.pop("memory_kib", None)
        nullable = {name: value for name, value in given.items() if value is not None or name in _NULLABLE}
        changed = replace(limits, **nullable, **({} if kib is None else {"memory": kib * 1024}))
        _check_reserved(changed.reserved_pages, changed.pages)
        return changed


class FlowDocument(_Strict):
    """Flow control as it stands in a file."""

    queue: Annotated[int, Field(ge=1, le=1 << 16)]
    rate: Annotated[float, Field(ge=1, le=1_000_000)] | None = None
    burst: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    park_ms: Annotated[int, Field(ge=1, le=1000)] = 2
    secure_cores: Annotated[int, Field(ge=1, le=1 << 16)] | None = None

    def flow(self) -> FlowPolicy:
        """The same as the core wants it."""
        return FlowPolicy(self.queue, self.rate, self.burst, self.park_ms * 1_000_000, self.secure_cores)


class _Pool(_Strict):
    pages: _Pages | None


class _Capabilities(_Strict):
    nsec: list[_Nsec] | None
    sec: list[_Sec]


class _Rules(_Strict):
    register_attributes: list[Annotated[int, Field(ge=0, lt=1 << 32)]]
    unregister_attributes: list[Annotated[int, Field(ge=0, lt=1 << 32)]] | None
    cookie_zero: bool
    compare_resume_cookie: bool


class PolicyDocument(_Strict):
    """A policy as it stands in a file; `docs/reference/policy.md` explains each key."""

    name: str
    purpose: str
    functions: list[_Function]
    commands: list[_Command]
    rpc_commands: list[_RpcCommand] | None
    capabilities: _Capabilities
    rules: _Rules
    answers: dict[str, Annotated[list[_Word], Field(min_length=3, max_length=3)]]
    limits: _Limits
    guests: dict[str, QuotaDocument] = {}
    pool: _Pool = _Pool(pages=None)
    flow: FlowDocument | None = None
    rpmb_owner: Annotated[str, Field(min_length=1)] | None = None
    shared_pages: list[Annotated[int, Field(ge=4096, multiple_of=4096)]] = []

    @field_validator("guests")
    @classmethod
    def _applicable(cls, guests: dict[str, QuotaDocument], info: ValidationInfo) -> dict[str, QuotaDocument]:
        limits = info.data.get("limits")
        if not isinstance(limits, _Limits):
            return guests  # said there
        for name, quota in guests.items():
            try:
                quota.apply(limits.limits())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return guests

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        functions = set(self.functions)
        unhandled = sorted(function.name for function in functions - HANDLED)
        if unhandled:
            raise ValueError(f"functions: {', '.join(unhandled)}: not for guests (rule R2)")
        offered = self.capabilities.sec
        for capability in _NEVER_OFFERED:
            if capability in offered:
                raise ValueError(f"capabilities: {capability.name} is never offered (rule R4)")
        if SecCapability.RPMB_PROBE in offered and not set(self.rpc_commands or RpcCommand) >= _RPMB_COMMANDS:
            raise ValueError("capabilities: RPMB_PROBE needs the RPC commands RPMB_PROBE_* and RPMB_FRAMES (rule R4)")
        for capability, needs in _CAPABILITY_NEEDS.items():
            missing = needs - functions
            if capability not in offered and needs & functions:
                names = ", ".join(sorted(function.name for function in needs & functions))
                raise ValueError(f"functions: {names} without the capability {capability.name} (rule R4)")
            if capability in offered and missing:
                names = ", ".join(sorted(function.name for function in missing))
                raise ValueError(f"capabilities: {capability.name} needs {names} (rule R4)")
        if Function.CALL_WITH_ARG in functions and Function.RETURN_FROM_RPC not in functions:
            raise ValueError("functions: CALL_WITH_ARG needs RETURN_FROM_RPC")
        known = set(_STATUS_ANSWERS) | {function.name for function in Function}
        for name in self.answers:
            if name not in known:
                raise ValueError(f"answers: {name} is no function")
        for name in _STATUS_ANSWERS:
            if name not in self.answers:
                raise ValueError(f"answers: {name} is missing")
        for attribute in self.rules.register_attributes:
            if attribute & META:
                raise ValueError(f"rules: REGISTER_SHM takes no META parameter ({Attr(attribute)})")
        return self

    def policy(self) -> Policy:
        """The same as the core wants it."""
        limits = self.limits.limits()
        nsec = self.capabilities.nsec
        answers: dict[str, Words] = {name: (words[0], words[1], words[2]) for name, words in self.answers.items()}
        for function in Function:
            answers.setdefault(function.name, answers["completed"])
        sec = SecCapability(0)
        for capability in self.capabilities.sec:
            sec |= capability
        return Policy(
            name=self.name,
            purpose=self.purpose,
            functions=frozenset(self.functions),
            commands=frozenset(self.commands),
            rpc_commands=None if self.rpc_commands is None else frozenset(map(int, self.rpc_commands)),
            nsec_capabilities=0xFFFFFFFF if nsec is None else sum(map(int, nsec)),
            sec_capabilities=sec,
            register_attributes=frozenset(self.rules.register_attributes),
            unregister_attributes=(
                None if self.rules.unregister_attributes is None else frozenset(self.rules.unregister_attributes)
            ),
            cookie_zero=self.rules.cookie_zero,
            compare_resume_cookie=self.rules.compare_resume_cookie,
            answers=answers,
            limits=limits,
            guests={name: quota.apply(limits) for name, quota in self.guests.items()},
            pool_pages=self.pool.pages,
            flow=None if self.flow is None else self.flow.flow(),
            shared_pages=frozenset(self.shared_pages),
            rpmb_owner=self.rpmb_owner,
        )


def read_quota(data: object) -> QuotaDocument:
    """Check limits that came as data. Raises DocumentError, one line each."""
    try:
        return check_quota(data)
    except Problems as problems:
        lines = [f"quota: {'.'.join(map(str, path))}: {text}" for path, text in problems.found]
        raise DocumentError(lines) from None


def check_quota(data: object) -> QuotaDocument:
    """The same for a piece of a document. Raises Problems."""
    try:
        return QuotaDocument.model_validate(data)
    except ValidationError as error:
        raise Problems.of(error) from None


def policy_text(name: str) -> str:
    """The YAML of a built-in policy, as `mediator show policy` prints it."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_policy(name_or_file: str) -> Policy:
    """A built-in policy by name, or one from a YAML file.

    Raises:
        DocumentError: no such policy, or its document is wrong; one line per error, with file:line:column.

    """
    if name_or_file in BUILT_IN:
        document = load_document(PolicyDocument, policy_text(name_or_file), f"{name_or_file}.yaml")
    else:
        path = Path(name_or_file)
        if path.suffix not in (".yaml", ".yml"):
            raise DocumentError([f"policy {name_or_file!r} is none of {', '.join(BUILT_IN)}, and no .yaml file"])
        document = load_document(PolicyDocument, read_document(path), str(path))
    return document.policy()
