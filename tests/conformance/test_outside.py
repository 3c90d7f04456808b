"""Cases from outside: the tool at both ends, and between them `serve`, as another mediator would stand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mediator.cli import run
from mediator.conformance import outside
from mediator.conformance.catalogue import catalogue, find_case
from mediator.conformance.outside import TargetError, run_outside
from mediator.conformance.run_cases import Verdict
from mediator.core import sharing, yielding
from mediator.policies import load_policy
from mediator.scenario.language import Scenario
from mediator.service.options import ServeOptions
from mediator.service.serve import Bench
from mediator.shell import Service
from optee.abi.smc import Function
from tests.docs.pages import DOCS


def against_serve(
    cases: Sequence[Scenario], folder: Path, policy: str = "default", *, ends_before: int | None = None
) -> list[Verdict]:
    """Run cases against `serve --external --socket door --secure-world optee`, which may end before one of them."""
    door, optee = folder / "door", folder / "optee"
    verdicts: list[Verdict] = []

    async def main() -> None:
        bench = Bench(ServeOptions(guests=0, policy=policy, external=door, secure_world=optee), load_policy(policy))
        served = trio.Event()

        def progress(done: int) -> None:
            if done == ends_before:
                serving.cancel()

        async def tool() -> None:
            verdicts.extend(await run_outside(cases, door, optee, progress, served.set))
            bench.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tool)
            await served.wait()
            with trio.CancelScope() as serving:
                await bench.run()

    trio.run(main)
    return verdicts


def test_our_own_serve_passes_whatever_can_be_seen_from_outside(tmp_path: Path) -> None:
    cases = catalogue()
    verdicts = against_serve(cases, tmp_path)
    assert [(one.case.scenario, one.why) for one in verdicts if one.word == "failed"] == []
    passed = sum(one.passed for one in verdicts)
    assert passed >= len(cases) / 2
    assert f"{passed} of {len(cases)} cases run" in (DOCS / "conformance.md").read_text(encoding="utf-8")
    assert all(one.why for one in verdicts if one.word == "skipped")
    assert not any((tmp_path / name).exists() for name in ("door", "optee"))


def test_what_a_target_does_not_offer_is_skipped_and_what_it_answers_otherwise_fails(tmp_path: Path) -> None:
    names = ["api-uid", "registered-message", "notification-value", "api-count", "register"]
    verdicts = against_serve([find_case(name) for name in names], tmp_path, "minimal")
    assert [one.word for one in verdicts] == ["passed", "skipped", "skipped", "failed", "passed"]
    assert verdicts[1].why == "the target does not offer RPC_ARG"
    assert "smc: CALLS_COUNT: a0: expected bits" in verdicts[3].why


def _swap_entries(guest: Any, shared: Any, entries: Any) -> None:
    first = shared.filled
    _PIN(guest, shared, entries)
    for page in shared.lists[first:]:
        page.view[:16] = bytes(page.view[8:16]) + bytes(page.view[:8])


_PIN = sharing._pin


@pytest.mark.parametrize(
    ("thing", "name", "value", "case"),
    [
        (yielding, "_PRESET", bytes(4), "result-preset"),
        (yielding, "_ANSWER", (slice(0, 32),), "results-only"),
        (sharing, "_pin", _swap_entries, "register"),
    ],
)
def test_a_broken_target_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thing: Any, name: str, value: Any, case: str
) -> None:
    monkeypatch.setattr(thing, name, value)
    verdicts = against_serve([find_case(case), find_case("api-uid")], tmp_path)
    assert [one.word for one in verdicts] == ["failed", "passed"]


def test_a_target_that_ends_fails_what_is_left(tmp_path: Path) -> None:
    verdicts = against_serve([find_case("api-uid")] * 3, tmp_path, ends_before=1)
    assert [one.word for one in verdicts] == ["passed", "failed", "failed"]
    assert "the link of kvm-1" in verdicts[2].why


def test_a_target_that_never_answers_fails_and_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finish = Service.finish

    async def silent(self: Service, vm: Any, vcpu: int, regs: Any, step: Any) -> Any:
        answer = await finish(self, vm, vcpu, regs, step)
        if regs[0] == Function.CALLS_UID:
            await trio.sleep_forever()
        return answer

    monkeypatch.setattr(Service, "finish", silent)
    monkeypatch.setattr(outside, "CASE_SECONDS", 1)
    verdicts = against_serve([find_case(name) for name in ("api-revision", "api-uid", "os-uuid")], tmp_path)
    assert [one.word for one in verdicts] == ["passed", "failed", "passed"]


async def test_who_waits_for_nobody_says_so(autojump_clock: MockClock, tmp_path: Path) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(TargetError, match="nobody has come for the secure world")):
        await run_outside([find_case("api-uid")], tmp_path / "door", tmp_path / "optee")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "a"], "belong together"),
        (["--secure-world", "a"], "belong together"),
        (["--target", "a", "--secure-world", "b", "--coverage"], "goes with --junit and --json only"),
        (["--target", "a", "--secure-world", "{folder}/optee"], "nobody has come for the secure world"),
    ],
)
def test_what_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(outside, "COMES_SECONDS", 0)
    assert run(["conform", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and said.count("error: ") == 1
