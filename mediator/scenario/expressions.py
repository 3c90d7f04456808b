"""What a scenario writes where a number or bytes are wanted: numbers, names of the ABI, `$name`, simple arithmetic.

    4096      4 KiB      3 pages      0xffff0006      CALL_WITH_ARG      TMEM_OUTPUT | NONCONTIG
    $message      $list + 8      $answer.a3      $alice.buffer.cookie

Operators are + - * | &, taken from left to right; there are no parentheses.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from mediator.documents import said
from optee.abi.message import META, NONCONTIG, Command, Login, ParamType
from optee.abi.registers import Named
from optee.abi.results import Origin, Result, StorageId
from optee.abi.rpc import FsOperation, NotificationOperation, RpcCommand, ShmType
from optee.abi.smc import Function, NsecCapability, ReturnCode, RpcReturn, SecCapability

WORD: Final = 1 << 64
_LISTED: Final = 16
"""Names of an enumeration that an error message lists; longer ones are in `mediator show abi`."""
MAX_TEXT: Final = 1000
"""Characters of one expression: stops products from growing for ever."""
MAX_SECONDS: Final = 1e9
"""Of virtual time: more than thirty years."""
_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "page": 4096, "pages": 4096}
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>0x[0-9a-fA-F_]+|[0-9][0-9_]*)(?:\s*(?P<unit>KiB|MiB|GiB|pages?)\b)?"
    r"|\$(?P<reference>[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_][A-Za-z0-9_-]*)*)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)?)"
    r"|(?P<operator>[-+*|&]))"
)
_DURATION: Final = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|min|h)\Z")
_QUALIFIED: Final[Mapping[str, Any]] = {
    kind.__name__: kind
    for kind in (
        Command,
        FsOperation,
        Function,
        Login,
        NotificationOperation,
        NsecCapability,
        Origin,
        ParamType,
        Result,
        ReturnCode,
        RpcCommand,
        RpcReturn,
        SecCapability,
        ShmType,
        StorageId,
    )
}
_OPERATORS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "|": lambda a, b: a | b,
    "&": lambda a, b: a & b,
}


class EvaluationError(ValueError):
    """A name that does not exist (yet), or stands for something else than what is wanted."""


@dataclass(frozen=True)
class Record:
    """What a step gave a name to.

    number: what `$name` is where a number is wanted, such as the address of pages. fields: `$name.field`.
    thing: the object behind it, for the steps that know its kind.
    """

    kind: str
    number: int | None = None
    fields: Mapping[str, "Value"] = field(default_factory=dict)
    thing: object = None


Value = int | bytes | Record


class Names(Protocol):
    """Where names are looked up."""

    def look_up(self, name: str) -> Value:
        """What a name stands for. Raises EvaluationError."""
        ...


class _Nothing:
    """No names: for what refers to nothing."""

    def look_up(self, name: str) -> Value:
        raise EvaluationError(f"${name} is not known here")


NOTHING: Final = _Nothing()


class Expression:
    """One such text, parsed. `references` are the names that it needs, `names` those of the ABI that it has."""

    __slots__ = ("_first", "_rest", "names", "references", "text")

    def __init__(self, source: object, names: Mapping[str, int]) -> None:
        self.text = source if isinstance(source, str) else str(source)
        self.references: list[tuple[str, ...]] = []
        self.names: list[str] = []
        if isinstance(source, int) and not isinstance(source, bool):
            if not -WORD // 2 <= source < WORD:
                raise ValueError(f"{source:#x} is more than 64 bits")
            self._first: int | tuple[str, ...] = source
            self._rest: list[tuple[str, int | tuple[str, ...]]] = []
            return
        if not isinstance(source, str):
            raise ValueError(f"a number, a name or $name is wanted, not {said(source)}")
        if len(source) > MAX_TEXT:
            raise ValueError(f"{len(source)} characters, where a number or a name is wanted")
        terms, operators = self._scan(source, names)
        self._first, self._rest = terms[0], list(zip(operators, terms[1:], strict=True))
        self.references = [term for term in terms if isinstance(term, tuple)]

    def __repr__(self) -> str:
        return self.text

    def _scan(self, source: str, names: Mapping[str, int]) -> tuple[list[int | tuple[str, ...]], list[str]]:
        terms: list[int | tuple[str, ...]] = []
        operators: list[str] = []
        at = 0
        while at < len(source.rstrip()):
            found = _TOKEN.match(source, at)
            if found is None:
                raise ValueError(f"{source!r}: cannot be read from {source[at:]!r} on")
            at = found.end()
            operator = found["operator"]
            if (operator is None) is (len(terms) > len(operators)):
                raise ValueError(f"{source!r}: {'an operator' if operator is None else 'a term'} is missing")
            if operator is not None:
                operators.append(operator)
            elif found["number"] is not None:
                digits = found["number"].replace("_", "")
                terms.append(int(digits, 16 if digits.startswith("0x") else 10) * _UNITS.get(found["unit"], 1))
            elif found["reference"] is not None:
                terms.append(tuple(found["reference"].split(".")))
            else:
                terms.append(_named(found["name"], names))
                self.names.append(found["name"])
        if len(terms) != len(operators) + 1:
            raise ValueError(f"{source!r}: a term is missing")
        return terms, operators

    def value(self, names: Names) -> Value:
        """What it stands for. Raises EvaluationError."""
        first = _term(self._first, names)
        if not self._rest:
            return first
        number = as_number(first, self.text)
        for operator, term in self._rest:
            number = _OPERATORS[operator](number, as_number(_term(term, names), self.text))
        return number

    @property
    def constant(self) -> int | None:
        """What it is whatever happens, with its sign; None where that depends on a `$name`."""
        return None if self.references else as_number(self.value(NOTHING), self.text)

    def number(self, names: Names) -> int:
        """The same as a number of 64 bits; a negative one is its two's complement. Raises EvaluationError."""
        number = as_number(self.value(names), self.text)
        if not -WORD // 2 <= number < WORD:
            raise EvaluationError(f"{self.text} is {number:#x}, more than 64 bits")
        return number % WORD


