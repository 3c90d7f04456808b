"""The order of tasks comes from the seed alone, and a trio that orders otherwise is noticed."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import trio
from trio._core import _run as scheduler

from mediator.interleaving import UnknownScheduler, interleaving, run
from tests.xtest.cases import CASES
from tests.xtest.test_cases import play

TOP = Path(__file__).resolve().parents[2]


async def race() -> str:
    """Names of five tasks, in the order in which they get to run in ten rounds."""
    order: list[str] = []

    async def task(name: str) -> None:
        for _ in range(10):
            order.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in "abcde":
            nursery.start_soon(task, name)
    return "".join(order)


def test_the_same_seed_is_the_same_order_and_others_are_others() -> None:
    orders = [run(race, seed) for seed in range(50)]
    assert orders == [run(race, seed) for seed in range(50)]
    assert len(set(orders)) == 50


def test_the_order_is_the_same_in_another_process() -> None:
    code = "from mediator.interleaving import run; from tests.xtest.test_interleaving import race; print(run(race, 7))"
    for hash_seed in "12":
        other = subprocess.run(
            [sys.executable, "-c", code],
            cwd=TOP,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TOP)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert other.stdout.strip() == run(race, 7)


def test_whole_runs_repeat() -> None:
    """Four guests with six clients each: the same SMCs and RPCs by seed, others by another."""
    first, again, other = [play(CASES["S6 1003"], "2 kvm 2 xen", seed) for seed in (3, 3, 4)]
    assert first.smcs == again.smcs and first.at_optee == again.at_optee
    assert first.at_optee != other.at_optee


def test_virtual_time() -> None:
    async def sleeper() -> float:
        began = trio.current_time()
        await trio.sleep(86_400)
        return trio.current_time() - began

    assert run(sleeper, 0) == pytest.approx(86_400)


def test_trio_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r
    with pytest.raises(KeyError), interleaving(1):
        assert scheduler._ALLOW_DETERMINISTIC_SCHEDULING is True and scheduler._r is not before[1]
        raise KeyError
    assert (scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r) == before


def test_a_trio_that_orders_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If trio loses what this relies on, every seeded run fails, and says why."""
    for name, value in (("_r", 5), ("_ALLOW_DETERMINISTIC_SCHEDULING", "yes")):
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, name, value)
            with pytest.raises(UnknownScheduler, match=trio.__version__):
                run(race, 0)
    with monkeypatch.context() as patch:
        patch.delattr(scheduler, "_r")
        with pytest.raises(UnknownScheduler):
            run(race, 0)


def test_trio_still_shuffles_from_this_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names exist: this is that the scheduler uses them, once a round and for nothing else."""

    class Keeping(Random):
        def shuffle(self, x: list) -> None:
            pass

    class Reversing(Random):
        def shuffle(self, x: list) -> None:
            x.reverse()

    monkeypatch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    orders = []
    for source in (Keeping(), Reversing()):
        monkeypatch.setattr(scheduler, "_r", source)
        orders.append(trio.run(race))
    assert sorted(orders) == ["abcde" * 10, "edcba" * 10]
