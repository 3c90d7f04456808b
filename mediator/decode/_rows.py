"""The plain data that decoding makes: rows of words."""

from typing import Any, TypeAlias

from optee.abi.registers import Named, member_of

Decoded: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, str]


def row(at: str, name: str, value: int | str, words: str = "") -> Row:
    """Make a row: where (a register or an offset in bytes), the operand's name, its value, the value in words."""
    return {"at": at, "name": name, "value": value if isinstance(value, str) else hex(value), "words": words}


def word(kind: type[Named], value: int) -> str:
    """Return the name of an enumerated value that a row shows anyway."""
    member = member_of(kind, value)
    return str(member) if isinstance(member, Named) else "unknown"


def count(number: int, noun: str) -> str:
    """Return `1 page`, `2 pages`, `2 addresses`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"
