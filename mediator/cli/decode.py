"""`mediator decode`: registers, messages and page lists in words."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit, emit_json

if TYPE_CHECKING:
    from mediator.decode import Decoded

FORMAT: Final = "mediator-decode/1"
STANDARD_INPUT: Final = "-"

_HEX_WORD: Final = re.compile(r"(0[xX])?[0-9a-fA-F_]+\Z")
_HEX_TEXT: Final = re.compile(rb"\s*(0[xX])?[0-9a-fA-F\s]*\Z")


def decode(
    registers: Annotated[
        list[str] | None,
        typer.Argument(metavar="REGS...", help="x0 and what follows it, up to x7: hexadecimal or decimal."),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", metavar="HEX|FILE", help="A message: digits, or a file of digits or bytes (-: input)."
        ),
    ] = None,
    page_list: Annotated[
        str | None, typer.Option("--list", metavar="HEX|FILE", help="A page list, in the same forms.")
    ] = None,
    rpc: Annotated[bool, typer.Option("--rpc", help="The message is an RPC argument.")] = False,
    json: Json = False,
) -> int:
    """Say what registers, a message or a page list mean."""
    given = [thing for thing in (registers or None, message, page_list) if thing is not None]
    if len(given) != 1:
        raise BadInput("decode: registers, --message or --list is wanted, and one of them at a time")
    if rpc and message is None:
        raise BadInput("decode: --rpc goes with --message")
    decoded = _decode(registers or [], message, page_list, rpc)
    if json:
        emit_json({"format": FORMAT, **decoded})
    else:
        from mediator.decode import render

        emit(render(decoded))
    return GOOD


def _decode(registers: list[str], message: str | None, page_list: str | None, rpc: bool) -> "Decoded":
    from mediator.decode import decode_list, decode_message, decode_registers

    try:
        if message is not None:
            return decode_message(_bytes(message), rpc=rpc)
        if page_list is not None:
            return decode_list(_bytes(page_list))
        return decode_registers([_number(text) for text in registers])
    except ValueError as error:
        raise BadInput(f"decode: {error}") from None


def _number(text: str) -> int:
    """A register: 0x... is hexadecimal, digits alone are decimal, digits with letters hexadecimal."""
    if not text.isascii() or not _HEX_WORD.match(text):
        raise BadInput(f"decode: {text!r} is no number")
    try:
        return int(text, 16 if text[:2] in ("0x", "0X") or not text.replace("_", "").isdigit() else 10)
    except ValueError:
        raise BadInput(f"decode: {text!r} is no number") from None


def _bytes(text: str) -> bytes:
    """Bytes given as digits or as a file."""
    from mediator.documents import MAX_FILE, read_bytes

    if text == STANDARD_INPUT:
        return _digits_or_bytes(sys.stdin.buffer.read(MAX_FILE))
    if _HEX_TEXT.match(text.encode()) and not _is_file(text):
        return _digits(text.encode(), "the digits")
    return _digits_or_bytes(read_bytes(Path(text)))


def _is_file(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:
        # A message of four parameters has more digits than a file name may have.
        return False


def _digits_or_bytes(data: bytes) -> bytes:
    return _digits(data, "the file's digits") if _HEX_TEXT.match(data) else data


def _digits(text: bytes, what: str) -> bytes:
    words = text.decode("ascii").strip().removeprefix("0x").removeprefix("0X")
    try:
        return bytes.fromhex(words)
    except ValueError:
        raise BadInput(f"decode: {what} are not whole bytes: two hexadecimal digits each") from None
