"""Messages in shared memory: the codecs of the hot path, derived from `optee.abi.layout`.

A message is a header and its parameters, little endian; an RPC argument has the same layout. With
CALL_WITH_RPC_ARG and CALL_WITH_REGD_ARG the RPC argument follows the message directly. Source: OP-TEE's
message interface header.
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from optee.abi import layout
from optee.abi.layout import LIST_PAGE_SIZE, MAX_PARAMS
from optee.abi.terms import (
    CACHE_PREDEFINED,
    META,
    NONCONTIG,
    TYPE_MASK,
    Attr,
    Command,
    Login,
    ParamType,
    ProtmemUseCase,
)

__all__ = [
    "CACHE_PREDEFINED",
    "ENTRIES_PER_PAGE",
    "FMEM_INVALID_GLOBAL_ID",
    "HEADER",
    "HEADER_SIZE",
    "LIST_PAGE_SIZE",
    "MAX_PARAMS",
    "META",
    "NONCONTIG",
    "OFFSET_NUM_PARAMS",
    "OFFSET_PARAMS",
    "OFFSET_RET",
    "OFFSET_RET_ORIGIN",
    "OFFSET_SESSION",
    "PARAM",
    "PARAM_SIZE",
    "TYPE_MASK",
    "Attr",
    "Command",
    "Header",
    "Login",
    "Message",
    "Param",
    "ParamType",
    "ProtmemUseCase",
    "list_pages",
    "message_size",
    "page_count",
]

HEADER: Final = layout.codec(layout.MESSAGE_HEADER)
"""Eight u32, the fields of `Header`."""

PARAM: Final = layout.codec(layout.PLAIN_PARAMETER)
"""Four u64, the fields of `Param`."""

HEADER_SIZE: Final = HEADER.size
PARAM_SIZE: Final = PARAM.size

_HEADER_OFFSETS = layout.offsets(layout.MESSAGE_HEADER)
OFFSET_SESSION: Final = _HEADER_OFFSETS["session"]
OFFSET_RET: Final = _HEADER_OFFSETS["ret"]
OFFSET_RET_ORIGIN: Final = _HEADER_OFFSETS["ret_origin"]
OFFSET_NUM_PARAMS: Final = _HEADER_OFFSETS["num_params"]
OFFSET_PARAMS: Final = HEADER_SIZE

ENTRIES_PER_PAGE: Final = layout.offsets(layout.LIST_PAGE)["next"] // 8
"""Data pages that one page of a page list names; the word behind them is the address of the next one."""

FMEM_INVALID_GLOBAL_ID: Final = 0xFFFFFFFFFFFFFFFF


class Header(NamedTuple):
    """The header as numbers."""

    cmd: int
    func: int
    session: int
    cancel_id: int
    pad: int
    ret: int
    ret_origin: int
    num_params: int


class Param(NamedTuple):
    """A parameter as numbers.

    a, b, c are the values; or buf_ptr, size, shm_ref of TMEM; or offs, size, shm_ref of RMEM. `attr` fits
    `Attr` (which prints itself).
    """

    attr: int
    a: int = 0
    b: int = 0
    c: int = 0


@dataclass(slots=True)
class Message:
    """A message, or an RPC argument, as a whole."""

    cmd: int
    func: int = 0
    session: int = 0
    cancel_id: int = 0
    pad: int = 0
    ret: int = 0
    ret_origin: int = 0
    params: list[Param] = field(default_factory=list)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a message from the beginning of `data`; bytes behind it are not looked at.

        Raises ValueError where `data` is shorter than the message or num_params is above MAX_PARAMS.
        """
        if len(data) < HEADER_SIZE:
            raise ValueError(f"message: {len(data)} bytes given, a header has {HEADER_SIZE}")
        *_, num_params = header = Header._make(HEADER.unpack_from(data))
        if num_params > MAX_PARAMS:
            raise ValueError(f"message: {num_params} parameters, at most {MAX_PARAMS} fit a page")
        size = message_size(num_params)
        if len(data) < size:
            raise ValueError(f"message: {len(data)} bytes given, {num_params} parameters make {size}")
        params = [Param._make(words) for words in PARAM.iter_unpack(data[HEADER_SIZE:size])]
        return cls(*header[:-1], params)

    def pack(self) -> bytes:
        """Return the message's bytes.

        Raises ValueError for more than MAX_PARAMS parameters, `struct.error` for a number that does not fit.
        """
        if len(self.params) > MAX_PARAMS:
            raise ValueError(f"message: {len(self.params)} parameters, at most {MAX_PARAMS} fit a page")
        return HEADER.pack(*self.header) + b"".join(PARAM.pack(*param) for param in self.params)

    @property
    def header(self) -> Header:
        """The header, with num_params counted."""
        return Header(
            self.cmd,
            self.func,
            self.session,
            self.cancel_id,
            self.pad,
            self.ret,
            self.ret_origin,
            len(self.params),
        )


def message_size(num_params: int) -> int:
    """Return the bytes that a message with so many parameters takes."""
    return HEADER_SIZE + num_params * PARAM_SIZE


def page_count(size: int, offset: int) -> int:
    """Return how many pages a buffer of `size` bytes covers that starts `offset` bytes into its first page.

    An empty buffer at offset 0 covers none; OP-TEE, whose unsigned arithmetic wraps there, refuses it.
    """
    return (size + offset - 1) // LIST_PAGE_SIZE + 1


def list_pages(pages: int) -> int:
    """Return how many list pages it takes to name so many data pages."""
    return -(-pages // ENTRIES_PER_PAGE)
