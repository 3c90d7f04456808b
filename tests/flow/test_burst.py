"""Bursts in four forms, and a guest's small calls beside a flood: what flow control promises, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from guests import Direction, TeeError, Temporary, Value
from guests.workloads.burst import CLIENTS, Form
from mediator.bench.burst import CALLS, SECONDS, BurstRow, one_burst
from mediator.bench.fairness import fairness
from mediator.board import Board
from mediator.core.policy import FlowPolicy, Policy
from mediator.interleaving import run
from mediator.policies import load_policy
from optee.abi.results import Origin, Result
from optee.tas.load import AllocatingTa, ReusingTa, StackExhaustionTa, StackSmashTa

MANY = 400


@cache
def policy() -> Policy:
    return load_policy("default")


@cache
def row(form: Form, ta: type[AllocatingTa] | type[ReusingTa] = AllocatingTa) -> BurstRow:
    return one_burst(policy(), ta, form, "many", MANY, 0.0)


@pytest.mark.parametrize("form", list(Form))
def test_no_call_is_lost_and_queues_keep_their_bounds(form: Form) -> None:
    found = row(form)
    assert found.burst.answered == found.burst.calls == MANY
    assert found.bound is None or found.queue <= found.bound


def test_back_pressure_is_five_times_as_fast_as_a_delay_and_nobody_is_told_of_threads() -> None:
    pressed, delayed, bare = (row(form).burst for form in (Form.BACK_PRESSURE, Form.DELAY, Form.BARE))
    assert pressed.rate >= 5 * delayed.rate
    assert pressed.thread_limits == 0 < bare.thread_limits
    assert pressed.took(0.99) < bare.took(0.99)


def test_the_heap_of_tas_follows_calls_at_once_not_the_rate() -> None:
    """Who allocates per call holds as much as calls run at once; who reuses holds the same in every form."""
    working = row(Form.DELAY).heap
    assert row(Form.BARE).heap == 8 * working  # OP-TEE's threads
    assert row(Form.BACK_PRESSURE).heap == row(Form.POOL).heap == 2 * working
    assert row(Form.BARE, ReusingTa).heap == row(Form.BACK_PRESSURE, ReusingTa).heap == CLIENTS * working


def test_calls_as_they_were_reported_are_no_load() -> None:
    found = [one_burst(policy(), AllocatingTa, form, "as reported", CALLS, SECONDS).burst for form in Form]
    assert {each.answered for each in found} == {CALLS} and {each.thread_limits for each in found} == {0}
    assert len({round(each.took(0.99), 6) for each in found}) == 1  # no form has anything to hold back


def test_the_table_is_the_same_each_time() -> None:
    again = one_burst(policy(), AllocatingTa, Form.BACK_PRESSURE, "many", MANY, 0.0)
    assert again.as_data() == row(Form.BACK_PRESSURE).as_data()


def test_small_calls_beside_a_flood() -> None:
    held = fairness(policy(), virtual=True, controlled=True, calls=60)
    free = fairness(policy(), virtual=True, controlled=False, calls=60)
    assert held.ratio <= 2 < free.ratio
    assert held.alone == free.alone


# No cure for a mistake in a TA


@pytest.mark.parametrize("flow", [None, FlowPolicy(4, rate=100.0, secure_cores=1)])
def test_a_smashed_stack_is_a_panic_at_any_rate(flow: FlowPolicy | None) -> None:
    """The canary: 0xffff300f on the console, TARGET_DEAD from the TEE for the client and all of the instance."""

    async def main() -> None:
        async with Board(replace(policy(), flow=flow)) as board, board.guest() as guest, guest.context() as context:
            for _ in range(2):
                first, second = [await context.open_session(StackSmashTa.uuid) for _ in range(2)]
                for size in (0, 1, 64):
                    await first.invoke(0, Temporary(bytes(size), direction=Direction.INPUT))
                for session, size in ((first, 65), (first, 1), (second, 1)):
                    with pytest.raises(TeeError) as dead:
                        await session.invoke(0, Temporary(bytes(size), direction=Direction.INPUT))
                    assert (dead.value.result, dead.value.origin) == (Result.TARGET_DEAD, Origin.TEE) == (0xFFFF3024, 3)
                assert board.model.panic_reports[-1].code == Result.OVERFLOW == 0xFFFF300F
                await first.close()
                await second.close()
            assert board.model.panics == 2
            assert board.violations == []

    run(main, 1)


def test_an_exhausted_stack_is_an_abort_that_was_announced() -> None:
    async def main() -> None:
        async with Board(policy()) as board, board.guest() as guest, guest.context() as context:
            session = await context.open_session(StackExhaustionTa.uuid)

            def warnings() -> list[str]:
                return [line for line in board.model.console if "bytes of stack were used" in line]

            for depth in (1, 8, 20):
                await session.invoke(0, Value(depth, direction=Direction.INPUT))
            assert warnings() == []
            await session.invoke(0, Value(26, direction=Direction.INPUT))
            (warning,) = warnings()
            assert str(StackExhaustionTa.uuid) in warning and "7168 of 8192" in warning
            with pytest.raises(TeeError) as dead:
                await session.invoke(0, Value(40, direction=Direction.INPUT))
            assert (dead.value.result, dead.value.origin) == (Result.TARGET_DEAD, Origin.TEE)
            report = board.model.panic_reports[-1]
            assert report.code != Result.OVERFLOW and "data-abort" in report.reason
            assert len(warnings()) == 1
            await session.close()
            fresh = await context.open_session(StackExhaustionTa.uuid)
            await fresh.invoke(0, Value(1, direction=Direction.INPUT))
            await fresh.close()

    run(main, 1)
