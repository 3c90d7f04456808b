"""S1 to S10 with one and with four guests, of both flavours, through the mediator to OP-TEE's model."""

from random import Random

import pytest
import trio

from mediator.board import NOTHING_LEFT, Board
from mediator.interleaving import run
from optee.abi.smc import ReturnCode
from optee.config import Config
from tests.xtest.cases import CASES, LOADED, Client
from tests.xtest.tas import Concurrent, ConcurrentLarge
from tests.xtest.traffic import Traffic

LAYOUTS = {
    "kvm": ("default", ("kvm",)),
    "xen": ("xen", ("xen",)),
    "2 kvm 2 xen": ("default", ("kvm", "xen", "kvm", "xen")),
    "4 xen": ("xen", ("xen",) * 4),
}
THREADS = 2
INTERRUPTED = 0.3
"""Probability that an interrupt is pending at a moment at which secure code can be interrupted."""


def play(case: Client, layout: str, seed: int) -> tuple[Traffic, list[dict[str, int]]]:
    """Boot all guests, run the case in each at once; return the traffic, and each guest's of the case alone."""
    policy, flavours = LAYOUTS[layout]
    alone: list[dict[str, int]] = []

    async def main() -> Traffic:
        draw = Random(seed)
        config = Config(
            threads=THREADS,
            guests=len(flavours),
            early_tas=frozenset(),
            extra_tas=(Concurrent, ConcurrentLarge),
            seed=seed,
        )
        async with Board(policy, config) as board:
            traffic = Traffic(board)
            board.model.interrupt_pending = lambda _: draw.random() < INTERRUPTED

            async def one(flavour: str) -> None:
                async with board.guest(flavour, tas=LOADED) as guest:
                    client = next(vm.client_id for vm in board.machine.vms.values() if vm.name == guest.name)
                    before = traffic.snapshot(client)
                    await case(guest, draw)
                    alone.append(traffic.snapshot(client) - before)
                    pins_of_case = guest.driver.statistics()
                    assert pins_of_case.waiting_for_thread == 0

            async with trio.open_nursery() as nursery:
                for flavour in flavours:
                    nursery.start_soon(one, flavour)
            assert board.left() == NOTHING_LEFT
        assert board.violations == []
        assert not board.machine.pinned_frames()
        return traffic

    return run(main, seed), alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, layout: str) -> None:
    traffic, alone = play(CASES[name], layout, seed=len(name))
    assert len(alone) == len(LAYOUTS[layout][1])
    EXPECTED[name](alone, layout)
    assert not traffic.answers.keys() & {(client, ReturnCode.ERESUME) for client, _ in traffic.answers}


EXPECTED = dict.fromkeys(CASES, lambda alone, layout: None)
