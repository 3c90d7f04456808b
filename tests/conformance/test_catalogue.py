"""The catalogue: every case passes, together they leave no item of the ABI out, and each would notice."""

import json
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mediator.cli import run
from mediator.conformance.catalogue import MAX_CASES, case_ids, catalogue, find_case
from mediator.conformance.coverage import coverage, items, mentions, missing
from mediator.conformance.needs import CAPABILITIES, UNSEEN, needs_of
from mediator.conformance.run_cases import Verdict, run_case, run_cases
from mediator.core import fast, rpc, sharing, yielding
from mediator.documents import DocumentError
from mediator.scenario.language import Scenario, load_scenario


@cache
def verdicts() -> tuple[Verdict, ...]:
    return tuple(run_cases(catalogue()))


def test_every_case_passes() -> None:
    assert [(one.case.scenario, one.why) for one in verdicts() if not one.passed] == []
    assert all(one.outcome is not None and one.outcome.smcs for one in verdicts())


def test_no_item_of_the_abi_and_no_rule_is_left_out() -> None:
    assert missing(coverage(verdicts())) == []
    assert sum(map(len, items().values())) == 22 + 9 + 1 + 10 + 4 + 18 + 12 + 10 + 2 + 29


def test_an_item_without_its_case_is_reported() -> None:
    """Whatever case is taken away: just the items that it alone shows are missing then."""
    whole = coverage(verdicts())
    alone: dict[str, set[str]] = {}
    for members in whole.values():
        for item, cases in members.items():
            if len(cases) == 1:
                alone.setdefault(cases[0], set()).add(item)
    assert alone
    for case, unshown in alone.items():
        rest = [one for one in verdicts() if one.case.scenario != case]
        assert set(missing(coverage(rest))) == unshown


def one(steps: str, more: str = "") -> Scenario:
    head = "scenario: x\npurpose: p\nsource: s\nrules: [R2]\nmachine: {each: {driver: none}}\n"
    return load_scenario(f"{head}{more}steps:\n{steps}", "x.yaml")


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        ("- {smc: L2CC_MUTEX, expect: {a0: UNKNOWN_FUNCTION}}\n",
         {"Function.L2CC_MUTEX", "ReturnCode.UNKNOWN_FUNCTION"}),
        ("- {smc: L2CC_MUTEX}\n", set()),
        ("- {smc: 0xb2000008, expect: {a0: UNKNOWN_FUNCTION}}\n", {"ReturnCode.UNKNOWN_FUNCTION"}),
        ("- {smc: 0xb2000008, expect: {forwarded: []}}\n", set()),
        ("- {message: CANCEL}\n- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {message: {ret: BAD_PARAMETERS}}}\n",
         {"Function.CALL_WITH_ARG"}),
        ("- {message: CANCEL}\n- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {message: {cmd: CANCEL}}}\n",
         {"Function.CALL_WITH_ARG", "Command.CANCEL"}),
    ],
)  # fmt: skip
def test_an_item_counts_only_if_it_was_seen_and_is_mentioned(steps: str, counts: set[str]) -> None:
    matrix = coverage([run_case(one(steps))])
    assert {item for members in matrix.values() for item, cases in members.items() if cases} == counts | {"R2"}


def test_a_case_that_only_talks_of_an_item_does_not_count() -> None:
    case = one("- {smc: L2CC_MUTEX, expect: {a0: UNKNOWN_FUNCTION}}\n")
    assert "L2CC_MUTEX" in mentions(case)
    verdict = run_case(case)
    verdict.shown.discard("Function.L2CC_MUTEX")
    assert "Function.L2CC_MUTEX" in missing(coverage([verdict]))


def test_a_case_that_fails_counts_for_nothing() -> None:
    verdict = run_case(one("- {smc: L2CC_MUTEX, expect: {a0: OK}}\n"))
    assert not verdict.passed and "expected OK, got UNKNOWN_FUNCTION" in verdict.why
    assert "R2" in missing(coverage([verdict]))


def test_each_case_has_a_purpose_that_no_other_has_and_says_what_it_needs() -> None:
    cases = catalogue()
    assert len(cases) == len(case_ids()) <= MAX_CASES
    assert [case.scenario for case in cases] == case_ids()
    assert len({case.purpose for case in cases}) == len(cases)
    for case in cases:
        assert case.source and case.rules
        said = set(case.needs)
        assert needs_of(case) <= said <= {*CAPABILITIES, *UNSEEN}, case.scenario
        assert said - needs_of(case) <= set(CAPABILITIES), case.scenario


