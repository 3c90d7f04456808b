"""Messages, RPC arguments and page lists in words."""

from collections.abc import Iterable, Iterator
from typing import Any, Final
from uuid import UUID

from mediator.decode._rows import Decoded, Row, count, row, word
from optee.abi import layout
from optee.abi.message import (
    LIST_PAGE_SIZE,
    Attr,
    Command,
    Login,
    Message,
    ProtmemUseCase,
    message_size,
    page_count,
)
from optee.abi.registers import Named, name_of
from optee.abi.rpc import RpcCommand, ShmType
from optee.abi.rpc_operands import Memory, Operand, Operands, Values, operands_of, operation_of

ENTRY_SIZE: Final = int(layout.ADDRESS.sizeof())
UNION_OFFSET: Final = layout.offsets(layout.PLAIN_PARAMETER)["a"]
UUID_SIZE: Final = 16

_IDENTITY_NAMES: Final = ("TA", "client")
"""Whose UUID the META parameters of OPEN_SESSION are."""

_VALUE_KINDS: Final[dict[str, type[Named]]] = {
    "type": ShmType,
    "shm type": ShmType,
    "use case": ProtmemUseCase,
}

_COMMAND_OPERANDS: Final[dict[int, Operands]] = {
    Command.REGISTER_SHM: (Memory("in", "buffer"),),
    Command.UNREGISTER_SHM: (Memory("in", "buffer"),),
    Command.LEND_PROTMEM: (Values("in", "use case"), Memory("in", "memory")),
    Command.RECLAIM_PROTMEM: (Memory("in", "memory"),),
}


def decode_message(data: bytes, *, rpc: bool = False) -> Decoded:
    """Say what a message is, and the RPC argument directly behind it where more bytes are given.

    With `rpc` the bytes are an RPC argument alone. Raises ValueError for fewer bytes than they announce.
    """
    first = _argument(data, rpc=rpc)
    second = None
    rest = data[first["size"] :]
    notes = []
    if any(rest) and not rpc:
        try:
            second = _argument(rest, rpc=True)
        except ValueError as error:
            notes.append(f"no RPC argument behind the message ({error})")
        else:
            rest = rest[second["size"] :]
    if rest:
        notes.append(f"{count(len(rest), 'more byte')}{'' if any(rest) else ', all zero'}")
    return {
        "kind": "message",
        "message": None if rpc else first,
        "rpc_argument": first if rpc else second,
        "notes": notes,
    }


def decode_list(data: bytes) -> Decoded:
    """Say which pages a page list names; every 4096 bytes are a list page, the last of which may be cut short.

    A run of consecutive pages, or one page several times, is one range. Raises ValueError for bytes that are no
    addresses.
    """
    if not data or len(data) % ENTRY_SIZE:
        raise ValueError(f"list: {len(data)} bytes given, an entry has {ENTRY_SIZE}")
    pages = [_list_page(data[at : at + LIST_PAGE_SIZE]) for at in range(0, len(data), LIST_PAGE_SIZE)]
    unaligned = sum(page["unaligned"] for page in pages)
    notes = [f"{count(unaligned, 'address')} not page aligned"] if unaligned else []
    entries = sum(page["entries"] for page in pages)
    return {"kind": "list", "entries": entries, "list_pages": pages, "notes": notes}


def _argument(data: bytes, *, rpc: bool) -> Decoded:
    size = message_size(len(Message.unpack(data).params))
    parsed = layout.MESSAGE.parse(data)
    command = int(parsed.header.cmd)
    kind: type[Named] = RpcCommand if rpc else Command
    operation = None
    operands = _COMMAND_OPERANDS.get(command, ())
    if rpc:
        selector = parsed.params[0].u.get("a") if parsed.params else None
        operation = None if selector is None else operation_of(command, int(selector))
        operands = operands_of(command, operation)
    params = []
    for index, param in enumerate(parsed.params):
        at = message_size(index) + UNION_OFFSET
        operand = operands[index] if index < len(operands) else None
        if not rpc and command == Command.OPEN_SESSION and index < len(_IDENTITY_NAMES) and param.attr.META:
            rows = _identity_rows(at, _IDENTITY_NAMES[index], bytes(param.u.octets))
        else:
            rows = _union_rows(at, param, operand, operation)
        params.append(
            {
                "attr": hex(param.attr),
                "words": str(param.attr),
                "content": operand.content if isinstance(operand, Memory) and "size" in param.u else "",
                "rows": rows,
            }
        )
    return {
        "size": size,
        "command": name_of(kind, command),
        "operation": str(operation) if isinstance(operation, Named) else None,
        "header": _header_rows(parsed.header, kind),
        "params": params,
    }


