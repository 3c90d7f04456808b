"""Each kind of mistake in a scenario file has its line and column; all of a file are told at once."""

import contextlib
import io
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import RootModel

from mediator.cli import run
from mediator.documents import MAX_ALIASES, MAX_DEPTH, DocumentError, load_document
from mediator.scenario import library, load_scenario
from mediator.scenario.catalogue import scenario_text
from mediator.scenario.language import VERBS
from tests.docs.pages import DOCS, rows
from tests.scenarios.json_schema import accepts

HEAD = "scenario: x\npurpose: p\n"
STEP = "steps:\n- open: hello_world\n"

MISTAKES = [
    ("steps:\n- {opn: hello_world}\n", "4:3", "here is opn"),
    ("steps:\n- {open: hello_world, close: 3}\n", "4:3", "here is open and close"),
    ("steps:\n- 5\n", "4:3", "a step is a mapping"),
    ("steps: []\n", "3:8", "steps: 1 or more are wanted"),
    ("steps:\n- {open: hello_wold}\n", "4:10", "no UUID and none of"),
    ("steps:\n- {invoke: FOO}\n", "4:12", "no command of a known TA"),
    ("steps:\n- {invoke: INC_VALUE, session: $s}\n", "4:32", "$s is defined nowhere"),
    ("steps:\n- {open: hello_world, params: [{value: [1, 2, 3]}]}\n", "4:32", "two numbers at most"),
    ("steps:\n- {open: hello_world, params: [{value: 1, temporary: 3}]}\n", "4:32", "a parameter is one of"),
    ("steps:\n- {open: hello_world, params: [{valu: 1}]}\n", "4:39", "valu"),
    ("steps:\n- {smc: CALL_WITH_ARGS}\n", "4:9", "no name of the ABI"),
    ("steps:\n- {smc: CALL_WITH_ARG, a1: 1, a1:a2: 2}\n", "4:3", "the same register"),
    ("steps:\n- {smc: CALL_WITH_ARG, a1: 1 +}\n", "4:28", "a term is missing"),
    ("steps:\n- {smc: CALL_WITH_ARG, a1: OK}\n", "4:28", "no name of the ABI"),
    ("steps:\n- {smc: CALL_WITH_ARG, a1: 1 2}\n", "4:28", "an operator is missing"),
    ("steps:\n- {smc: CALL_WITH_ARG, vcpu: -1}\n", "4:30", "0 or more is wanted"),
    ("steps:\n- guest: zoe\n  open: hello_world\n", "4:10", "no guest of this machine"),
    ("steps:\n- {kill: zoe}\n", "4:10", "no guest of this machine"),
    ("machine: {guests: {a: , b: }}\n" + STEP, "5:3", "guest is missing"),
    ("machine: {guests: {guest: }}\n" + STEP, "3:27", "no name for a guest"),
    ("machine: {guests: {a: , b: {hypervisor: kmv}}}\n" + STEP, "3:41", "'kvm', 'xen' or 'mixed'"),
    ("machine: {guests: {a: {driver: none}}}\n" + STEP, "5:3", "a has no driver"),
    ("machine: {each: {ram: 5000}}\n" + STEP, "3:17", "whole pages"),
    ("machine: {each: {supplicant: lazy}}\n" + STEP, "3:17", "none of usual, none, slow"),
    ("machine: {policy: {name: x}}\n" + STEP, "3:19", "machine.policy.purpose: missing"),
    ("rules: [R30]\n" + STEP, "3:9", "rules.0"),
    ("quick: yes\n" + STEP, "3:8", "different readers"),
    ("timeout: 017\n" + STEP, "3:10", "different readers"),
    ("timeout: 1e3\n" + STEP, "3:10", "different readers"),
    ("timeout: 5 hours\n" + STEP, "3:10", "no time"),
    ("steps:\n- open: hello_world\n  open: hello_world\n", "5:3", "stands here twice"),
    ("steps:\n- parallel:\n  - sequence:\n    - {advance: soon}\n", "6:17", "steps.0.parallel.0.sequence.0.advance"),
    ("steps:\n- {let: {a: {hex: 0}}}\n", "4:19", "hex: text is wanted"),
    ("steps:\n- {let: {a: {hex: '0'}}}\n", "4:13", "two for a byte"),
    ("steps:\n- {let: {a: {fill: 1}}}\n", "4:13", "fill and size go together"),
    ("steps:\n- {let: {a: {text: a, zeros: 3}}}\n", "4:13", "bytes are one of"),
    ("steps:\n- {open: hello_world, expect: {result: SUCESS}}\n", "4:40", "no name of the ABI"),
    ("steps:\n- {open: hello_world, expect: {ledger: {page: 3}}}\n", "4:47", "'pages', 'buffers'"),
    ("steps:\n- {open: hello_world, expect: {statistics: {smcs: {at_leest: 3}}}}\n", "4:62", "at_leest"),
    ("steps:\n- {message: CMD_X}\n", "4:13", "no name of the ABI"),
    ("steps:\n- {message: CANCEL, params: [{attr: TMEM}]}\n", "4:37", "TMEM_INPUT"),
    ("steps:\n- {message: CANCEL, params: [{a: 1, buf_ptr: 3}]}\n", "4:30", "are the same word"),
    ("steps:\n- {expect: {memory: [{at: 0}]}}\n", "4:22", "content: missing"),
    ("steps:\n- {expect: {events: {call_deny: 0}}}\n", "4:33", "call_denied"),
    ("steps:\n- {expect: {traffic: {FS: 1}}}\n", "4:27", "FS.READ"),
    ("steps:\n- {expect: {forwarded: []}}\n", "4:3", "beside that step"),
    ("steps:\n- {read: 0}\n", "4:3", "give the bytes a name"),
    ("steps: !!python/object:os.system\n- {open: hello_world}\n", "3:8", "tag"),
    ("steps: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "\n", "3:40", "nested deeper"),
    ("steps: &a [1]\nb: [" + "*a, " * (MAX_ALIASES + 1) + "]\n", "3:8", "aliases"),
    ("steps: [\n", "4:1", "expected node content"),
    ("steps:\n- {advance: \x07}\n", "4:13", "control characters"),
    ("steps:\n- {advance: -1}\n", "4:13", "0 or more is wanted"),
    ("steps:\n- {advance: 1.0e999}\n", "4:13", "1000000000.0 or less is wanted"),
    ("steps:\n- {pages: " + "9 * " * 300 + "9}\n", "4:11", "1201 characters"),
    ("machine: {each: {ram: -99999999999999999999}}\n" + STEP, "3:23", "more than 64 bits"),
    ("machine: {each: {ram: 16 GiB, ram_base: 511 GiB}}\n" + STEP, "3:17", "beyond 512 GiB"),
    ("machine: {each: {quotas: {calls: 0}}}\n" + STEP, "3:34", "quotas.calls: 1 or more is wanted"),
    ("machine: {each: {quotas: {pages: $x}}}\n" + STEP, "3:26", "$x is not known here"),
    ("machine: {each: {quotas: {pages: 5, reserved_pages: 9}}}\n" + STEP, "3:26", "9 of at most 5 pages"),
    ("machine: {each: {quotas: {pool_pages: 5}}}\n" + STEP, "3:39", "'pages', 'reserved_pages'"),
    ("machine: {policy: lax}\n" + STEP, "3:19", "none of default, xen, minimal"),
    ("machine: {rpmb_owner: zoe}\n" + STEP, "3:23", "no guest of this machine"),
    ("machine: {flow: {queue: 0}}\n" + STEP, "3:25", "queue: 1 or more is wanted"),
    ("machine: {optee: {core_heap: $x}}\n" + STEP, "3:30", "a size such as"),
    ("machine: {optee: {early_tas: [nobody]}}\n" + STEP, "3:31", "early_tas.0: 'nobody' is no UUID"),
    ("machine: {optee: {sizes: {exercise: {heap: 2000000 MiB}}}}\n" + STEP, "3:44", "more than 1 TiB"),
    ("machine: {optee: {sizes: {invoke_tests: {heap: 1 MiB}}}}\n" + STEP, "3:41", "no user TA"),
    ("steps:\n- {open: hello_world}\n- {invoke: -1}\n", "5:12", "it has 32 bits"),
    ("steps:\n- {stage2: 0x1, pages: 9, becomes: none}\n", "4:12", "0x1 is not where a page begins"),
    ("steps:\n- {stage2: 4 KiB + 8, becomes: none}\n", "4:12", "0x1008 is not where a page begins"),
    ("steps:\n- {stage2: 0, from: kvm-1, from_at: 4097}\n", "4:37", "0x1001 is not where a page begins"),
    ("steps:\n- {stage2: 0, from: zoe}\n", "4:21", "no guest of this machine"),
    ("steps:\n- {expect: {maps_to: [{at: 0, guest: zoe}]}}\n", "4:38", "no guest of this machine"),
    ("steps:\n- {repeat: -1, do: []}\n", "4:12", "-1 turns, where 0 to 1000000 are possible"),
    ("steps:\n- {repeat: 100_000 * 1_000_000, do: []}\n", "4:12", "100000000000 turns, where"),
    ("steps:\n- {for_each: x, to: 1000001, do: []}\n", "4:3", "1000001 turns, where"),
    ("steps:\n- {quota: {calls: 0, buffers: -1}}\n", "4:19", "quota.calls: 1 or more is wanted"),
    ("steps:\n- {quota: {calls: 0, buffers: -1}}\n", "4:31", "quota.buffers: 1 or more is wanted"),
    ("steps:\n- {quota: {pages: $guest.ram, calls: 0}}\n", "4:38", "quota.calls: 1 or more is wanted"),
    ("steps:\n- {for_each: x, to: -1, do: []}\n", "4:3", "from and to are 0 or more"),
    ("steps:\n- {stage2: 0x8000000000}\n", "4:12", "0x8000000000 is no IPA: they have 39 bits"),
    ("steps:\n- {burst: bare, ta: reusing, calls: 1000001}\n", "4:37", "1000001 calls, where 1 to 1000000"),
    (
        "steps:\n- {repeat: 1001, do: [{for_each: x, to: 1000, do: []}]}\n",
        "4:34",
        "for_each: 1001000 turns of the loops that hold each other, where 1000000 are possible",
    ),
    ("steps:\n- {quota: {pool_pages: -1}}\n", "4:24", "quota.pool_pages: 1 to 4294967296"),
    ("steps:\n- {for_each: x, do: []}\n", "4:3", "either in, or to"),
    ("steps:\n- {open: '{8aaaf200-2450-11e4-abe2-0002a5d5c51b}'}\n", "4:10", "no UUID"),
]


@pytest.mark.parametrize(("body", "place", "words"), MISTAKES, ids=[body.strip() for body, _, _ in MISTAKES])
def test_a_mistake_has_its_line(body: str, place: str, words: str) -> None:
    with pytest.raises(DocumentError) as raised:
        load_scenario(HEAD + body, "f.yaml")
    assert any(line.startswith(f"f.yaml:{place}: ") and words in line for line in raised.value.lines), raised.value


def test_all_mistakes_are_told_at_once() -> None:
    text = "scenario: X\npurpose: p\nsteps:\n- {opn: 1}\n- {open: hello_world, guest: 3}\n- {advance: soon}\n"
    with pytest.raises(DocumentError) as raised:
        load_scenario(text, "f.yaml")
    assert [line.split(":")[1] for line in raised.value.lines] == ["1", "4", "5", "6"]


def test_what_refers_to_no_guest_is_told_beside_what_does_not_fit() -> None:
    steps = ("{repeat: x, do: [{open: hello_world, guest: no}]}", "{stage2: 0, from: nobody}", "{let: {a: $b}}")
    text = HEAD.replace("purpose: p\n", "purpose: 1\n") + "steps:\n" + "".join(f"- {step}\n" for step in steps)
    with pytest.raises(DocumentError) as raised:
        load_scenario(text, "f.yaml")
    assert [line.split(":")[1] for line in raised.value.lines] == ["4", "2", "4", "5"]
    assert "'nobody' is no guest of this machine" in raised.value.lines[-1]


def test_constants_and_guests_that_cannot_be_are_told_at_once() -> None:
    steps = ("{repeat: -1, do: [{quota: {calls: 0}}]}", "{quota: {pages: -1}}", "{stage2: 1}")
    with pytest.raises(DocumentError) as raised:
        load_scenario(HEAD + "steps:\n" + "".join(f"- {step}\n" for step in steps), "f.yaml")
    assert [line.split(":")[1] for line in raised.value.lines] == ["4", "4", "5", "6"]


def test_the_command_line_says_it_and_exits_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(HEAD + "steps:\n- {opn: 1}\n", encoding="utf-8")
    assert run(["run", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:4:3: ")
    file.write_bytes("scenario: x\npurpose: \u00e9 ".encode() + b"\xff\xfe")
    assert run(["run", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}:2:12: not UTF-8 text\n"
    assert run(["run", str(tmp_path / "absent.yaml")]) == 2
    assert run(["run", "no-such-scenario"]) == 2
    assert run(["run", "hello", "--guests", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def _keys(verb: str) -> set[str]:
    fields = VERBS[verb].model_fields
    return {field.alias or name for name, field in fields.items()} - {verb, "guest", "comment"}


def test_the_reference_has_every_step_with_its_keys() -> None:
    found = [row for row in rows(DOCS / "reference" / "scenario.md") if ":" in row[0]]
    table = {row[0].strip("`").partition(":")[0]: row[1] for row in found}
    assert set(table) == set(VERBS)
    for verb in VERBS:
        cell = table[verb].replace("`a1` ... `a7`", " ".join(f"`a{number}`" for number in range(1, 8)))
        assert all(f"`{key}`" in cell for key in _keys(verb)), (verb, _keys(verb), cell)


def test_every_row_of_the_reference_belongs_to_a_table() -> None:
    lines = ["", *(DOCS / "reference" / "scenario.md").read_text(encoding="utf-8").splitlines(), ""]
    firsts = [at for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1].startswith("|")]
    assert firsts and [lines[at] for at in firsts if not lines[at + 1].startswith("|---")] == []


@cache
def schema() -> Any:
    """What `mediator show schema scenario` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["show", "schema", "scenario"]) == 0
    return json.loads(out.getvalue())


class Plain(RootModel[Any]):
    """Any document that is strict YAML."""


def data(text: str) -> Any:
    return load_document(Plain, text, "f.yaml").root


def test_the_schema_knows_every_step() -> None:
    verbs = {key for definition in schema()["$defs"].values() for key in definition.get("required", ())}
    assert set(VERBS) <= verbs


def test_the_schema_accepts_the_library() -> None:
    assert [name for name in library() if not accepts(schema(), data(scenario_text(name)))] == []


BEYOND = (
    *("defined nowhere", "no guest of this machine", "guest is missing", "no name for a guest", "has no driver"),
    *("two numbers", "a parameter is one of", "the same register", "whole pages", "fill and size", "bytes are one of"),
    *(
        "the same word",
        "beside that step",
        "give the bytes a name",
        "beyond 512 GiB",
        "not known here",
        "a size such as",
    ),
    *(
        "at most 5 pages",
        "more than 1 TiB",
        "no user TA",
        "where a page begins",
        "turns, where",
        "turns of the loops",
        "calls, where",
        "is no IPA",
        "are 0 or more",
        "quotas.",
        "quota.",
        "none of default",
        "either in, or to",
    ),
)
"""Words of mistakes that no schema can tell: about names, sizes as text, and keys that go together."""


@pytest.mark.parametrize(("body", "place", "words"), MISTAKES, ids=[body.strip() for body, _, _ in MISTAKES])
def test_the_schema_rejects_the_same_mistakes(body: str, place: str, words: str) -> None:
    try:
        given = data(HEAD + body)
    except DocumentError:
        return  # no YAML of ours
    assert accepts(schema(), given) is any(beyond in words for beyond in BEYOND)


VALUES = (
    *("0", "-1", "[]", "{}", "[1, 2]", "{a: 1}", "null", "true", "''", "'x'", "$x", "$guest", "1.5", "1e3", "no"),
    *("99999999999999999999", "-99999999999999999999", "{text: a}", "{hex: 'zz'}", "4 KiB", "-5 KiB", "0x", "1 +"),
    *("$a.b.c", "-1 s", "1.0e999", "{at_least: x}", "[[[[]]]]", "*a", "&a 1", "!!int 3", "'\x00'", "\x85", "\x00"),
    *("kvm", "| 3", "2 * " * 999),
)
LINE = re.compile(r"f\.yaml:[1-9][0-9]*:[1-9][0-9]*: [^\n]+")


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A file of the library with a bit flipped, a line gone or twice, a value or a key that is another."""
    text = scenario_text(draw(st.sampled_from(library())))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or ["\n"]
        match draw(st.sampled_from(["bit", "gone", "twice", "value", "value", "key"])):
            case "bit":
                data = bytearray(text.encode())
                data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
                text = data.decode(errors="replace")
            case "gone":
                del lines[draw(st.integers(0, len(lines) - 1))]
                text = "".join(lines) or "\n"
            case "twice":
                lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(lines)))
                text = "".join(lines)
            case "value":
                text = _replaced(draw, text, r": ?([^,{}\[\]\n]+)", VALUES)
            case "key":
                keys = re.findall(r"([a-z_]+):", text)
                text = _replaced(draw, text, r"([a-z_]+):", keys)
    return text


def _replaced(draw: st.DrawFn, text: str, pattern: str, words: Sequence[str]) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    one = draw(st.sampled_from(found))
    return text[: one.start(1)] + draw(st.sampled_from(words)) + text[one.end(1) :]


@given(damaged())
def test_a_damaged_file_is_a_scenario_or_each_mistake_has_its_line(text: str) -> None:
    try:
        load_scenario(text, "f.yaml")
    except DocumentError as error:
        assert error.lines and all(LINE.fullmatch(line) for line in error.lines), error.lines
    else:
        assert accepts(schema(), data(text)), "the schema says no to what is right"
