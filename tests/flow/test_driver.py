"""The driver, which tries again only after one of its own completions, under every flow control that may be set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guests import Direction, Guest, Temporary, Value
from guests.workloads.applications import EXERCISE, HELLO_WORLD, Exercise, HelloWorld
from hv_models.vm import VirtualMachine
from mediator.board import NOTHING_LEFT, Board
from mediator.core.policy import FlowPolicy
from mediator.costs import SECOND, Costs
from mediator.interleaving import run
from mediator.policies import load_policy
from mediator.shell import NOTIFICATION_INTERRUPT
from optee.abi.smc import Registers

CALLS = 2
CLIENTS = 4

FLOWS = st.builds(
    FlowPolicy,
    queue=st.integers(1, 8) | st.just(1 << 16),
    rate=st.none() | st.sampled_from([100.0, 1000.0, 1e6]),
    burst=st.integers(1, 12) | st.just(1 << 16),
    park=(st.integers(1, 5) | st.just(1000)).map(lambda ms: ms * 1_000_000),
    secure_cores=st.none() | st.integers(1, 4) | st.just(1 << 16),
)


class Timed:
    """A board whose guests' SMCs are timed; `longest` is in nanoseconds of virtual time."""

    def __init__(self, board: Board) -> None:
        self.longest = 0
        self._mediate = board.service.mediate
        vars(board.service)["mediate"] = self.mediate

    async def mediate(self, vm: VirtualMachine, vcpu: int, regs: Registers) -> Registers:
        began = trio.current_time()
        answer = await self._mediate(vm, vcpu, regs)
        self.longest = max(self.longest, round((trio.current_time() - began) * SECOND))
        return answer


async def client(guest: Guest, number: int, answered: list[int]) -> None:
    """Opens, invokes, shares memory, waits in the normal world, closes."""
    async with guest.context() as context:
        hello, exercise = await context.open_session(HELLO_WORLD), await context.open_session(EXERCISE)
        for _ in range(CALLS):
            (value,) = await hello.invoke(HelloWorld.INC_VALUE, Value(number))
            assert value.a == number + 1
            answered[0] += 1
        await exercise.invoke(Exercise.TAKE, Temporary(bytes(5 * 4096), direction=Direction.INOUT))
        await exercise.invoke(Exercise.WAIT, Value(7, direction=Direction.INPUT))
        await exercise.close()
        await hello.close()


def play(
    flow: FlowPolicy | None, calls: int | None, seed: int, vcpus: int = 3, *, thorough: bool = False
) -> tuple[Timed, int]:
    async def main() -> tuple[Timed, int]:
        policy = load_policy("default")
        policy = replace(policy, flow=flow, limits=replace(policy.limits, calls=calls))
        answered = [0]
        async with Board(policy, thorough=thorough, costs=Costs()) as board:
            timed = Timed(board)
            async with board.guest("kvm", vcpus=vcpus) as one, board.guest("xen", vcpus=vcpus) as other:
                with trio.fail_after(3600):
                    async with trio.open_nursery() as clients:
                        for number in range(CLIENTS):
                            clients.start_soon(client, one, number, answered)
                            clients.start_soon(client, other, number, answered)
                        for vm in board.machine.vms.values():  # interrupts that nobody acknowledges are no storm
                            await trio.sleep(0.0005)
                            vm.inject(NOTIFICATION_INTERRUPT)
            for guest in board.core.guests.values():
                assert flow is None or guest.lane.peak <= flow.queue
            assert board.violations == [] and board.left() == NOTHING_LEFT
        return timed, answered[0]

    return run(main, seed)


@settings(max_examples=settings.default.max_examples // 6)
@given(FLOWS, st.none() | st.integers(1, 8), st.integers(0, 1000), st.integers(1, 4))
@example(FlowPolicy(1, rate=12.5, burst=1, secure_cores=1), 1, 1, 1)
@example(FlowPolicy(1, secure_cores=1), 1, 2, 4)
def test_the_driver_finishes_and_no_vcpu_is_held(flow: FlowPolicy, calls: int | None, seed: int, vcpus: int) -> None:
    timed, answered = play(flow, calls, seed, vcpus)
    assert answered == 2 * CLIENTS * CALLS
    assert timed.longest <= 2 * flow.park


@pytest.mark.parametrize("calls", [None, 1])
def test_without_flow_control_nothing_waits(calls: int | None) -> None:
    _, answered = play(None, calls, 1)
    assert answered == 2 * CLIENTS * CALLS


def test_the_same_seed_is_the_same_run() -> None:
    flow = FlowPolicy(2, rate=100.0, burst=2, secure_cores=1)
    assert play(flow, 2, 5, thorough=True)[0].longest == play(flow, 2, 5)[0].longest
