"""What a user asks for: a board, a build's conf.mk, a YAML document, options; the later overrides the earlier."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mediator.documents import DocumentError, load_document, read_bytes
from optee.memory.boards import BOARDS
from optee.memory.build import KIB, MIB, Build
from optee.memory.build_files import (
    BOUNDS,
    OPTIONS,
    FileError,
    read_conf,
    read_ta_elf,
    read_ta_header,
)
from optee.memory.profile import SET_UPS, SMALL_TA, TEST_PROGRAM, TaProfile
from optee.memory.sizing import Load

T = TypeVar("T")
R = TypeVar("R")

DEFAULT_BUFFER: Final = 64 * KIB
"""Bytes of a shared buffer where none are given: what a client library passes at once."""
MAX_GUESTS: Final = 65535
"""Client ids have 16 bits."""
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?|0x[0-9a-fA-F]+)\s*([KMG]?)(?:iB|B)?\Z")
_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": 1 << 30}
_LARGEST: Final = 1 << 40


def parse_size(text: str) -> int:
    """Bytes of "65536", "0x10000", "64K", "14.5M" or "1GiB". Raises ValueError."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size such as 65536, 64K or 15M")
    number, unit = match.groups()
    size = int(number, 16) if number.startswith("0x") else float(number)
    size = int(size * _UNITS[unit])
    if size > _LARGEST:
        raise ValueError(f"{text!r} is more than any board has")
    return size


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


_Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=_LARGEST)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Build(_Strict):
    threads: int | None = None
    heap: _Size | None = None
    nexus_heap: _Size | None = None
    best_fit: bool | None = None
    prealloc: bool | None = None
    table_entries: int | None = None
    lpae: bool | None = None
    virtualization: bool | None = None
    guest_count: int | None = None
    secure_ram: _Size | None = None
    tee_ram: _Size | None = None
    cores: int | None = None
    bignum_bits: int | None = None
    dynamic_shm: bool | None = None
    dynamic_config: bool | None = None


class _Ta(_Strict):
    name: str
    code: _Size | None = None
    stack: _Size | None = None
    heap: _Size | None = None
    parameters: list[_Size] = Field(default=[], max_length=4)
    sessions: Annotated[int, Field(ge=1, le=65535)] = 1
    single_instance: bool = False
    set_ups: dict[str, Annotated[int, Field(ge=0, le=65535)]] = {}


class SizeDocument(_Strict):
    """A YAML file for `mediator size`; docs/reference/size.md explains each key."""

    board: str | None = None
    build: _Build = _Build()
    guests: Annotated[int, Field(ge=1, le=MAX_GUESTS)] | None = None
    tas: Annotated[list[_Ta], Field(min_length=1, max_length=64)] | None = None
    buffer: _Size | None = None
    buffers: Annotated[int, Field(ge=0, le=1 << 20)] = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A build and a load, and where each value of the build comes from."""

    build: Build
    load: Load
    sources: dict[str, str]
    """By field of `Build`; what is not here is OP-TEE's default."""


@dataclass(slots=True)
class Options:
    """Options of the command line; None for what was not given."""

    file: Path | None = None
    board: str | None = None
    conf: Path | None = None
    ta: Path | None = None
    guests: int | None = None
    build: dict[str, int | bool] | None = None
    profile: dict[str, Any] | None = None
    rsa: int | None = None
    buffer: int | None = None
    buffers: int | None = None


def make_request(options: Options) -> Request:
    """Put everything together. Raises DocumentError."""
    sources: dict[str, str] = {}
    build = Build()
    document = SizeDocument()
    if options.file is not None:
        document = load_document(SizeDocument, _read_text(options.file), str(options.file))
    board = options.board or document.board
    if board is not None:
        if board not in BOARDS:
            raise DocumentError([f"board {board!r} is none of {', '.join(BOARDS)}"])
        build = BOARDS[board].build
        sources |= {name: f"board {board}" for name in OPTIONS if getattr(build, name) != getattr(Build(), name)}
    if options.conf is not None:
        found = _file_error(read_conf, _read_text(options.conf), str(options.conf))
        build = found.onto(build)
        sources |= {name: f"{options.conf}:{line}" for name, line in found.lines.items()}
    written = {name: value for name, value in document.build.model_dump().items() if value is not None}
    build, sources = _override(build, sources, written, str(options.file))
    build, sources = _override(build, sources, options.build or {}, "option")
    guests = options.guests or document.guests
    if "guest_count" not in sources and board is None and build.virtualization:
        build = replace(build, guest_count=guests or 1)
    if guests is None:
        guests = build.guest_count if build.virtualization and board is not None else 1
    buffers = document.buffers if options.buffers is None else options.buffers
    load = Load(guests, _tas(options, document), options.buffer or document.buffer or DEFAULT_BUFFER, buffers)
    return Request(build, load, sources)


def _override(
    build: Build, sources: dict[str, str], values: dict[str, Any], source: str
) -> tuple[Build, dict[str, str]]:
    for name, value in values.items():
        if name in BOUNDS:
            low, high = BOUNDS[name]
            if not low <= value <= high:
                raise DocumentError([f"{source}: {name} ({OPTIONS[name]}): {value} is not from {low} to {high}"])
    return replace(build, **values), sources | dict.fromkeys(values, source)


def _tas(options: Options, document: SizeDocument) -> tuple[TaProfile, ...]:
    tas = tuple(_profile(ta) for ta in document.tas or ())
    if options.ta is not None:
        tas = (read_ta(options.ta), *tas)
    given = options.profile or {}
    if not tas:
        # Any size of one's own makes it a TA of one's own, of the usual size where nothing is said.
        usual = TEST_PROGRAM if options.board is None and document.board is None else replace(SMALL_TA, heap=None)
        tas = (TaProfile("TA") if given.keys() & {"heap", "stack", "code", "parameters"} else usual,)
    first = replace(tas[0], **given)
    if options.rsa:
        first = replace(first, set_ups=(*first.set_ups, ("rsa-sign", options.rsa)))
    return (first, *tas[1:])


def _profile(ta: _Ta) -> TaProfile:
    unknown = sorted(ta.set_ups.keys() - set(SET_UPS))
    if unknown:
        raise DocumentError([f"TA {ta.name}: set_ups: {unknown[0]!r} is none of {', '.join(SET_UPS)}"])
    given = {key: value for key in ("code", "stack", "heap") if (value := getattr(ta, key)) is not None}
    return TaProfile(
        ta.name,
        parameters=tuple(ta.parameters),
        sessions=ta.sessions,
        single_instance=ta.single_instance,
        set_ups=tuple(ta.set_ups.items()),
        **given,
    )


def read_ta(path: Path) -> TaProfile:
    """A TA's header file or ELF file. Raises DocumentError."""
    data = read_bytes(path)
    if data[:4] == b"\x7fELF":
        return _file_error(read_ta_elf, data, str(path))
    return _file_error(read_ta_header, _text(path, data), str(path))


def _file_error(read: Callable[[T, str], R], content: T, name: str) -> R:
    try:
        return read(content, name)
    except FileError as error:
        raise DocumentError([str(error)]) from None


def _read_text(path: Path) -> str:
    return _text(path, read_bytes(path))


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DocumentError([f"{path}: neither UTF-8 text nor an ELF file"]) from None
