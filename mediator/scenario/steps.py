"""What every step has, and what it is done by: the base of all step models, and the actor that does them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, WithJsonSchema, model_validator

from mediator.scenario.expressions import Expression, Number

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

NAME = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
"""A name that a step gives to something; `$name` is that thing."""


class Strict(BaseModel):
    """A piece of a scenario: unknown keys are errors, and it knows where it stands."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    _place: str = PrivateAttr(default="")

    @property
    def place(self) -> str:
        """file:line of this piece."""
        return self._place

    def stand_at(self, place: str) -> None:
        """Set `place`: the loader does."""
        self._place = place


class StepFailed(Exception):
    """A step did not do what its scenario expects.

    what: the thing that was looked at; expected, got: in words.
    """

    def __init__(self, what: str, expected: str, got: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}")
        self.what = what
        self.expected = expected
        self.got = got
        self.place = ""
        self.step = ""
        self.guest: str | None = None


class Step(Strict):
    """One step. `guest` says whose it is; steps inside inherit it."""

    verb: ClassVar[str]
    """The key that makes a mapping this step."""
    needs_guest: ClassVar[bool] = True
    needs_driver: ClassVar[bool] = False

    guest: Name | None = None
    comment: str | None = None

    async def run(self, actor: Actor) -> None:
        """Do it. Raises StepFailed, EvaluationError."""
        raise NotImplementedError

    def definitions(self) -> Sequence[str]:
        """Names that this step itself defines."""
        name = getattr(self, "name", None)
        return [] if name is None else [name]

    def words(self) -> str:
        """The step in a line, for reports."""
        value = getattr(self, self.verb, None)
        simple = isinstance(value, str | int | float | Expression)
        return f"{self.verb}: {value}" if simple else self.verb


class Content(Strict):
    """Bytes: exactly one of the keys, but that `fill` goes with `size`."""

    hex: Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^(\s*[0-9a-fA-F]{2})*\s*$"})] | None = None
    """Hexadecimal digits, two for a byte."""
    text: str | None = None
    random: Number | None = None
    """So many bytes that only the seed decides."""
    zeros: Number | None = None
    """So many zero bytes."""
    fill: Number | None = None
    """`size` bytes of this value."""
    size: Number | None = None
    words: list[Number] | None = None
    """64-bit words, little endian."""
    sha256: Octets | None = None
    """The digest of other bytes."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None and key != "size"]
        if len(given) != 1:
            raise ValueError("bytes are one of hex, text, random, zeros, fill with size, words, sha256")
        if (self.fill is None) is not (self.size is None):
            raise ValueError("fill and size go together")
        if self.hex is not None:
            try:
                bytes.fromhex(self.hex)
            except ValueError:
                raise ValueError("hex: hexadecimal digits are wanted, two for a byte") from None
        return self

    def data(self, actor: Actor) -> bytes:
        """The bytes. Raises EvaluationError."""
        import hashlib

        if self.hex is not None:
            return bytes.fromhex(self.hex)
        if self.text is not None:
            return self.text.encode()
        if self.random is not None:
            return actor.random_bytes(actor.size(self.random))
        if self.zeros is not None:
            return bytes(actor.size(self.zeros))
        if self.words is not None:
            return b"".join(actor.number(word).to_bytes(8, "little") for word in self.words)
        if self.fill is not None:
            assert self.size is not None
            return bytes([actor.number(self.fill) & 0xFF]) * actor.size(self.size)
        assert self.sha256 is not None
        return hashlib.sha256(octets(self.sha256, actor)).digest()


Octets = Annotated[
    Annotated[Content, Tag("<bytes>")] | Annotated[Number, Tag("<name>")],
    Discriminator(lambda given: "<bytes>" if isinstance(given, dict | Content) else "<name>"),
]
"""Bytes written down, or `$name` of something that holds bytes."""


def octets(source: Content | Expression, actor: Actor) -> bytes:
    """The bytes of such a place. Raises EvaluationError."""
    if isinstance(source, Content):
        return source.data(actor)
    return actor.octets(source)


class Range(Strict):
    """A number that is not known exactly."""

    at_least: Number | None = None
    at_most: Number | None = None


Expected = Annotated[
    Annotated[Range, Tag("<range>")] | Annotated[Number, Tag("<number>")],
    Discriminator(lambda given: "<range>" if isinstance(given, dict | Range) else "<number>"),
]
"""A number, or a range."""
Numbers = Annotated[
    Annotated[list[Number], Tag("<list>")] | Annotated[Number, Tag("<number>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<number>"),
]
"""A number, or a list of them."""
ExpectedNumbers = Annotated[
    Annotated[list[Expected], Tag("<list>")] | Annotated[Expected, Tag("<number>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<number>"),
]


def check_number(what: str, expected: Range | Expression, got: int, actor: Actor, show: Any = str) -> None:
    """Compare a number. Raises StepFailed."""
    if isinstance(expected, Range):
        least = None if expected.at_least is None else actor.number(expected.at_least)
        most = None if expected.at_most is None else actor.number(expected.at_most)
        if (least is not None and got < least) or (most is not None and got > most):
            words = [f"at least {show(least)}"] if least is not None else []
            words += [f"at most {show(most)}"] if most is not None else []
            raise StepFailed(what, " and ".join(words), show(got))
        return
    wanted = actor.number(expected)
    if wanted != got:
        raise StepFailed(what, show(wanted), show(got))


Content.model_rebuild()