def _named(name: str, names: Mapping[str, int]) -> int:
    kind, _, member = name.partition(".")
    if member:
        if kind in _QUALIFIED and member in _QUALIFIED[kind].__members__:
            return int(_QUALIFIED[kind][member])
    elif name in names:
        return names[name]
    known = f" (known here: {', '.join(names)})" if 0 < len(names) <= _LISTED else ""
    raise ValueError(f"{name!r} is no name of the ABI that fits here{known}")


def _term(term: int | tuple[str, ...], names: Names) -> Value:
    if isinstance(term, int):
        return term
    value = names.look_up(term[0])
    for at, part in enumerate(term[1:], 1):
        if not isinstance(value, Record) or part not in value.fields:
            known = f"; it has {', '.join(value.fields)}" if isinstance(value, Record) and value.fields else ""
            raise EvaluationError(f"${'.'.join(term[:at])} has no {part!r}{known}")
        value = value.fields[part]
    return value


def as_number(value: Value, text: str) -> int:
    """A value as a number. Raises EvaluationError for what has none."""
    if isinstance(value, Record):
        if value.number is None:
            raise EvaluationError(f"{text} is a {value.kind}, where a number is wanted")
        return value.number
    if isinstance(value, bytes):
        raise EvaluationError(f"{text} is {len(value)} bytes, where a number is wanted")
    return value


_TEXT: Final = PlainSerializer(str, return_type=str)


def _number_schema(names: Mapping[str, int]) -> WithJsonSchema:
    """For editors: what an expression looks like, with the names that it may have."""
    named = "|".join([*names, rf"({'|'.join(_QUALIFIED)})\.\w+"])
    number = r"(0x[0-9a-fA-F_]+|[0-9][0-9_]*)(\s*(KiB|MiB|GiB|pages?))?"
    term = rf"({number}|\$[A-Za-z_][\w-]*(\.\w[\w-]*)*|{named})"
    pattern = rf"^\s*{term}(\s*[-+*|&]\s*{term})*\s*$"
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": -WORD // 2, "maximum": WORD - 1},
                {"type": "string", "maxLength": MAX_TEXT, "pattern": pattern},
            ]
        },
        mode="validation",
    )


def _expression(*kinds: type[Named], **more: int) -> tuple[BeforeValidator, WithJsonSchema, PlainSerializer]:
    """What makes an `Expression` of a piece of a document, with the names of these enumerations, and `more`."""
    names = {member.name: int(member) for kind in kinds for member in kind} | more

    def read(source: object) -> Expression:
        return source if isinstance(source, Expression) else Expression(source, names)

    return BeforeValidator(read), _number_schema(names), _TEXT


def _as_seconds(value: object) -> object:
    if isinstance(value, str):
        found = _DURATION.match(value)
        if found is None:
            raise ValueError(f"{value!r} is no time: a number of seconds, or one with us, ms, s, min, h")
        return float(found[1]) * _SECONDS[found[2]]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def where_constant(check: Callable[[int], object]) -> AfterValidator:
    """Have a number that does not depend on a `$name` checked when the file is read. `check` raises EvaluationError."""

    def checked(expression: Expression) -> Expression:
        if expression.constant is not None:
            check(expression.constant)
        return expression

    return AfterValidator(checked)


Number = Annotated[Expression, *_expression()]
"""Any number; names of the ABI are written with their kind here, such as `RpcCommand.SHM_ALLOC`."""
FunctionId = Annotated[Expression, *_expression(Function)]
Status = Annotated[Expression, *_expression(ReturnCode, RpcReturn)]
ResultCode = Annotated[Expression, *_expression(Result)]
OriginCode = Annotated[Expression, *_expression(Origin)]
MessageCommand = Annotated[Expression, *_expression(Command, RpcCommand)]
Attribute = Annotated[Expression, *_expression(ParamType, META=META, NONCONTIG=NONCONTIG)]
Seconds = Annotated[
    float,
    BeforeValidator(_as_seconds),
    Field(ge=0, le=MAX_SECONDS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": MAX_SECONDS},
                {"type": "string", "pattern": _DURATION.pattern.replace(r"\Z", "$")},
            ]
        }
    ),
]
"""Virtual time: a number of seconds, or text such as `500 ms`."""
