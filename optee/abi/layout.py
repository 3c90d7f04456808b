"""Every binary layout of the ABI, declared once with construct; all words are little endian.

These declarations are the specification: the `struct` codecs of the hot path (`optee.abi.message`) are
derived from them by `codec` and `offsets`, and `mediator decode` parses with them. A `cmd` stays a number,
because a message and an RPC argument share the layout but not the words. What an unknown value looks like is
said in `optee.abi.registers`. Source: OP-TEE's message interface header.
"""

import struct
from typing import Any, Final

from construct import (
    Array,
    Bytes,
    Check,
    Construct,
    ExprAdapter,
    FormatField,
    GreedyRange,
    Hex,
    Int16ul,
    Int32ul,
    Int64ul,
    Struct,
    Subconstruct,
    Switch,
    this,
)

from optee.abi.registers import Named, member_of
from optee.abi.results import Origin, Result
from optee.abi.terms import Attr, ParamType

LIST_PAGE_SIZE: Final = 4096
"""Size in bytes of a list page, of the data pages it names, and of the page that a message must fit."""


def _enumerated(word: Construct, kind: type[Named]) -> Construct:
    return ExprAdapter(Hex(word), lambda value, _: member_of(kind, value), lambda value, _: int(value))


_ATTRIBUTE = ExprAdapter(Int64ul, lambda value, _: Attr(value), lambda value, _: int(value))

MESSAGE_HEADER = Struct(
    "cmd" / Int32ul,
    "func" / Hex(Int32ul),
    "session" / Hex(Int32ul),
    "cancel_id" / Hex(Int32ul),
    "pad" / Hex(Int32ul),
    "ret" / _enumerated(Int32ul, Result),
    "ret_origin" / _enumerated(Int32ul, Origin),
    "num_params" / Int32ul,
)

TMEM = Struct("buf_ptr" / Hex(Int64ul), "size" / Hex(Int64ul), "shm_ref" / Hex(Int64ul))
"""Temporary memory: an address, with NONCONTIG that of a page list plus the offset in the first data page."""

RMEM = Struct("offs" / Hex(Int64ul), "size" / Hex(Int64ul), "shm_ref" / Hex(Int64ul))
"""Registered memory: a part of the buffer with the cookie `shm_ref`."""

FMEM = Struct(
    "offs_low" / Hex(Int32ul),
    "offs_high" / Hex(Int16ul),
    "internal_offs" / Hex(Int16ul),
    "size" / Hex(Int64ul),
    "global_id" / Hex(Int64ul),
)
"""Memory shared by FF-A, in the place of RMEM."""

VALUE = Struct("a" / Hex(Int64ul), "b" / Hex(Int64ul), "c" / Hex(Int64ul))

OCTETS = Struct("octets" / Hex(Bytes(24)))
"""Raw bytes: UUID and login of a META parameter, and whatever a parameter of no or unknown type holds."""

UNION: Final = {"tmem": TMEM, "rmem": RMEM, "value": VALUE, "octets": OCTETS}
"""What the 24 bytes behind a parameter's attribute may be."""


def union_member(attr: Attr) -> str:
    """Name the member of the union (a key of `UNION`) that an attribute selects."""
    kind = attr.type
    if attr.META or not isinstance(kind, ParamType) or kind is ParamType.NONE:
        return "octets"
    return kind.name.partition("_")[0].lower()


def _parameter(union: dict[str, Construct]) -> Construct:
    return Struct(
        "attr" / _ATTRIBUTE,
        "u" / Switch(lambda context: union_member(context.attr), union),
    )


PARAMETER = _parameter(UNION)
"""A parameter where SMCs are the transport."""

PARAMETER_FFA = _parameter(UNION | {"rmem": FMEM})
"""A parameter where FF-A is the transport: the attribute's numbers are the same, their meaning is not."""

PLAIN_PARAMETER = Struct("attr" / _ATTRIBUTE, *VALUE.subcons)
"""A parameter before its attribute is looked at: four words, as the hot path reads it."""

MAX_PARAMS: Final = int((LIST_PAGE_SIZE - MESSAGE_HEADER.sizeof()) // PLAIN_PARAMETER.sizeof())

MESSAGE = Struct(
    "header" / MESSAGE_HEADER,
    Check(this.header.num_params <= MAX_PARAMS),
    "params" / Array(this.header.num_params, PARAMETER),
)
"""A message or RPC argument."""

ADDRESS = Hex(Int64ul)

LIST_PAGE = Struct(
    "pages" / Array(LIST_PAGE_SIZE // ADDRESS.sizeof() - 1, ADDRESS),
    "next" / ADDRESS,
)
"""One page of a page list: addresses of data pages, then that of the next list page."""

PARTIAL_LIST_PAGE = Struct("pages" / GreedyRange(ADDRESS))
"""The beginning of a list page that is not full: addresses as far as the bytes go."""


def _format(layout: Construct) -> str:
    if isinstance(layout, FormatField):
        return str(layout.fmtstr).removeprefix("<")
    if isinstance(layout, Struct):
        return "".join(_format(member) for member in layout.subcons)
    if isinstance(layout, Array):
        return _format(layout.subcon) * int(layout.count)
    if isinstance(layout, Subconstruct):
        return _format(layout.subcon)
    raise TypeError(f"{layout!r} has no struct format")


def codec(layout: Any) -> struct.Struct:
    """Derive the `struct` codec of a layout of plain words (structures, arrays and adapters of integers).

    Raises TypeError for a layout whose shape depends on its content.
    """
    return struct.Struct("<" + _format(layout))


def offsets(layout: Any) -> dict[str, int]:
    """Return the offset in bytes of each named member of a structure."""
    result = {}
    position = 0
    for member in layout.subcons:
        result[member.name] = position
        position += member.sizeof()
    return result
