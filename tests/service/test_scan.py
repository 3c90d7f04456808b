"""The look at all of a guest's RAM: an address of the mediator's own has no business there (invariant 4)."""

import pytest

from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE
from mediator.core.ledger import Charge
from optee.abi.message import NONCONTIG, Command, Message, Param, ParamType
from tests.service.test_service import Board


@pytest.mark.parametrize("offset", [0, 8, 4096 + 16, (4 << 20) - 8])
async def test_an_address_of_the_mediator_in_guest_memory_is_found(offset: int) -> None:
    board = await Board().start()
    try:
        board.checker.scan(memory=True)
        assert board.checker.violations == []
        page = board.world.lend()
        assert page is not None
        vm = board.vms[2]
        vm.ram[0].write(RAM_BASE + offset, int(page.pa).to_bytes(8, "little"))
        board.checker.scan()
        assert board.checker.violations == []
        board.checker.scan(memory=True)
        (found,) = board.checker.violations
        assert (found.invariant, found.guest) == (4, vm.client_id)
        assert found.got == f"{page.pa:#x} at {RAM_BASE + offset:#x}"
        board.world.take_back(page)
    finally:
        board.machine.close()


@pytest.mark.parametrize("forgotten", ["refund", "unpin"])
async def test_the_cheap_invariants_find_what_was_forgotten(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` looks at without being asked to."""
    board = await Board().start()
    board.checker.thorough = False
    vm = board.vms[0]
    try:
        if forgotten == "refund":
            monkeypatch.setattr(Charge, "refund", lambda charge: None)
        else:
            board.service.memories[vm.client_id].unpin = lambda pinned: None
        listed = RAM_BASE + 2 * PAGE_SIZE
        vm.ram[0].write(listed, (RAM_BASE + 9 * PAGE_SIZE).to_bytes(8, "little"))
        buffer = Param(ParamType.TMEM_INPUT | NONCONTIG, listed, PAGE_SIZE, 5)
        await board.message(0, Message(Command.INVOKE_COMMAND, params=[buffer]))
        # A missing refund shows at once; pins are counted only when the guest is gone.
        assert bool(board.checker.violations) == (forgotten == "refund")
        await board.service.remove(vm)
        assert {(found.invariant, found.guest) for found in board.checker.violations} == {(2, vm.client_id)}
    finally:
        board.machine.close()


async def test_the_cheap_invariants_are_quiet_when_all_is_well() -> None:
    board = await Board().start()
    board.checker.thorough = False
    try:
        await board.message(1, Message(Command.CLOSE_SESSION, session=7))
        for vm in board.vms:
            await board.service.remove(vm)
        assert board.checker.violations == []
    finally:
        board.machine.close()
