"""The end-to-end benchmarks measure what they say; how fast they are depends on the machine."""

import pytest

from mediator import bench
from mediator.bench import NAMES, Bench
from mediator.bench.door import DOOR
from mediator.bench.end_to_end import END_TO_END, PRICE, PRICE_BUFFER
from mediator.policies import load_policy

SMCS = {"e2e-invoke": 1, "e2e-open": 2, "e2e-share-4-kib": 2, "e2e-share-512-kib": 2}
TARGETS = {"e2e-invoke": 8000, "e2e-open": 1000, "e2e-share-512-kib": 4000}


@pytest.fixture(scope="module")
def done() -> Bench:
    return bench.run(load_policy("default"), "e2e", lambda name, count, total: None, batches=2)


def test_every_case_is_there_with_its_target(done: Bench) -> None:
    assert [measured.case.name for measured in done.end_to_end] == [case.name for case in END_TO_END]
    assert {*(case.name for case in END_TO_END), PRICE} < set(NAMES)
    assert not done.cases and done.memory is None
    for measured in done.end_to_end:
        data = measured.as_data()
        assert data["target_per_second"] == TARGETS.get(measured.case.name)
        assert data["met"] is (None if measured.met is None else data["per_second"] >= data["target_per_second"])
        assert data["per_second"] == pytest.approx(1e6 / data["median"], rel=0.01)
        assert 0 < data["min"] <= data["median"] <= data["p95"] and data["checkpoints"] > 0


def test_an_operation_is_as_many_calls_as_it_should_be(done: Bench) -> None:
    smcs = {measured.case.name: measured.smcs for measured in done.end_to_end}
    assert {name: smcs[name] for name in SMCS} == SMCS
    assert smcs["e2e-load"] > 10  # LOAD_TA, and the store of TA versions around it


def test_the_price_of_refusing_reserved_memory(done: Bench) -> None:
    """A temporary buffer costs two more calls and its pages; one that stays registered costs nothing more."""
    prices = {price.how: price for price in done.prices}
    pages = PRICE_BUFFER // 4096
    temporary = prices.pop("temporary")
    assert temporary.smcs == 3 and temporary.pages in (pages, pages + 1)  # a process's buffer rarely begins at a page
    assert set(prices) == {"registered once", "allocated once"}
    for price in prices.values():
        assert (price.smcs, price.pages) == (1, 0)
    data = done.as_data()
    assert [entry["how"] for entry in data["price_of_no_reserved_memory"]] == ["temporary", *prices]
    assert data["end_to_end"][0]["name"] == "e2e-invoke"


def test_a_name_chooses() -> None:
    chosen = bench.run(load_policy("default"), "share-64", lambda name, count, total: None, batches=1)
    assert [measured.case.name for measured in chosen.end_to_end] == ["e2e-share-64-kib"] and not chosen.prices


def test_the_door_is_measured_beside_a_bare_echo() -> None:
    measured = bench.run(load_policy("default"), DOOR, lambda name, count, total: None, batches=2)
    assert DOOR in NAMES and not measured.end_to_end and measured.door is not None
    data = measured.as_data()["door"]
    assert data["ratio"] == pytest.approx(data["fast"]["median"] / data["echo"]["median"], abs=0.01)
    assert data["invokes_per_second"] == pytest.approx(1e6 / data["invoke"]["median"], rel=0.01)
    assert (data["target_ratio"], data["target_invokes_per_second"], data["target_idle_guest_bytes"]) == (
        1.5,
        4000,
        1 << 20,
    )
    assert data["met"]["ratio"] is (data["ratio"] <= 1.5) and data["met"]["idle_guest_bytes"]
    idle = data["idle_guest_bytes_by_hypervisor"]
    assert set(idle) == {"kvm", "xen"} and min(idle.values()) > 0
    assert data["idle_guest_bytes"] == max(idle.values()) < 1 << 20
