"""R26: a frame that two VMs map is refused, unless the policy names the page."""

from dataclasses import replace

import pytest

from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.policies import load_policy
from optee.abi.message import NONCONTIG, Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import VmId
from tests.service.test_service import Board

SHARED = RAM_BASE + 7 * PAGE_SIZE


def _policy(*pages: int) -> Policy:
    return replace(load_policy("default"), shared_pages=frozenset(pages))


def _registration(board: Board, vm: int) -> Message:
    """REGISTER_SHM of the one page; its list lies in the guest's second page."""
    listed = RAM_BASE + 2 * PAGE_SIZE
    board.vms[vm].ram[0].write(listed, SHARED.to_bytes(8, "little"))
    return Message(Command.REGISTER_SHM, params=[Param(ParamType.TMEM_OUTPUT | NONCONTIG, listed, PAGE_SIZE, 9)])


@pytest.mark.parametrize(
    ("pages", "answer"),
    [((), (Result.BAD_PARAMETERS, Origin.COMMS)), ((SHARED,), (Result.SUCCESS, 0)), ((SHARED + PAGE_SIZE,), None)],
)
async def test_a_frame_that_two_vms_map_is_shared_only_if_the_policy_names_it(
    pages: tuple[int, ...], answer: tuple[int, int] | None
) -> None:
    board = Board(checked=False)
    board.core = Mediator(_policy(*pages), board.world)
    board.service.mediator = board.core
    await board.start()
    try:
        user, owner = board.vms[1], board.vms[3]
        user.map_frames_of(owner, SHARED, SHARED)
        for vm in (1, 3):
            _, done = await board.message(vm, _registration(board, vm))
            refused = (Result.BAD_PARAMETERS, Origin.COMMS)
            assert (done.ret, done.ret_origin) == (refused if answer is None else answer), f"VM {vm}"
        for vm in board.vms:
            await board.service.remove(vm)
        assert not board.machine.pinned_frames()
        assert VmId(user.client_id) not in board.core.guests
    finally:
        board.machine.close()
