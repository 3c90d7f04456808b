"""The visible vectors: Xen's mediator and ours agree, but for what a rule demands."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from mediator.conformance import compare as comparing
from mediator.conformance.compare import Report, compare
from mediator.conformance.intended import CONDITIONS, declarations
from mediator.conformance.load import load_vectors
from mediator.policies import load_policy
from tests.conformance.documents import FORMAT, VISIBLE, compared, document, names, visible, write, xen
from tests.shared import needs_shared

pytestmark = needs_shared

R11 = {"random_18": 23, "random_72": 11, "random_75": 21, "random_87": 13}
FIRST_INTENDED = [
    *[(name, "R11", step) for name, step in R11.items()],
    ("rpc_shm_alloc_untranslatable", "R12", 6),
    ("all_cmds", "R15", 6),
    ("random_93", "R16", 16),
]
BY_HAND = set(CONDITIONS) - {
    "register_refused_in_a0",
    "shm_alloc_refused",
    "malformed_registration",
    "reply_does_not_fit",
}
"""Conditions that no visible vector meets: see test_rules.py."""
DIVERGING = {name for name, _, _ in FIRST_INTENDED}


@cache
def whole() -> Report:
    return compare(load_vectors(VISIBLE), xen(), observe=True)


def test_visible_vectors_agree_but_for_declared_kinds() -> None:
    report = whole()
    assert report.differ == []
    assert report.violations == []
    assert report.good
    assert report.not_compared < report.steps * 5 / 100
    assert report.agree + sum(report.intended.values()) + report.not_compared == report.steps
    assert report.vectors == 73


def test_document_has_the_keys_of_the_format() -> None:
    data = whole().as_data()
    assert data["format"] == "mediator-conform/1"
    assert {"vectors", "steps", "agree", "intended", "not_compared", "differ"} <= data.keys()
    assert data["steps"] == sum(len(visible(name)["steps"]) for name in names())


@pytest.mark.parametrize(("name", "rule", "step"), FIRST_INTENDED)
def test_a_rule_first_applies_where_the_format_says(name: str, rule: str, step: int) -> None:
    before, after = visible(name), visible(name)
    del before["steps"][step:], after["steps"][step + 1 :]
    assert not compared(before).intended
    assert compared(after).intended == {rule: 1}


def test_what_a_rule_takes_away_stays_away() -> None:
    """R11: the registration that Xen keeps is missing in each later step; R12: the charge, until the VM ends."""
    for name, step in R11.items():
        vector = visible(name)
        later = [at for at, one in enumerate(vector["steps"]) if at >= step and one["op"] == "smc"]
        assert 0 < compared(vector).intended["R11"] <= len(later)
    assert compared(visible("rpc_shm_alloc_untranslatable")).intended == {"R12": 5}


def test_no_other_vector_needs_a_rule() -> None:
    assert compared(*[visible(name) for name in names() if name not in DIVERGING]).intended == {}


def test_each_declared_kind_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it something differs in the visible vectors, or it has a test of its own: none is declared in vain."""
    kinds = declarations()
    vectors = document(*[visible(name) for name in sorted(DIVERGING)])
    for kind in kinds:
        if kind.condition in BY_HAND:
            continue
        monkeypatch.setattr(comparing, "declarations", lambda left=kind: [one for one in kinds if one is not left])
        assert compare(vectors, xen()).differ, f"{kind.rule} {kind.condition} explains nothing"


def test_what_is_observed_is_a_vector_file_that_agrees_with_us(tmp_path: Path) -> None:
    path = write(tmp_path / "observed.json", *whole().observed, format=FORMAT)
    again = load_vectors(path)
    assert [vector.name for vector in again.vectors] == names()
    report = compare(again, xen())
    assert report.differ == []
    assert report.intended == {}
    assert report.not_compared == 0
    assert report.agree == report.steps == whole().steps


def test_what_is_observed_says_what_memory_a_guest_was_left_with(tmp_path: Path) -> None:
    """After a step that differs as a rule demands, guests go on with the memory that was recorded."""
    changed = visible("random_93")
    changed["steps"][8]["regs"][2] = "0x0"
    report = compare(document(changed), xen(), observe=True)
    assert report.intended["R18"]
    again = compare(load_vectors(write(tmp_path / "observed.json", *report.observed, format=FORMAT)), xen())
    assert again.agree == again.steps and not again.differ


def test_another_policy_is_not_taken_for_xen() -> None:
    vectors = document(visible("fast_calls_all"), visible("register_unregister"))
    report = compare(vectors, load_policy("default"))
    assert {found["field"] for found in report.differ} >= {"regs"}
    assert report.violations == []


def test_progress_names_each_vector() -> None:
    seen: list[str] = []
    compare(document(visible("shm_config"), visible("client_ids")), xen(), progress=seen.append)
    assert seen == ["shm_config", "client_ids"]


def test_comparing_leaves_the_document_alone() -> None:
    vectors = document(visible("rpc_alloc"))
    before = deepcopy(vectors)
    compare(vectors, xen(), observe=True)
    assert vectors == before
