"""Trace files, "optee-smc-trace/1": JSON lines, gzip'd or not.

Source of the format: the trace-file description. Each event is one line; reading is strict about what the
replay relies on and says file:line for what is wrong.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mediator.documents import DocumentError

FORMAT: Final = "optee-smc-trace/1"
MAX_RAM: Final = 16 << 30
"""Bytes of RAM of a recorded guest: stops a header from having tables built for ever."""
SMALLEST_MESSAGE: Final = 32
"""Bytes of a message without parameters."""
MAX_LINE: Final = 4 << 20
"""Characters of one event: the longest real one, a message with its page lists, has some ten thousand."""


@dataclass(frozen=True, slots=True)
class Header:
    """What was recorded: RAM as (IPA, size) ranges; `client_id` if a mediator stood between."""

    driver: str
    secure_world: str
    between: str
    rpc_params: int
    ram: tuple[tuple[int, int], ...]
    client_id: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Guest bytes at an IPA; `kind` is message, rpc or list."""

    at: int
    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """What the guest was about to do."""

    line: int
    name: str


@dataclass(frozen=True, slots=True)
class CallEvent:
    """The guest executes an SMC with x0..x7; `interrupts` pairs before it were left out."""

    line: int
    id: int
    vcpu: int
    regs: tuple[int, ...]
    memory: tuple[Memory, ...]
    interrupts: int


@dataclass(frozen=True, slots=True)
class ForwardEvent:
    """What reached OP-TEE; `id` is None for the mediator's own calls."""

    line: int
    id: int | None
    regs: tuple[int, ...]
    message: bytes | None
    rpc: bytes | None


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """What OP-TEE answered in x0..x3, and its view of the buffers then."""

    line: int
    id: int | None
    regs: tuple[int, ...]
    message: bytes | None
    rpc: bytes | None


@dataclass(frozen=True, slots=True)
class ReturnEvent:
    """x0..x3 as the guest sees them, and its memory then."""

    line: int
    id: int
    regs: tuple[int, ...]
    memory: tuple[Memory, ...]


TraceEvent = Mark | CallEvent | ForwardEvent | AnswerEvent | ReturnEvent


