"""`mediator serve` as a whole, in virtual time: what the summary says, and what it says if we are wrong."""

import json
import signal
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

import guests
from guests.workloads import Report, hello, mixed, shm
from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.cli import run as cli
from mediator.core import fast
from mediator.core.ledger import Charge
from mediator.core.mediator import Mediator
from mediator.core.steps import Forward, Regs
from mediator.documents import DocumentError
from mediator.policies import load_policy
from mediator.service import serve
from mediator.service.options import ServeOptions
from mediator.service.serve import Bench, run_bench
from mediator.service.summary import Summary
from optee.abi.smc import Function
from tests.wrong_mediators import (
    messages_are_forwarded_by_ipa,
    pages_are_forwarded_as_ipas,
    pages_stay_pinned,
    reserved_memory_is_offered,
)

NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
SHORT = {"hello": partial(hello, rounds=5), "mixed": partial(mixed, rounds=1, callers=2), "shm": partial(shm, rounds=3)}
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "WORKLOADS", SHORT)


def run(workload: str = "hello", **options: Any) -> Summary:
    """Run in virtual time, checked at every step unless told otherwise."""
    chosen = ServeOptions(**{"workload": workload, "check": True, **options})
    bench = Bench(chosen, load_policy(chosen.policy))
    return trio.run(bench.run, clock=MockClock(autojump_threshold=0))


@cache
def four_guests(workload: str, policy: str) -> Summary:
    """The same run for all who look at it."""
    return run(workload, policy=policy)


@pytest.mark.parametrize("workload", sorted(SHORT))
@pytest.mark.parametrize("policy", ["default", "xen"])
def test_four_guests_are_served(workload: str, policy: str) -> None:
    summary = four_guests(workload, policy)
    assert [(guest.name, guest.hypervisor, guest.vmid) for guest in summary.guests] == [
        ("kvm-1", "kvm", 1),
        ("xen-2", "xen", 2),
        ("kvm-3", "kvm", 3),
        ("xen-4", "xen", 4),
    ]
    for guest in summary.guests:
        assert (guest.errors, guest.notes, guest.ended) == (0, (), "finished")
        assert guest.invokes and guest.calls and guest.rpcs and guest.pages_pinned_peak and guest.pages_translated
    assert summary.violations == []
    assert summary.left == NOTHING_LEFT
    assert summary.good


def test_the_mission_is_stated_in_numbers() -> None:
    summary = four_guests("mixed", "default")
    data = summary.as_data()
    assert data["format"] == "mediator-serve/1"
    assert data["mission"] == {
        "reserved_memory_offered_by_optee": 4,
        "reserved_memory_seen_by_guests": 0,
        "forged_client_ids_tried": 4,
        "foreign_client_ids_at_optee": 0,
        "pages_translated": sum(guest.pages_translated for guest in summary.guests),
        "pages_with_pa_equal_to_ipa": 0,
        "quota_refusals": 4,
    }
    assert data["mission"]["pages_translated"] > 0
    assert data["violations"] == 0 and data["left"] == NOTHING_LEFT
    assert len(data["guests"]) == 4 and {"name", "hypervisor", "vmid", "invokes", "errors"} <= data["guests"][0].keys()
    assert data["totals"]["invokes"] == sum(guest["invokes"] for guest in data["guests"])
    # Each guest tries five functions that are the hypervisor's alone, a buffer over its quota, a panic and a cancel.
    assert data["totals"]["denied"] >= 20 and data["totals"]["refused"] >= 4
    assert data["totals"]["panics"] >= 4 and data["totals"]["cancels"] >= 4 and data["totals"]["thread_limits"] >= 0
    text = "\n".join(summary.mission())
    assert "offered by OP-TEE to 4 of 4 guests, hidden from 4" in text
    assert "4 forged ones tried, 0 reached OP-TEE" in text
    assert "of which IPA = PA: 0" in text
    assert "quota refusals: 4" in text
    assert f"calls denied: {data['totals']['denied']}" in text
    assert "violations: 0" in text and "left behind: nothing" in text


def test_without_check_nothing_is_claimed() -> None:
    bench = Bench(ServeOptions(workload="hello"), load_policy("default"))
    summary = trio.run(bench.run, clock=MockClock(autojump_threshold=0))
    assert summary.violations == [] and summary.as_data()["violations"] == 0
    assert summary.good
    assert "violations: 0 (the cheap invariants" in "\n".join(summary.mission())