@pytest.mark.parametrize("key", ["source", "rules"])
def test_a_case_without_its_source_or_rules_is_none(tmp_path: Path, key: str) -> None:
    lines = ["scenario: x", "purpose: p", "source: s", "rules: [R2]", "steps: [{open: hello_world}]"]
    path = tmp_path / "x.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith(key)))
    with pytest.raises(DocumentError, match=f"a case says {key}"):
        find_case(str(path))


BROKEN = [
    (yielding, "_PRESET", bytes(4), "result-preset"),
    (yielding, "MAX_PARAMS", 1 << 40, "parameters-too-many"),
    (yielding, "_WHY", (slice(0, 4),), "register-shape"),
    (yielding, "SHM_CACHED", 0, "shadow"),
    (yielding, "_ANSWER", (slice(0, 32),), "results-only"),
    (sharing, "OFFSET_MASK", 0, "list-offset"),
    (rpc, "_BENCH_REG", -1, "rpc-with-an-address"),
    (rpc, "_KEPT", (), "shm-free-before-told"),
    (rpc, "FREE", -1, "rpc-free-before-told"),
    (rpc, "_NOT_SUPPORTED", bytes(4), "rpc-not-for-guests"),
    (rpc, "_SHM_ALLOC_REPLY", 0xA, "shm-alloc"),
    (fast, "_DISABLE", None, "shm-cache-cookie"),
    (fast, "_THREADS", None, "quota-calls"),
    (fast, "_CAPABILITIES", None, "capabilities-reserved-memory"),
]


@pytest.mark.parametrize(("module", "name", "value", "case"), BROKEN, ids=[f"{row[1]}-{row[3]}" for row in BROKEN])
def test_a_broken_mediator_is_noticed(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object, case: str
) -> None:
    monkeypatch.setattr(module, name, value)
    assert not run_case(find_case(case)).passed


def test_the_command_runs_lists_and_draws_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert run(["conform", "api-uid", "reset", "--junit", str(report), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "mediator-cases/1" and told["passed"] == 2 and told["good"]
    root = ElementTree.fromstring(report.read_text())
    assert root.attrib == {"name": "mediator conform", "tests": "2", "failures": "0", "skipped": "0"}
    assert [case.attrib["name"] for case in root] == ["api-uid", "reset"]

    assert run(["conform", "--list", "--json"]) == 0
    assert [row["case"] for row in json.loads(capsys.readouterr().out)["cases"]] == case_ids()

    assert run(["conform", "--explain", "rpc-alloc"]) == 0
    drawn = capsys.readouterr().out
    where = [
        drawn.index(words) for words in ("CALL_WITH_ARG CLOSE_SESSION", "RPC ALLOC thread 0x6", "SUSPEND", "FREE th")
    ]
    assert where == sorted(where) and "a7 = 1" in drawn


def test_the_command_fails_where_a_case_fails_or_an_item_has_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "scenario: wrong\npurpose: p\nsource: s\nrules: [R1]\nmachine: {each: {driver: none}}\n"
        "steps:\n- {smc: CALLS_REVISION, expect: {a0: 3}}\n"
    )
    report = tmp_path / "report.xml"
    assert run(["conform", str(path), "--junit", str(report)]) == 1
    said = capsys.readouterr().out
    assert f"{path}:7: smc: CALLS_REVISION: a0: expected" in said and "1 failed" in said
    assert ElementTree.fromstring(report.read_text())[0][0].tag == "failure"

    assert run(["conform", "api-uid", "--coverage", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["items"]["SMC functions"]["Function.CALLS_UID"] == ["api-uid"]
    assert "Function.CALLS_COUNT" in told["missing"] and not told["good"]
    assert run(["conform", "api-uid", "--coverage"]) == 1
    assert "no case shows Function.CALLS_COUNT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["conform", "no-such-case"], "is no case"),
        (["conform", "api-uid", "--vectors", "x.json"], "--vectors goes with"),
        (["conform", "--observed", "x.json"], "goes with --vectors"),
        (["conform", "no.yaml"], "No such file"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