class _Line:
    """One JSON object, with errors that say where."""

    def __init__(self, place: str, data: dict[str, Any]) -> None:
        self.place = place
        self.data = data

    def fail(self, text: str) -> DocumentError:
        return DocumentError([f"{self.place}: {text}"])

    def number(self, value: Any, name: str, bits: int = 64) -> int:
        if isinstance(value, str):
            try:
                value = int(value, 16)
            except ValueError:
                raise self.fail(f"{name}: {value!r} is no hexadecimal number") from None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise self.fail(f"{name}: a number of at most {bits} bits is wanted")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise self.fail(f"{name}: a count is wanted")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.data.get(name, default)
        if not isinstance(value, str):
            raise self.fail(f"{name}: text is wanted")
        return value

    def regs(self, count: int) -> tuple[int, ...]:
        value = self.data.get("regs")
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(f"regs: {count} registers are wanted")
        return tuple(self.number(word, f"regs[{index}]") for index, word in enumerate(value))

    def hex(self, value: Any, name: str) -> bytes:
        try:
            return bytes.fromhex(value)
        except (TypeError, ValueError):
            raise self.fail(f"{name}: hexadecimal digits are wanted, two for a byte") from None

    def optional_hex(self, name: str) -> bytes | None:
        value = self.data.get(name)
        self.whole(value, name)
        return None if value is None else self.hex(value, name)

    def whole(self, value: Any, name: str) -> None:
        """A message or RPC argument has a header at least."""
        if name != "list" and isinstance(value, str) and len(value) < 2 * SMALLEST_MESSAGE:
            raise self.fail(f"{name}: a message has at least {SMALLEST_MESSAGE} bytes")

    def memory(self) -> tuple[Memory, ...]:
        entries = self.data.get("memory", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self.fail("memory: a list of entries is wanted")
        found = []
        for entry in entries:
            kind = entry.get("is")
            if kind not in ("message", "rpc", "list"):
                raise self.fail(f"memory: {kind!r} is none of message, rpc, list")
            self.whole(entry.get("hex"), kind)
            found.append(Memory(self.number(entry.get("at"), "at"), kind, self.hex(entry.get("hex"), "hex")))
        return tuple(found)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opener = gzip.open if packed else open
        with opener(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DocumentError([f"{path}: truncated or damaged gzip data"]) from None
    except UnicodeDecodeError as error:
        raise DocumentError([f"{path}: not UTF-8 text ({error.reason})"]) from None
    except OSError as error:
        raise DocumentError([f"{path}: {error.strerror or error}"]) from None


def read_trace(path: Path) -> tuple[Header, list[TraceEvent]]:
    """Read a whole trace.

    Raises:
        DocumentError: with file:line of the first thing that is wrong.

    """
    header: Header | None = None
    events: list[TraceEvent] = []
    open_calls: set[int] = set()
    for number, text in enumerate(_lines(path), 1):
        place = f"{path}:{number}"
        if not text.endswith("\n") and len(text) >= MAX_LINE:
            raise DocumentError([f"{place}: a line of more than {MAX_LINE} characters"])
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DocumentError([f"{place}:{error.colno}: not JSON: {error.msg}"]) from None
        except RecursionError:
            raise DocumentError([f"{place}: nested too deeply"]) from None
        except ValueError as error:
            raise DocumentError([f"{place}: not JSON: {str(error).split(':')[0]}"]) from None
        if not isinstance(data, dict):
            raise DocumentError([f"{place}: an object is wanted"])
        line = _Line(place, data)
        if header is None:
            header = _header(line)
            continue
        event = _event(line, number)
        if isinstance(event, CallEvent):
            if event.id in open_calls:
                raise line.fail(f"call {event.id}, which is open")
            open_calls.add(event.id)
        elif isinstance(event, ReturnEvent):
            if event.id not in open_calls:
                raise line.fail(f"return of call {event.id}, which is not open")
            open_calls.remove(event.id)
        events.append(event)
    if header is None:
        raise DocumentError([f"{path}: empty"])
    if not events:
        raise DocumentError([f"{path}: a header and no event"])
    return header, events


def _header(line: _Line) -> Header:
    if line.data.get("format") != FORMAT:
        raise line.fail(f"not a trace: its format is not {FORMAT}")
    ram = line.data.get("ram")
    if not isinstance(ram, list) or not ram or not all(isinstance(entry, dict) for entry in ram):
        raise line.fail("ram: a list of ranges is wanted")
    ranges = tuple((line.number(entry.get("ipa"), "ipa"), line.number(entry.get("size"), "size")) for entry in ram)
    for ipa, size in ranges:
        if ipa % 4096 or size % 4096 or not size or ipa + size > 1 << 48:
            raise line.fail("ram: ranges of whole pages below 2^48 are wanted")
    if sum(size for _, size in ranges) > MAX_RAM or len(ranges) > 64:
        raise line.fail(f"ram: at most 64 ranges and {MAX_RAM >> 30} GiB are replayed")
    client = line.data.get("client_id")
    return Header(
        driver=line.text("driver", ""),
        secure_world=line.text("secure_world", ""),
        between=line.text("between", "nothing"),
        rpc_params=line.count("rpc_params", 4),
        ram=ranges,
        client_id=None if client is None else line.number(client, "client_id", 16),
    )


def _event(line: _Line, number: int) -> TraceEvent:
    kind = line.data.get("e")
    if kind == "call":
        return CallEvent(
            number,
            line.count("id"),
            line.count("vcpu", 0),
            line.regs(8),
            line.memory(),
            line.count("after_interrupts", 0),
        )
    if kind == "return":
        return ReturnEvent(number, line.count("id"), line.regs(4), line.memory())
    if kind in ("forward", "answer"):
        own = line.data.get("id") is None
        identity = None if own else line.count("id")
        message, rpc = line.optional_hex("message"), line.optional_hex("rpc")
        if kind == "forward":
            return ForwardEvent(number, identity, line.regs(8), message, rpc)
        return AnswerEvent(number, identity, line.regs(4), message, rpc)
    if kind == "mark":
        return Mark(number, line.text("name"))
    raise line.fail(f"{kind!r} is none of mark, call, forward, answer, return")