@pytest.mark.parametrize("hypervisor", ["kvm", "xen"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_guests_of_one_kind(hypervisor: str, count: int) -> None:
    summary = run(guests=count, hypervisor=hypervisor)
    assert [guest.name for guest in summary.guests] == [f"{hypervisor}-{n + 1}" for n in range(count)]
    assert {guest.hypervisor for guest in summary.guests} <= {hypervisor}
    assert summary.good and summary.violations == []


def test_the_same_seed_does_the_same() -> None:
    first, second = (run("hello", seed=7).as_data() for _ in range(2))
    for data in (first, second):
        del data["seconds"], data["up_seconds"]
    assert first == second


def test_run_bench_in_real_time() -> None:
    summary = run_bench(ServeOptions(guests=2, workload="hello", check=True))
    assert summary.good and summary.violations == [] and summary.seconds > 0


def test_a_policy_that_is_not_there_is_one_line() -> None:
    with pytest.raises(DocumentError) as caught:
        run_bench(ServeOptions(policy="none"))
    assert len(caught.value.lines) == 1


# Something goes wrong


class Broken(guests.GuestError):
    """A guest's software gives up."""


def _with(name: str, work: Any) -> Any:
    async def workload(guest: guests.Guest, report: Report) -> None:
        await (work if guest.name == name else SHORT["hello"])(guest, report)

    return workload


@pytest.mark.parametrize("name", ["kvm-1", "xen-4"])
def test_a_guest_that_fails_is_told_and_the_others_finish(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its suspended calls and buffers are given back as well."""

    async def fails(guest: guests.Guest, report: Report) -> None:
        async with guest.context() as context:
            await context.allocate(8192)
            await trio.sleep(0.01)
            raise Broken("no more")

    monkeypatch.setitem(SHORT, "hello", SHORT["hello"])
    monkeypatch.setattr(serve, "WORKLOADS", {"hello": _with(name, fails)})
    summary = run()
    assert not summary.good
    ended = {guest.name: (guest.ended, guest.errors) for guest in summary.guests}
    assert ended.pop(name) == ("failed", 1)
    assert set(ended.values()) == {("finished", 0)}
    assert summary.violations == [] and summary.left == NOTHING_LEFT
    failed = next(guest for guest in summary.guests if guest.name == name)
    assert failed.notes == ("Broken: no more",)


def test_a_guest_that_sees_a_wrong_answer_makes_the_run_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    async def complains(guest: guests.Guest, report: Report) -> None:
        report.expect("arithmetic", False)

    monkeypatch.setattr(serve, "WORKLOADS", {"hello": _with("xen-2", complains)})
    summary = run()
    assert not summary.good
    assert [guest.errors for guest in summary.guests] == [0, 1, 0, 0]
    assert all(guest.ended == "finished" for guest in summary.guests)


async def _for_ever(guest: guests.Guest, report: Report) -> None:
    while True:
        await mixed(guest, report, rounds=1, callers=2)


def test_the_duration_ends_a_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "WORKLOADS", {"mixed": _for_ever})
    summary = run("mixed", duration=0.25, guests=2)
    assert summary.good, [guest.notes for guest in summary.guests]
    assert summary.violations == [] and summary.left == NOTHING_LEFT
    assert {guest.ended for guest in summary.guests} == {"finished"}
    assert summary.seconds >= 0.25


@pytest.mark.parametrize("moment", [0, 0.001, 0.02, 0.1, 0.21])
@pytest.mark.parametrize(
    ("how", "duration"), [("stop", None), (signal.SIGINT, 1000.0), (signal.SIGTERM, None)], ids=str
)
def test_a_stop_at_any_moment_ends_in_order(
    how: Any, duration: float | None, moment: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "WORKLOADS", {"mixed": _for_ever})
    bench = Bench(ServeOptions(guests=2, workload="mixed", check=True, duration=duration), load_policy("default"))
    found: list[Summary] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def whole() -> None:
                found.append(await bench.run())

            nursery.start_soon(whole)
            await trio.testing.wait_all_tasks_blocked() if not moment else await trio.sleep(moment)
            if how == "stop":
                bench.stop()
            else:
                signal.raise_signal(how)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    (summary,) = found
    assert summary.violations == [] and summary.left == NOTHING_LEFT
    assert {guest.ended for guest in summary.guests} == {"finished"}
    assert summary.good, [guest.notes for guest in summary.guests]
    assert summary.seconds < serve.IDLE_SECONDS, "nobody waits for the rest of the duration"


@pytest.mark.parametrize("workload", ["hello", "mixed"])
def test_a_guest_that_does_not_stop_has_its_power_cut(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing happens any more; and a tour that never ends is waited for as long, and no longer."""

    async def stubborn(guest: guests.Guest, report: Report) -> None:
        """Waits in its kernel where no signal reaches it."""
        async with guest.context() as context:
            await context.allocate(8192)
            with guest.driver.uninterruptible.scope():
                await trio.sleep_forever()

    monkeypatch.setattr(serve, "WORKLOADS", {workload: _with("kvm-3", stubborn)})
    summary = run(workload, duration=0.01)
    assert summary.seconds < 4 * serve.IDLE_SECONDS
    assert summary.violations == [] and summary.left == NOTHING_LEFT
    ended = {guest.name: guest.ended for guest in summary.guests}
    assert ended["kvm-3"] == "killed"
    assert [ended[name] for name in ("kvm-1", "xen-2", "xen-4")] == ["finished"] * 3


def _one_unpin_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    unpin = VirtualMachine.unpin
    count = 0

    def unpinned(self: VirtualMachine, pinned: Pinned) -> None:
        nonlocal count
        count += 1
        if count != 7:
            unpin(self, pinned)

    monkeypatch.setattr(VirtualMachine, "unpin", unpinned)


def _refund_removed(nth: int | None) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        refund = Charge.refund
        count = 0

        def refunded(self: Charge) -> None:
            nonlocal count
            count += 1
            if nth is not None and count != nth:
                refund(self)

        monkeypatch.setattr(Charge, "refund", refunded)

    return patch


def _forged_id_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = fast.enter

    def entered(core: Mediator, guest: Any, regs: Regs, function: Function) -> Any:
        step = enter(core, guest, regs, function)
        if isinstance(step, Forward) and regs[7]:
            return Forward((*step.regs[:7], regs[7]), step.ticket)
        return step

    monkeypatch.setattr(fast, "enter", entered)


@pytest.mark.parametrize(
    "patch",
    [
        pages_stay_pinned,
        _one_unpin_removed,
        _refund_removed(None),
        _refund_removed(1),
        _refund_removed(10),
        pages_are_forwarded_as_ipas,
        messages_are_forwarded_by_ipa,
        _forged_id_forwarded,
    ],
    ids=["unpin", "one unpin", "refunds", "first refund", "a refund", "list of IPAs", "message by IPA", "forged id"],
)
@pytest.mark.parametrize(("policy", "check"), [("default", True), ("xen", True), ("default", False)])
def test_a_mediator_that_is_wrong_makes_the_run_bad(
    patch: Patch, policy: str, check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever OP-TEE makes of it: the run ends with a summary, violations and a bad verdict, and says which."""
    patch(monkeypatch)
    summary = run("hello", policy=policy, duration=5.0, check=check)
    assert summary.violations
    assert not summary.good
    assert summary.as_data()["violations"] == summary.violated >= len(summary.violations)


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_what_is_violated_is_said_and_does_not_fill_the_screen(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first ten on standard error, and how many more; of what is kept, too, there is no more than a bound."""
    _refund_removed(None)(monkeypatch)
    monkeypatch.setattr(serve, "KEPT_VIOLATIONS", 12)
    summary = run("hello", duration=5.0)
    assert summary.violated > 12 == len(summary.violations)
    monkeypatch.setattr(serve, "run_bench", lambda options: summary)
    monkeypatch.setattr(structlog, "configure", lambda **options: None)
    assert cli(["serve", *arguments]) == 1
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("and ") or line in summary.violations]
    assert said == [*summary.violations[:10], f"and {summary.violated - 10} more violations"]
    if arguments:
        assert json.loads(out)["violations"] == summary.violated
    else:
        assert f"violations: {summary.violated}" in out


def test_reserved_memory_that_a_guest_sees_makes_the_run_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved_memory_is_offered(monkeypatch)
    summary = run()
    assert not summary.good
    assert "offered by OP-TEE to 4 of 4 guests, hidden from 0" in "\n".join(summary.mission())


def test_more_guests_than_optee_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = serve.Config
    monkeypatch.setattr(serve, "Config", lambda **options: config(**{**options, "guests": 2}))
    summary = run(guests=4)
    assert summary.refused_guests == ("kvm-3", "xen-4")
    assert not summary.good
    assert [guest.ended for guest in summary.guests] == ["finished", "finished"]
    assert summary.left == NOTHING_LEFT and summary.violations == []
