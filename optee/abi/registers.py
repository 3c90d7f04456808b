"""Words made of bit fields that print themselves, and how an unknown value looks.

A value that an enumeration does not list stays a plain `int` and is shown in hexadecimal; bits that no field
covers are shown as `unknown=0x...`. Nothing that was read is ever lost or refused for being unknown.
"""

from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import ClassVar, Generic, Self, TypeVar, overload

T = TypeVar("T", bound=int, covariant=True)
E = TypeVar("E", bound="Named")


class Named(IntEnum):
    """An enumeration whose members print as their names; they remain integers in every other respect."""

    def __str__(self) -> str:
        return self.name


def member_of(kind: type[E], value: int) -> E | int:
    """Return the member of `kind` that has this value, or the plain value where there is none."""
    try:
        return kind(value)
    except ValueError:
        return value


def name_of(kind: type[Named], value: int) -> str:
    """Return the member's name, or the value in hexadecimal where the enumeration does not list it."""
    member = member_of(kind, value)
    return str(member) if isinstance(member, Named) else hex(member)


def names_of(kind: type[IntFlag], value: int) -> list[str]:
    """Return the names of all set bits, lowest first; what has no name last, in hexadecimal."""
    names = [flag.name or hex(flag) for flag in kind if value & flag]
    unknown = value & ~sum(kind)
    return [*names, hex(unknown)] if unknown else names


class Field(Generic[T]):
    """A bit field of a `Register`: read as an attribute of the word; see `bit` and `bits`."""

    def __init__(self, msb: int, lsb: int, kind: type[T]) -> None:
        if not msb >= lsb >= 0:
            raise ValueError(f"field [{msb}:{lsb}] is not a bit range")
        self.msb = msb
        self.lsb = lsb
        self.kind = kind
        self.name = ""

    def __set_name__(self, owner: type[object], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, word: None, owner: type[object]) -> Self: ...
    @overload
    def __get__(self, word: int, owner: type[object]) -> T | int: ...
    def __get__(self, word: int | None, owner: type[object]) -> Self | T | int:
        return self if word is None else self.read(word)

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return (1 << self.msb + 1) - (1 << self.lsb)

    def read(self, word: int) -> T | int:
        """Return the field's value as its kind, or as a plain int where the kind does not know it."""
        value = (word & self.mask) >> self.lsb
        try:
            return self.kind(value)
        except ValueError:
            return value

    def text(self, word: int) -> str:
        """Return `name` for a set flag, `name=VALUE` for a value, nothing for a flag or number of zero."""
        value = self.read(word)
        if issubclass(self.kind, Named):
            return f"{self.name}={name_of(self.kind, value)}"
        if not value:
            return ""
        return self.name if self.kind is bool else f"{self.name}={value:#x}"


def bit(position: int) -> Field[bool]:
    """Declare a flag."""
    return Field(position, position, bool)


@overload
def bits(msb: int, lsb: int) -> Field[int]: ...
@overload
def bits(msb: int, lsb: int, kind: type[E]) -> Field[E]: ...
def bits(msb: int, lsb: int, kind: type[int] = int) -> Field[int]:
    """Declare a number, or with `kind` an enumerated value, in the bits msb to lsb (both included)."""
    return Field(msb, lsb, kind)


class Register(int):
    """A word with named fields: `Word(value)` reads one, `Word.build(field=...)` makes one, `str` names it.

    Fields are declared in the class body, in the order in which they are printed:

        class Attr(Register):
            type = bits(7, 0, ParamType)
            META = bit(8)
    """

    fields: ClassVar[tuple[Field[int], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.fields = tuple(value for value in vars(cls).values() if isinstance(value, Field))
        covered = 0
        for field in cls.fields:
            if covered & field.mask:
                raise ValueError(f"{cls.__name__}.{field.name} overlaps another field")
            covered |= field.mask

    @classmethod
    def build(cls, **values: int) -> Self:
        """Make a word from its fields; those not given are 0.

        Raises TypeError for a field that the word does not have, ValueError for a value that does not fit.
        """
        known = {field.name: field for field in cls.fields}
        word = 0
        for name, value in values.items():
            if name not in known:
                raise TypeError(f"{cls.__name__} has no field {name!r}")
            shifted = int(value) << known[name].lsb
            if shifted & ~known[name].mask:
                raise ValueError(f"{cls.__name__}.{name} cannot hold {int(value):#x}")
            word |= shifted
        return cls(word)

    @property
    def unknown(self) -> int:
        """The bits that no field covers, in place."""
        return int(self) & ~sum(field.mask for field in self.fields)

    def _texts(self) -> Iterator[str]:
        for field in self.fields:
            yield field.text(self)
        if self.unknown:
            yield f"unknown={self.unknown:#x}"

    def __str__(self) -> str:
        return ", ".join(filter(None, self._texts())) or "0"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {int(self):#x}: {self}>"
