"""Trace files that are no good: one line with file and line number, and nothing worse."""

import gzip
import json
import tracemalloc
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediator.documents import DocumentError
from mediator.policies import load_policy
from mediator.trace import format as trace_format
from mediator.trace.format import AnswerEvent, CallEvent, ForwardEvent, Mark, Memory, ReturnEvent, read_trace
from mediator.trace.replay import replay
from tests.shared import SHARED, needs_shared
from tests.trace.stories import argument_cycle, done, mediated, story
from tests.trace.tapes import BASE, Tape

DEFAULT, XEN = load_policy("default"), load_policy("xen")


def refusal(path: Path, line: int | None) -> str:
    """The one line of the error: of the file, or of a line in it."""
    with pytest.raises(DocumentError) as caught:
        replay(path, DEFAULT)
    (text,) = caught.value.lines
    assert "\n" not in text
    assert text.startswith(f"{path}: " if line is None else f"{path}:{line}:"), text
    return text


def lines_of(tape: Tape) -> list[Any]:
    return [json.loads(line) for line in tape.lines()]


def put(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def small() -> Tape:
    """Every event kind, and every field of each."""
    tape = mediated()
    tape.header["client_id"] = 5
    tape.add("mark", name="start")
    call, data = argument_cycle(tape, 0xFFFF_0000_1234_0000, BASE + 0x9000)
    tape.answer(call, (0,), message=done(data), rpc=data)
    tape.back(
        call, 0, 0, BASE + 0x9000, 0, memory=[{"at": hex(BASE + 0x1000), "is": "message", "hex": done(data).hex()}]
    )
    tape.events[-4]["after_interrupts"] = 3
    return tape


# What is read


def test_every_event_and_field_is_read(tmp_path: Path) -> None:
    header, events = read_trace(small().write(tmp_path / "t.jsonl"))
    assert (header.client_id, header.ram, header.rpc_params) == (5, ((BASE, 128 << 20),), 4)
    assert (header.driver, header.secure_world, header.between) == ("test", "test", "a mediator")
    assert {type(event) for event in events} == {Mark, CallEvent, ForwardEvent, AnswerEvent, ReturnEvent}
    assert [event.line for event in events] == list(range(2, len(events) + 2))
    own = [event for event in events if isinstance(event, ForwardEvent) and event.id is None]
    assert len(own) == 4 and own[0].regs[0] == 0xBF00FF01 and own[0].message is None
    calls = [event for event in events if isinstance(event, CallEvent)]
    assert all(len(call.regs) == 8 for call in calls) and calls[0].memory[0].at == BASE + 0x1000
    assert isinstance(calls[0].memory[0], Memory) and calls[0].memory[0].kind == "message"
    assert any(event.interrupts == 3 for event in calls)


@needs_shared
@pytest.mark.parametrize("name", ["native", "xen"])
def test_packed_and_unpacked_files_are_the_same(name: str, tmp_path: Path) -> None:
    packed = SHARED / "traces" / f"{name}.jsonl.gz"
    plain = tmp_path / "any.name"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    assert read_trace(plain) == read_trace(packed)


def test_a_last_line_need_not_be_ended(tmp_path: Path) -> None:
    path = story().write(tmp_path / "t.jsonl")
    whole = read_trace(path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_trace(path) == whole


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    path = story().write(tmp_path / "t.jsonl")
    whole = read_trace(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_trace(path) == whole


def test_numbers_may_be_numbers_or_hexadecimal(tmp_path: Path) -> None:
    lines = lines_of(story())
    plain = deepcopy(lines)
    for event in plain[1:]:
        if "regs" in event:
            event["regs"] = [int(word, 16) for word in event["regs"]]
    assert read_trace(put(tmp_path / "a", lines)) == read_trace(put(tmp_path / "b", plain))


def test_unknown_keys_are_left_alone(tmp_path: Path) -> None:
    lines = lines_of(story())
    for line in lines:
        line["later"] = {"more": 1}
    assert replay(put(tmp_path / "t", lines), DEFAULT).good


# Files that cannot be read


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", None, "empty"),
        (b"\n", 1, "not JSON"),
        (b"\x00\x01\x02", 1, "not JSON"),
        (b"\xff\xfe{}", None, "UTF-8"),
        (b'{"format": "\xff"}', None, "UTF-8"),
        (b"\x1f\x8b", None, "gzip"),
        (b"\x1f\x8bnot really", None, "gzip"),
        (gzip.compress(b"", mtime=0), None, "empty"),
        (gzip.compress(b"\xff", mtime=0), None, "UTF-8"),
        (b"17\n", 1, "object"),
        (b"[]\n", 1, "object"),
        (b"null\n", 1, "object"),
        (b"{}\n", 1, "format"),
        (b"[" * 100_000 + b"\n", 1, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n", 1, "nested too deeply"),
        (b'{"format": "xen-optee-mediator-vectors/1"}\n', 1, "format"),
        (b'{"format": "optee-smc-trace/2"}\n', 1, "format"),
        (b'{"format": "optee-smc-trace/1"}\n', 1, "ram"),
        (b'{"format": ' + b"9" * 5000 + b"}\n", 1, ""),
    ],
)
def test_a_file_that_is_no_trace(content: bytes, line: int | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    assert words in refusal(path, line)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.jsonl", None)
    assert "directory" in refusal(tmp_path, None)


@pytest.mark.parametrize("keep", [3, 10, 40, -9, -8, -4, -1])
def test_a_truncated_archive(keep: int, tmp_path: Path) -> None:
    path = story().write(tmp_path / "t.jsonl.gz")
    path.write_bytes(path.read_bytes()[:keep])
    assert "gzip" in refusal(path, None)


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = story().write(tmp_path / "t.jsonl.gz")
    whole = path.read_bytes()
    for at in [*range(12), *range(12, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            read_trace(path)
        except DocumentError as error:
            assert len(error.lines) == 1 and error.lines[0].startswith(str(path))


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_format, "MAX_LINE", 1 << 12)
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(tape_line() + b'{"e": "mark", "name": "' + b"x" * (1 << 24)))
    tracemalloc.start()
    try:
        assert "characters" in refusal(path, 2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def tape_line() -> bytes:
    return (Tape().lines()[0] + "\n").encode()


# Lines that are wrong


HEADERS: list[tuple[str, object]] = [
    ("format", None),
    ("format", 1),
    ("format", "optee-smc-trace/9"),
    ("driver", 1),
    ("rpc_params", "4"),
    ("rpc_params", -1),
    ("rpc_params", True),
    ("client_id", 0),
    ("client_id", 65536),
    ("client_id", -1),
    ("client_id", "x"),
    ("client_id", 1.5),
    ("ram", None),
    ("ram", []),
    ("ram", {}),
    ("ram", [1]),
    ("ram", [{}]),
    ("ram", [{"ipa": "0x40000000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x0"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x1001"}]),
    ("ram", [{"ipa": "0x40000001", "size": "0x1000"}]),
    ("ram", [{"ipa": "-0x1000", "size": "0x1000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x1000000000000"}]),
    ("ram", [{"ipa": "0xfffffffffffff000", "size": "0x1000"}]),
    ("ram", [{"ipa": "0x7fffffff000", "size": "0x2000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x800000000000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x8000000000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x2000"}, {"ipa": "0x40001000", "size": "0x1000"}]),
    ("ram", [{"ipa": "0x40000000", "size": "0x1000"}] * 2),
]


@pytest.mark.parametrize(("key", "value"), HEADERS, ids=lambda value: repr(value)[:60])
def test_a_header_that_is_wrong(key: str, value: object, tmp_path: Path) -> None:
    lines = lines_of(story())
    lines[0][key] = value
    refusal(put(tmp_path / "t.jsonl", lines), 1)


EVENTS: list[tuple[str, str, object]] = [
    ("mark", "e", "call_"),
    ("mark", "e", None),
    ("mark", "name", None),
    ("mark", "name", 5),
    ("call", "e", 5),
    ("call", "id", None),
    ("call", "id", -1),
    ("call", "id", "1"),
    ("call", "id", 1 << 32),
    ("call", "id", True),
    ("call", "vcpu", "0"),
    ("call", "vcpu", -1),
    ("call", "regs", None),
    ("call", "regs", "0x0"),
    ("call", "regs", ["0x0"] * 4),
    ("call", "regs", ["0x0"] * 9),
    ("call", "regs", ["0x0"] * 7 + ["0x10000000000000000"]),
    ("call", "regs", ["0x0"] * 7 + [-1]),
    ("call", "regs", ["0x0"] * 7 + [None]),
    ("call", "regs", ["0x0"] * 7 + ["zero"]),
    ("call", "regs", ["0x0"] * 7 + [1.0]),
    ("call", "memory", 5),
    ("call", "memory", {}),
    ("call", "memory", [5]),
    ("call", "memory", [{}]),
    ("call", "memory", [{"at": "0x40000000", "is": "data", "hex": ""}]),
    ("call", "memory", [{"at": None, "is": "message", "hex": ""}]),
    ("call", "memory", [{"at": "0x40000000", "is": "message"}]),
    ("call", "memory", [{"at": "0x40000000", "is": "message", "hex": "0"}]),
    ("call", "memory", [{"at": "0x40000000", "is": "message", "hex": 7}]),
    ("call", "memory", [{"at": "0x40000000", "is": "message", "hex": ""}]),
    ("call", "memory", [{"at": "0x40000000", "is": "message", "hex": "00" * 31}]),
    ("call", "memory", [{"at": "0x40000000", "is": "rpc", "hex": "00" * 8}]),
    ("call", "after_interrupts", -1),
    ("call", "after_interrupts", "many"),
    ("return", "id", 4711),
    ("return", "id", None),
    ("return", "regs", ["0x0"] * 8),
    ("return", "regs", ["0x0"] * 3),
    ("return", "memory", [{"at": "0x40000000", "is": "list", "hex": "xx"}]),
    ("return", "memory", [{"at": "0x40000000", "is": "message", "hex": "00"}]),
    ("return", "memory", [{"at": "0x40000000", "is": "rpc", "hex": ""}]),
    ("forward", "regs", ["0x0"] * 4),
    ("forward", "id", "x"),
    ("forward", "message", 5),
    ("forward", "message", "0"),
    ("forward", "message", ""),
    ("forward", "rpc", "zz"),
    ("forward", "rpc", "00"),
    ("answer", "regs", ["0x0"] * 8),
    ("answer", "message", "0"),
    ("answer", "message", "00" * 31),
    ("answer", "rpc", []),
]


@pytest.mark.parametrize(("kind", "key", "value"), EVENTS, ids=lambda value: repr(value)[:60])
def test_an_event_that_is_wrong(kind: str, key: str, value: object, tmp_path: Path) -> None:
    lines = lines_of(small())
    wanted = [
        at for at, line in enumerate(lines) if line.get("e") == kind and (line.get("id") is not None or kind == "mark")
    ]
    lines[wanted[-1]][key] = value
    refusal(put(tmp_path / "t.jsonl", lines), wanted[-1] + 1)


def test_a_call_that_is_open_already(tmp_path: Path) -> None:
    """Two calls of one id: which of them an answer belongs to cannot be said."""
    lines = lines_of(story())
    calls = [at for at, line in enumerate(lines) if line.get("e") == "call"]
    again = dict(lines[calls[0]])
    lines.insert(calls[0] + 1, again)
    refusal(put(tmp_path / "t.jsonl", lines), calls[0] + 2)


@pytest.mark.parametrize("kind", ["forward", "answer"])
def test_a_forward_or_answer_of_a_call_that_is_not_open(kind: str, tmp_path: Path) -> None:
    """It belongs to nothing: refused, or without any effect."""
    lines = lines_of(small())
    at = next(at for at, line in enumerate(lines) if line.get("e") == kind and line["id"] is not None)
    lines.append({**lines[at], "id": 4711})
    try:
        replay(put(tmp_path / "t.jsonl", lines), XEN)
    except DocumentError as error:
        assert error.lines[0].startswith(f"{tmp_path / 't.jsonl'}:{len(lines)}:")


def test_the_first_wrong_line_is_the_one_that_is_named(tmp_path: Path) -> None:
    lines = lines_of(story())
    for at in (7, 9):
        lines[at] = {"e": "nothing"}
    refusal(put(tmp_path / "t.jsonl", lines), 8)


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=6),
    st.just([]),
    st.just({}),
    st.integers(0, 1 << 64).map(hex),
    st.sampled_from(["0x32000003", "0x32000004", "0x32000012", "0x32000013", "0xffff0005", "0xffff0000", "0xb2000009"]),
    st.binary(max_size=80).map(bytes.hex),
)


def _paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += _paths(value, (*at, key))
    return found


_TAPES = {"native": lines_of(story()), "mediated": lines_of(small())}
_PLACES = [(name, path) for name, lines in _TAPES.items() for path in _paths(lines)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_PLACES), _ODD)
def test_any_value_anywhere_is_replayed_or_refused(
    tmp_path: Path, place: tuple[str, tuple[Any, ...]], value: object
) -> None:
    name, where = place
    lines = deepcopy(_TAPES[name])
    holder: Any = lines
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    path = put(tmp_path / "t.jsonl", lines)
    try:
        report = replay(path, XEN if name == "mediated" else DEFAULT)
    except DocumentError as error:
        assert len(error.lines) == 1 and error.lines[0].startswith(f"{path}:")
    else:
        assert report.violations == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_changed_anywhere_are_replayed_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """In the hexadecimal of messages and lists, in registers: most stay valid, and nothing breaks."""
    name = data.draw(st.sampled_from(sorted(_TAPES)))
    octets = bytearray("".join(json.dumps(line) + "\n" for line in _TAPES[name]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(octets) - 1))
        octets[at] = data.draw(st.sampled_from(list(b'0123456789abcdef" ,}]')))
    path = tmp_path / "t.jsonl"
    path.write_bytes(octets)
    try:
        report = replay(path, XEN if name == "mediated" else DEFAULT)
    except DocumentError as error:
        assert len(error.lines) == 1
    else:
        assert report.violations == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lines_lost_doubled_or_swapped_are_replayed_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(_TAPES)))
    lines = deepcopy(_TAPES[name])
    at = data.draw(st.integers(1, len(lines) - 1))
    other = data.draw(st.integers(1, len(lines) - 1))
    kind = data.draw(st.sampled_from(["lost", "doubled", "swapped"]))
    if kind == "lost":
        del lines[at]
    elif kind == "doubled":
        lines.insert(other, deepcopy(lines[at]))
    else:
        lines[at], lines[other] = lines[other], lines[at]
    path = put(tmp_path / "t.jsonl", lines)
    try:
        report = replay(path, XEN if name == "mediated" else DEFAULT)
    except DocumentError as error:
        assert len(error.lines) == 1
    else:
        assert report.violations == []