def _header_rows(header: Any, kind: type[Named]) -> list[Row]:
    rows = []
    for field, at in layout.offsets(layout.MESSAGE_HEADER).items():
        value = header[field]
        words = word(kind, value) if field == "cmd" else str(value) if isinstance(value, Named) else ""
        rows.append(row(f"+{at:#x}", field, int(value), words))
    return rows


def _identity_rows(at: int, name: str, octets: bytes) -> list[Row]:
    rows = [row(f"+{at:#x}", name, str(UUID(bytes=octets[:UUID_SIZE])))]
    rest = int.from_bytes(octets[UUID_SIZE:], "little")
    if name == "client":
        rows.append(row(f"+{at + UUID_SIZE:#x}", "login", rest, word(Login, rest)))
    elif rest:
        rows.append(row(f"+{at + UUID_SIZE:#x}", "unused", rest))
    return rows


def _union_rows(at: int, param: Any, operand: Operand | None, operation: int | None) -> list[Row]:
    member = layout.union_member(param.attr)
    if member == "octets":
        octets = bytes(param.u.octets)
        return [row(f"+{at:#x}", "octets", octets.hex())] if any(octets) else []
    if member == "value" and isinstance(operand, Values):
        return _value_rows(at, param.u, operand, operation)
    rows = []
    for field, offset in layout.offsets(layout.UNION[member]).items():
        value = int(param.u[field])
        words = ""
        if field == "buf_ptr":
            words = _pointer_words(param.attr, value)
        elif field == "size":
            words = count(value, "byte")
            if member == "tmem" and param.attr.NONCONTIG:
                words += f" in {count(page_count(value, int(param.u.buf_ptr) % LIST_PAGE_SIZE), 'page')}"
        rows.append(row(f"+{at + offset:#x}", field, value, words))
    return rows


def _value_rows(at: int, union: Any, operand: Values, operation: int | None) -> list[Row]:
    if operand.a == operand.b == "uuid":
        return _identity_rows(at, "uuid", layout.VALUE.build(union))
    rows = []
    names = zip((operand.a, operand.b, operand.c), layout.offsets(layout.VALUE).items(), strict=True)
    for name, (field, offset) in names:
        value = int(union[field])
        words = ""
        if name == "operation" and operation is not None:
            words = str(operation) if isinstance(operation, Named) else "unknown"
        elif name in _VALUE_KINDS:
            words = word(_VALUE_KINDS[name], value)
        if name or value:
            rows.append(row(f"+{at + offset:#x}", name or field, value, words))
    return rows


def _pointer_words(attr: Attr, pointer: int) -> str:
    if not pointer:
        return "NULL"
    offset = pointer % LIST_PAGE_SIZE
    return f"list at {pointer - offset:#x}, data at byte {offset} of its first page" if attr.NONCONTIG else ""


def _list_page(data: bytes) -> Decoded:
    whole = len(data) == LIST_PAGE_SIZE
    parsed = (layout.LIST_PAGE if whole else layout.PARTIAL_LIST_PAGE).parse(data)
    return {
        "entries": len(parsed.pages),
        "unaligned": sum(bool(address % LIST_PAGE_SIZE) for address in parsed.pages),
        "ranges": [
            {"first": hex(first), "last": hex(last), "pages": pages} for first, last, pages in _runs(parsed.pages)
        ],
        "next": hex(parsed.next) if whole else None,
    }


def _runs(addresses: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last, pages) of each run whose addresses all step by a page, or not at all."""
    first = last = pages = 0
    for address in map(int, addresses):
        step = address - last
        if pages and step in (0, LIST_PAGE_SIZE) and (pages == 1 or step * (pages - 1) == last - first):
            last, pages = address, pages + 1
            continue
        if pages:
            yield first, last, pages
        first, last, pages = address, address, 1
    yield first, last, pages
