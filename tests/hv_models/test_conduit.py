from __future__ import annotations

import pytest
import trio
import trio.testing

from hv_models.conduit import Conduit, ConduitClosed, InProcessConduit
from hv_models.machine import Machine
from hv_models.smccc import NOT_SUPPORTED
from hv_models.vm import VirtualMachine
from optee.abi.smc import Function, Registers
from tests.hv_models.conftest import Create

CALL = (int(Function.CALLS_UID), 1, 2, 3, 4, 5, 6, 7)


class Recorder:
    """Answers calls with what it was asked, when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[VirtualMachine, int, Registers]] = []
        self.go = trio.Event()

    async def __call__(self, vm: VirtualMachine, vcpu: int, regs: Registers) -> Registers:
        self.asked.append((vm, vcpu, regs))
        await self.go.wait()
        return (0, *regs[1:])


async def test_the_mediators_calls_reach_it_with_vm_and_vcpu(vm: VirtualMachine) -> None:
    mediator = Recorder()
    mediator.go.set()
    conduit: Conduit = InProcessConduit(vm, mediator)
    assert await conduit.call(1, CALL) == (0, *CALL[1:])
    assert mediator.asked == [(vm, 1, CALL)]


async def test_other_calls_do_not(vm: VirtualMachine) -> None:
    mediator = Recorder()
    conduit = InProcessConduit(vm, mediator)
    with trio.testing.assert_checkpoints():
        assert await conduit.call(0, (0x8400_0000, *CALL[1:])) == (0x10001, *CALL[1:])
    assert await conduit.call(0, (0x8300_0001, *CALL[1:])) == (NOT_SUPPORTED, *CALL[1:])
    assert mediator.asked == []


async def test_a_vcpu_does_one_call_at_a_time_and_two_vcpus_two(vm: VirtualMachine, nursery: trio.Nursery) -> None:
    mediator = Recorder()
    conduit = InProcessConduit(vm, mediator)
    for vcpu in (0, 1, 0):
        nursery.start_soon(conduit.call, vcpu, CALL)
        await trio.testing.wait_all_tasks_blocked()
    assert [vcpu for _, vcpu, _ in mediator.asked] == [0, 1]
    mediator.go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert [vcpu for _, vcpu, _ in mediator.asked] == [0, 1, 0]


@pytest.mark.parametrize("regs", [(), CALL[:7], (*CALL, 8), (-1, *CALL[1:]), (*CALL[:7], 1 << 64)])
async def test_what_are_no_registers_is_an_error(vm: VirtualMachine, regs: Registers) -> None:
    with pytest.raises(ValueError, match="8 registers"):
        await InProcessConduit(vm, Recorder()).call(0, regs)


async def test_a_vcpu_that_does_not_exist_is_an_error(vm: VirtualMachine) -> None:
    with pytest.raises(IndexError):
        await InProcessConduit(vm, Recorder()).call(2, CALL)


async def test_a_dead_vm_makes_no_calls(machine: Machine, create: Create) -> None:
    vm, mediator = create("short-lived", 1 << 20), Recorder()
    conduit = InProcessConduit(vm, mediator)
    machine.destroy(vm)
    with pytest.raises(ConduitClosed):
        await conduit.call(0, CALL)
    assert mediator.asked == []


async def test_interrupts_wake_who_waits(vm: VirtualMachine, nursery: trio.Nursery) -> None:
    conduit = InProcessConduit(vm, Recorder())
    taken: list[int] = []

    async def guest() -> None:
        while True:
            taken.append(await conduit.wait_for_interrupt())

    vm.inject(33)
    nursery.start_soon(guest)
    await trio.testing.wait_all_tasks_blocked()
    assert taken == [33]
    for interrupt in (40, 33):
        vm.inject(interrupt)
    await trio.testing.wait_all_tasks_blocked()
    assert taken == [33, 40, 33]
    nursery.cancel_scope.cancel()
