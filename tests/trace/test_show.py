"""`mediator trace show`: real recordings and made ones, drawn."""

import gzip
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mediator.cli import run
from mediator.core.policy import Policy
from mediator.documents import DocumentError
from mediator.policies import load_policy
from mediator.trace.diagram import COLUMN, GUEST, MAX_ARROWS, MEDIATOR, OPTEE, PARTICIPANTS, Arrow, Journey
from mediator.trace.show import SHOWN_RANGES, Recording
from optee.abi.message import ENTRIES_PER_PAGE, NONCONTIG, Command, Message, Param, ParamType
from optee.abi.smc import Function, RpcReturn
from tests.shared import SHARED, needs_shared

XEN = SHARED / "traces" / "xen.jsonl.gz"
NATIVE = SHARED / "traces" / "native.jsonl.gz"
BASE = 0x40000000
MESSAGE_AT = BASE + 0x1000
LISTS_AT = BASE + 0x2000
DATA_AT = BASE + 0x100000
MERMAID_TEXT = r"(?:[^;#<\n]|#\w+;|<br/>)+"
MERMAID_LINE = re.compile(
    r"sequenceDiagram|    %% .+|    participant [gmO] as [\w-]+|"
    rf"    (?:[gmO](?:-->>|->>)[gmO]|Note over [gmO]): {MERMAID_TEXT}"
)


def words(*values: int) -> list[str]:
    return [*map(hex, values), *["0x0"] * (8 - len(values))]


def call(number: int, *regs: int, memory: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    return {"e": "call", "id": number, "vcpu": 1, "regs": words(*regs), "memory": memory or [], **more}


def answer(number: int, *regs: int, memory: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"e": "return", "id": number, "regs": words(*regs)[:4], "memory": memory or []}


def entry(at: int, kind: str, data: bytes) -> dict[str, Any]:
    return {"at": hex(at), "is": kind, "hex": data.hex()}


def write(path: Path, *events: dict[str, Any]) -> Recording:
    ram = [{"ipa": hex(BASE), "size": hex(64 << 20)}]
    header = {"format": "optee-smc-trace/1", "between": "nothing", "rpc_params": 4, "ram": ram}
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *events)))
    return Recording(path)


def registration(pages: list[int]) -> Iterator[dict[str, Any]]:
    """REGISTER_SHM of some pages, with as many list pages as it takes."""
    param = Param(ParamType.TMEM_OUTPUT | NONCONTIG, LISTS_AT, len(pages) * 4096, 0x77)
    message = Message(Command.REGISTER_SHM, params=[param])
    memory = [entry(MESSAGE_AT, "message", message.pack())]
    for number in range(0, len(pages), ENTRIES_PER_PAGE):
        at = LISTS_AT + number // ENTRIES_PER_PAGE * 4096
        part = pages[number : number + ENTRIES_PER_PAGE]
        memory.append(entry(at, "list", b"".join(page.to_bytes(8, "little") for page in part)))
        memory.append(entry(at + 4088, "list", (at + 4096).to_bytes(8, "little")))
    yield call(3, Function.CALL_WITH_ARG, 0, MESSAGE_AT, memory=memory)
    yield answer(3, 0, memory=[entry(MESSAGE_AT, "message", message.pack())])


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("default")


def way(journey: Journey) -> list[tuple[int, int]]:
    return [(arrow.source, arrow.target) for arrow in journey.arrows]


def notes(journey: Journey) -> str:
    return "\n".join(note for arrow in journey.arrows for note in arrow.notes)


def test_a_fast_call_goes_there_and_back(tmp_path: Path, policy: Policy) -> None:
    function = Function.EXCHANGE_CAPABILITIES
    recording = write(tmp_path / "trace", call(0, function, 0, 0, 0, 0, 0, 0, 9), answer(0, 0, 0xF5, 0x42, 4))
    journey = recording.follow(0, policy)
    assert way(journey) == [(GUEST, MEDIATOR), (MEDIATOR, OPTEE), (OPTEE, MEDIATOR), (MEDIATOR, GUEST)]
    said = [arrow.text for arrow in journey.arrows]
    assert "client id 0x9" in said[0] and "client id 0x1" in said[1]
    assert "HAVE_RESERVED_SHM" in said[2] and "HAVE_RESERVED_SHM" not in said[3]
    assert journey.unexpected == 0 and "EXCHANGE_CAPABILITIES" in journey.title


