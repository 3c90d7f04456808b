"""The benchmarks: that they measure what they say, and what they print. What they find depends on the machine."""

import dataclasses
import itertools
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator import bench
from mediator.bench import NAMES, Bench
from mediator.bench.cases import CASES, Case
from mediator.bench.measure import Timing
from mediator.bench.memory import GROWTH_TARGET, Growth
from mediator.bench.stand import LARGE_PAGES, SMALL_BUFFERS, SMALL_PAGES, Stand, buffer_call, register_call
from mediator.bench.storage import Advice, Point, advise
from mediator.core.policy import Policy
from mediator.policies import load_policy
from optee.abi.smc import Function


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("default")


@pytest.fixture(scope="module")
def done(policy: Policy) -> Bench:
    return bench.run(policy, "", lambda name, count, total: None, batches=2, calls=200)


def test_each_case_stands_beside_its_baselines(done: Bench) -> None:
    assert [measured.case.name for measured in done.cases] == [case.name for case in CASES]
    for measured in done.cases:
        assert measured.baselines
        for timing in (measured.timing, *measured.baselines.values()):
            assert 0 < timing.minimum <= timing.median <= timing.p95


def test_the_document_has_units_targets_and_ratios(done: Bench) -> None:
    data = done.as_data()
    assert data["format"] == "mediator-bench/1" and data["cpus"] >= 1
    for case in data["cases"]:
        assert case["unit"] == "us" and case["what"]
        assert case["met"] is (None if case["target"] is None else case["median"] <= case["target"])
        for baseline in case["baselines"]:
            assert baseline["ratio"] == pytest.approx(case["median"] / baseline["median"], rel=0.1, abs=0.01)
    targets = {case["name"]: case["target"] for case in data["cases"]}
    assert targets == {"fast-call": 5, "values": 15, "buffers": 60, "register": 500, "unregister": None}


@pytest.mark.parametrize(("rounds", "seconds", "taken"), [(3, 0, 3), (3, 2, 3), (3, 10, 7), (1, 3, 2)])
def test_samples_are_taken_for_a_while(
    monkeypatch: pytest.MonkeyPatch, rounds: int, seconds: float, taken: int
) -> None:
    clock, samples = itertools.count(0, 2), itertools.count(1)
    module = import_module("mediator.bench.measure")
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    (found,) = module.measure([lambda: next(samples)], rounds, seconds)
    assert (found.minimum, found.p95) == (1, taken)


def test_calls_leave_nothing_behind(done: Bench) -> None:
    assert done.memory is not None and done.memory.pages == 0 and done.memory.calls == 200


@pytest.mark.parametrize(("wanted", "names"), [("buffers", ["buffers"]), ("register", ["register", "unregister"])])
def test_a_name_chooses(policy: Policy, wanted: str, names: list[str]) -> None:
    told: list[str] = []
    chosen = bench.run(policy, wanted, lambda name, count, total: told.append(name), batches=1)
    assert [measured.case.name for measured in chosen.cases] == names == list(dict.fromkeys(told))
    assert chosen.memory is None and chosen.as_data()["memory"] is None and set(names) < set(NAMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_measured_can_go_on_for_ever(policy: Policy, case: Case) -> None:
    """Each repetition starts from what the one before started from."""
    stand = Stand(policy)
    try:
        ready = case.prepare(stand)
        guest = stand.mediator.guests[stand.vm.client_id]
        before = guest.ledger.sums(), stand.vm.pins, stand.machine.pages.allocated
        forwarded = guest.counters.forwarded
        for _ in range(3):
            ready.operation()
            if ready.after is not None:
                ready.after()
        assert (guest.ledger.sums(), stand.vm.pins, stand.machine.pages.allocated) == before
        calls = 3 if ready.after is None else 6
        assert guest.counters.forwarded == forwarded + calls and not guest.counters.refused
    finally:
        stand.close()


def test_the_buffers_are_as_large_as_they_say(policy: Policy) -> None:
    stand = Stand(policy)
    try:
        guest = stand.mediator.guests[stand.vm.client_id]
        stand.succeeds(buffer_call(stand))
        assert guest.ledger.pages_peak == SMALL_BUFFERS * SMALL_PAGES
        stand.succeeds(register_call(stand, LARGE_PAGES, 7))
        pinned = stand.vm.pinned()
        assert guest.ledger.pages == LARGE_PAGES == len(pinned) and set(pinned.values()) == {1}
    finally:
        stand.close()


def test_a_refusal_is_not_measured(policy: Policy) -> None:
    few = dataclasses.replace(policy, limits=dataclasses.replace(policy.limits, pages=3))
    with pytest.raises(RuntimeError, match="0xffff000c"):
        bench.run(few, "buffers", lambda name, count, total: None, batches=1)
    none = dataclasses.replace(policy, functions=policy.functions - {Function.GET_ASYNC_NOTIF_VALUE})
    with pytest.raises(RuntimeError, match="0xffffffffffffffff"):
        bench.run(none, "fast", lambda name, count, total: None, batches=1)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_a_timing_summarizes_its_samples(samples: list[float]) -> None:
    timing = Timing.of(samples)
    assert timing.minimum == min(samples) and timing.minimum <= timing.median <= max(samples)
    assert timing.p95 in samples and sum(sample <= timing.p95 for sample in samples) >= 0.95 * len(samples)


@pytest.mark.parametrize(
    ("growth", "met"),
    [
        (Growth(1, GROWTH_TARGET - 1, 5, 0), True),
        (Growth(1, -4096, -5, 0), True),
        (Growth(1, GROWTH_TARGET, 0, 0), False),
        (Growth(1, 0, 0, 1), False),
    ],
)
def test_flat_memory_is_few_bytes_and_no_page(growth: Growth, met: bool) -> None:
    assert growth.met is met and growth.as_data()["met"] is met


def test_storage_is_measured_with_and_without_caches(done: Bench) -> None:
    found = done.storage
    assert found is not None and found.object_bytes == 2 * 16 * 1024 and found.objects == 2
    names = {cost.name for cost in found.costs}
    pieces = {"read-again-1k", "read-inside", "rewrite", "write-inside"}
    assert names == {"read-first", "open", "read-again", "enumerate", "create"} | pieces
    for name in names:
        assert found.of(name, "managed").rpcs < found.of(name, "optee").rpcs
        assert found.of(name, "optee").us > 0
    assert found.saved("read-again") >= 0.8 and found.saved("rewrite") >= 0.4
    assert {"objects", "blocks", "nodes", "rpc_buffers"} == set(found.hit_rates)
    data = done.as_data()["storage"]
    assert data["statistics"]["levels"]["blocks"]["hits"] and "passes" in data["statistics"]["collector"]
    assert {point["option"] for point in data["sweep"]} == {
        "CFG_BLOCK_CACHE_SIZE",
        "CFG_TEE_POBJ_CACHE_SIZE",
        "CFG_HTREE_NODE_COUNT",
    }
    assert len(data["advice"]) == 3 * 4 and data["gains"][0].keys() == {"name", "rpcs_saved", "times_faster"}


def test_the_advice_is_the_smallest_size_that_is_worth_it() -> None:
    counts = {0: 100, 8: 95, 16: 27, 32: 20, 64: 20}
    points = [Point("CFG_X", size, 1000 + size, {"use": count, "other": 7}) for size, count in counts.items()]
    worth, nothing = advise(points)
    assert worth == Advice("CFG_X", "use", 16, 16, 0.73)
    assert nothing == Advice("CFG_X", "other", 0, 0, 0.0)
    assert str(nothing) == "other: CFG_X=0, it saves nothing"
