"""Each kind of mistake in a scenario file has its line and column; all of a file are told at once."""

import json
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.documents import MAX_ALIASES, MAX_DEPTH, DocumentError
from mediator.scenario import load_scenario
from mediator.scenario.language import VERBS
from tests.docs.pages import DOCS, rows

HEAD = "scenario: x\npurpose: p\n"
STEP = "steps:\n- open: hello_world\n"

MISTAKES = [
    ("steps:\n- {opn: hello_world}\n", "4:3", "here is opn"),
    ("steps:\n- {open: hello_world, close: 3}\n", "4:3", "here is open and close"),
    ("steps:\n- 5\n", "4:3", "a step is a mapping"),
    ("steps: []\n", "3:8", "at least 1 item"),
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
    ("steps:\n- {smc: CALL_WITH_ARG, vcpu: -1}\n", "4:30", "greater than or equal to 0"),
    ("steps:\n- guest: zoe\n  open: hello_world\n", "4:10", "no guest of this machine"),
    ("steps:\n- {kill: zoe}\n", "4:10", "no guest of this machine"),
    ("machine: {guests: {a: , b: }}\n" + STEP, "5:3", "guest is missing"),
    ("machine: {guests: {guest: }}\n" + STEP, "3:27", "no name for a guest"),
    ("machine: {guests: {a: , b: {hypervisor: kmv}}}\n" + STEP, "3:41", "'kvm', 'xen' or 'mixed'"),
    ("machine: {guests: {a: {driver: none}}}\n" + STEP, "5:3", "a has no driver"),
    ("machine: {each: {ram: 5000}}\n" + STEP, "3:17", "whole pages"),
    ("machine: {each: {supplicant: lazy}}\n" + STEP, "3:17", "none of usual, none, slow"),
    ("machine: {policy: {name: x}}\n" + STEP, "3:19", "machine.policy.purpose: Field required"),
    ("rules: [R30]\n" + STEP, "3:9", "rules.0"),
    ("quick: yes\n" + STEP, "3:8", "different readers"),
    ("timeout: 017\n" + STEP, "3:10", "different readers"),
    ("timeout: 1e3\n" + STEP, "3:10", "different readers"),
    ("timeout: 5 hours\n" + STEP, "3:10", "no time"),
    ("steps:\n- open: hello_world\n  open: hello_world\n", "5:3", "stands here twice"),
    ("steps:\n- parallel:\n  - sequence:\n    - {advance: soon}\n", "6:17", "steps.0.parallel.0.sequence.0.advance"),
    ("steps:\n- {let: {a: {hex: 0}}}\n", "4:19", "valid string"),
    ("steps:\n- {let: {a: {hex: '0'}}}\n", "4:13", "two for a byte"),
    ("steps:\n- {let: {a: {fill: 1}}}\n", "4:13", "fill and size go together"),
    ("steps:\n- {let: {a: {text: a, zeros: 3}}}\n", "4:13", "bytes are one of"),
    ("steps:\n- {open: hello_world, expect: {result: SUCESS}}\n", "4:40", "no name of the ABI"),
    ("steps:\n- {open: hello_world, expect: {ledger: {page: 3}}}\n", "4:47", "'pages', 'buffers'"),
    ("steps:\n- {open: hello_world, expect: {statistics: {smcs: {at_leest: 3}}}}\n", "4:62", "at_leest"),
    ("steps:\n- {message: CMD_X}\n", "4:13", "no name of the ABI"),
    ("steps:\n- {message: CANCEL, params: [{attr: TMEM}]}\n", "4:37", "TMEM_INPUT"),
    ("steps:\n- {message: CANCEL, params: [{a: 1, buf_ptr: 3}]}\n", "4:30", "are the same word"),
    ("steps:\n- {expect: {memory: [{at: 0}]}}\n", "4:22", "content: Field required"),
    ("steps:\n- {expect: {events: {call_deny: 0}}}\n", "4:33", "call_denied"),
    ("steps:\n- {expect: {traffic: {FS: 1}}}\n", "4:27", "FS.READ"),
    ("steps:\n- {expect: {forwarded: []}}\n", "4:3", "beside that step"),
    ("steps:\n- {read: 0}\n", "4:3", "give the bytes a name"),
    ("steps: !!python/object:os.system\n- {open: hello_world}\n", "3:8", "tag"),
    ("steps: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "\n", "3:40", "nested deeper"),
    ("steps: &a [1]\nb: [" + "*a, " * (MAX_ALIASES + 1) + "]\n", "3:8", "aliases"),
    ("steps: [\n", "4:1", "expected node content"),
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


def test_the_command_line_says_it_and_exits_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(HEAD + "steps:\n- {opn: 1}\n", encoding="utf-8")
    assert run(["run", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:4:3: ")
    file.write_bytes(b"\xff\xfe")
    assert run(["run", str(file)]) == 2
    assert run(["run", str(tmp_path / "absent.yaml")]) == 2
    assert run(["run", "no-such-scenario"]) == 2
    assert run(["run", "hello", "--guests", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


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


def test_the_schema_knows_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "schema", "scenario"]) == 0
    schema = json.loads(capsys.readouterr().out)
    verbs = {key for definition in schema["$defs"].values() for key in definition.get("required", ())}
    assert set(VERBS) <= verbs