def test_a_denied_call_does_not_reach_op_tee(tmp_path: Path, policy: Policy) -> None:
    denied = write(tmp_path / "trace", call(0, Function.VM_CREATED, 2), answer(0, 2**64 - 1, 2))
    journey = denied.follow(0, policy)
    assert way(journey) == [(GUEST, MEDIATOR), (MEDIATOR, GUEST)]


@pytest.mark.parametrize("count", [1, 2, 511, 512, 1200])
def test_every_page_is_shown_where_it_went(tmp_path: Path, policy: Policy, count: int) -> None:
    pages = [DATA_AT + 4096 * n for n in range(count)]
    journey = write(tmp_path / "trace", *registration(pages)).follow(3, policy)
    assert journey.unexpected == 0
    told = notes(journey)
    many = "" if count == 1 else "s"
    assert f"parameter 0: {count} page{many}, listed in" in told and f"{count} page{many} pinned, now {count}" in told
    (first, last, frame), *more = re.findall(r"IPA (0x\w+)(?: to (0x\w+))? -> PA (0x\w+)", told)
    assert not more and int(first, 16) == pages[0] and int(last or first, 16) == pages[-1] and frame != first


def test_scattered_pages_are_ranges_up_to_a_limit(tmp_path: Path, policy: Policy) -> None:
    pages = [DATA_AT + 8192 * n for n in range(SHOWN_RANGES + 5)]
    told = notes(write(tmp_path / "trace", *registration(pages)).follow(3, policy))
    assert told.count("IPA 0x") == SHOWN_RANGES + 1 and "and 5 more ranges" in told  # and the message's


def test_a_rejected_buffer_has_no_list(tmp_path: Path, policy: Policy) -> None:
    journey = write(tmp_path / "trace", *registration([0x1000])).follow(3, policy)
    assert way(journey) == [(GUEST, MEDIATOR), (MEDIATOR, GUEST)] and journey.unexpected
    assert "listed in" not in notes(journey) and "pinned" not in notes(journey)


def rpc_rounds(rounds: int) -> Iterator[dict[str, Any]]:
    """A call that is interrupted so often, with another vCPU's call in between."""
    message = entry(MESSAGE_AT, "message", Message(Command.INVOKE_COMMAND, func=5, session=1).pack())
    yield call(0, Function.CALL_WITH_ARG, 0, MESSAGE_AT, memory=[message])
    for number in range(rounds):
        yield answer(2 * number, RpcReturn.FOREIGN_INTR, 0, 0, 1)
        yield call(2 * number + 1, Function.CALLS_REVISION)
        yield answer(2 * number + 1, 2)
        yield call(2 * number + 2, Function.RETURN_FROM_RPC, 0, 0, 1, after_interrupts=1)
    yield answer(2 * rounds, 0, memory=[message])


def test_rounds_belong_to_their_call(tmp_path: Path, policy: Policy) -> None:
    recording = write(tmp_path / "trace", *rpc_rounds(3))
    rows = {int(row[0]): row for row in recording.rows()}
    assert set(rows) == {0, 1, 3, 5}
    assert rows[0][1:] == ("2", "1", "CALL_WITH_ARG", "INVOKE_COMMAND 0x5", "3", "OK, SUCCESS")
    assert rows[1][3:] == ("CALLS_REVISION", "", "0", "data: major 0x2")
    assert [recording.root_of(number) for number in range(7)] == [0, 1, 0, 3, 0, 5, 0]
    journey = recording.follow(0, policy)
    assert way(journey) == [(GUEST, MEDIATOR), (MEDIATOR, OPTEE), (OPTEE, MEDIATOR), (MEDIATOR, GUEST)] * 4
    assert notes(journey).count("1 interrupt before") == 3
    with pytest.raises(DocumentError, match="there is no call 7; the ids are 0 to 6"):
        recording.root_of(7)


def test_an_rpc_that_cannot_be_delivered(tmp_path: Path, policy: Policy) -> None:
    """OP-TEE names an RPC argument that the guest never gave; the recording goes on as if the guest had seen it."""
    message = entry(MESSAGE_AT, "message", Message(Command.INVOKE_COMMAND, session=1).pack())
    begin = call(0, Function.CALL_WITH_ARG, 0, MESSAGE_AT, memory=[message])
    journey = write(tmp_path / "trace", begin, answer(0, RpcReturn.CMD, 0, 0x99, 1)).follow(0, policy)
    assert way(journey) == [(GUEST, MEDIATOR), (MEDIATOR, OPTEE), (OPTEE, MEDIATOR), (MEDIATOR, OPTEE)]
    assert "cannot be delivered" in notes(journey)


def test_mermaid_draws_no_more_than_it_can(tmp_path: Path, policy: Policy) -> None:
    lines = write(tmp_path / "trace", *rpc_rounds(80)).follow(0, policy).mermaid().splitlines()
    assert all(MERMAID_LINE.fullmatch(line) for line in lines)
    assert sum(">>" in line for line in lines) == MAX_ARROWS and f"{81 * 4 - MAX_ARROWS} more arrows" in lines[-1]


def test_mermaid_text_has_none_of_its_signs() -> None:
    journey = Journey("title", [Arrow(GUEST, MEDIATOR, "a;b #1 <x>", ("c; d", "  e"))])
    lines = journey.mermaid().splitlines()
    assert lines[-2:] == ["    g->>m: a,b #35;1 #lt;x>", "    Note over m: c, d<br/>e"]


def test_a_call_that_never_ends(tmp_path: Path, policy: Policy) -> None:
    events = list(rpc_rounds(1))
    for length, end in ((1, "not ended"), (2, "waits for RPC FOREIGN_INTR")):
        recording = write(tmp_path / "trace", *events[:length])
        journey = recording.follow(0, policy)
        assert next(recording.rows())[-1] == end and end in journey.title
        assert way(journey)[:2] == [(GUEST, MEDIATOR), (MEDIATOR, OPTEE)] and len(journey.arrows) == 2 * length


def test_arrows_lie_between_their_life_lines() -> None:
    journey = Journey("t", [Arrow(OPTEE, MEDIATOR, "word " * 30, ("particular",)), Arrow(GUEST, MEDIATOR, "x")])
    _, _, names, *lines = journey.text().splitlines()
    assert [names.index(name) for name in PARTICIPANTS] == [0, COLUMN, 2 * COLUMN]
    shafts = [line for line in lines if "─" in line]
    assert [(line.index("─"), line.rindex("─")) for line in shafts] == [(COLUMN + 4, 2 * COLUMN + 1), (3, COLUMN)]
    assert "◄" in shafts[0] and "►" in shafts[1]
    assert all(line[2] in "│├" for line in lines) and max(map(len, lines)) <= 3 * COLUMN
    (noted,) = (line for line in lines if "particular" in line)
    assert [at for at, sign in enumerate(noted) if sign == "│"] == [2, COLUMN + 2, 2 * COLUMN + 2]


@needs_shared
@pytest.mark.parametrize(("path", "name"), [(XEN, "xen"), (NATIVE, "default")])
def test_real_calls_go_back_where_they_came_from(path: Path, name: str) -> None:
    recording = Recording(path)
    chosen = load_policy(name)
    rows = [row for row in recording.rows() if row[-1] != "not ended"]
    assert len(rows) > 20
    for row in rows[:: len(rows) // 10]:
        journey = recording.follow(int(row[0]), chosen)
        assert journey.unexpected == 0
        steps = way(journey)
        assert steps[0] == (GUEST, MEDIATOR) and steps[-1] == (MEDIATOR, GUEST)
        assert all(before[1] == after[0] for before, after in pairwise(steps))
        assert steps.count((GUEST, MEDIATOR)) == int(row[5]) + 1
        for ipa, pa in re.findall(r"IPA (0x\w+)[^\n]* -> PA (0x\w+)", notes(journey)):
            assert ipa != pa
        assert all(MERMAID_LINE.fullmatch(line) for line in journey.mermaid().splitlines())
        assert journey.title in journey.text()


@needs_shared
def test_a_real_open_session_with_its_rpcs() -> None:
    told = Recording(XEN).follow(114, load_policy("xen")).text()
    for words in ("SHM_ALLOC", "LOAD_TA", "FS OPEN", "tee-supplicant", "the driver", "pinned, now", "listed in"):
        assert words in told


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    write(path, *rpc_rounds(1))
    packed = tmp_path / "trace.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert run(["trace", "show", str(packed)]) == 0
    assert "INVOKE_COMMAND 0x5" in capsys.readouterr().out
    assert run(["trace", "show", str(packed), "--call", "2"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.out.startswith("call 0 (line 2, vCPU 1)")
        and captured.err == "call 2 is a part of call 0, which is shown\n"
    )
    assert run(["trace", "show", str(packed), "--call", "0", "--mermaid"]) == 0
    assert capsys.readouterr().out.startswith("sequenceDiagram\n")
    assert run(["trace", "show", str(packed), "--call", "99"]) == 2
    assert "there is no call 99" in capsys.readouterr().err
