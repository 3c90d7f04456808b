"""A thousand random client programs in four guests, in fifty interleavings: right results, nothing left.

Each interleaving (seed) has four guests with five programs each, twenty of its own: a thousand in all. With
HYPOTHESIS_PROFILE=nightly every interleaving runs all thousand programs.
"""

import os
from random import Random

import pytest
import trio

from mediator.board import NOTHING_LEFT, Board
from mediator.interleaving import run
from optee.config import Config
from optee.tas.concurrent import Concurrent, ConcurrentLarge
from tests.xtest.cases import LOADED
from tests.xtest.programs import Program
from tests.xtest.test_cases import RAM

SEEDS = 50
GUESTS = ("kvm", "xen", "kvm", "xen")
PROGRAMS = 5  # at once in each guest
DEADLOCK = 1e6  # seconds of virtual time
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def twenty(seed: int, programs: int, *, policy: str = "default", killed: bool = False) -> Board:
    """Run the programs with that number, interleaved by `seed`; with `killed` one guest's power is cut in its work."""

    async def main() -> Board:
        draw = Random(seed)
        loaded = Random(programs).random() < 0.2  # TAs come from the normal world, or are part of OP-TEE
        config = Config(
            threads=3,
            guests=len(GUESTS),
            early_tas=frozenset() if loaded else None,
            extra_tas=(Concurrent, ConcurrentLarge),
            seed=seed,
        )
        async with Board(policy, config) as board:
            board.model.interrupt_pending = lambda _: draw.random() < 0.3

            async def one(flavour: str, number: int) -> None:
                async with (
                    board.guest(flavour, tas=LOADED, ram=RAM) as guest,
                    guest.context() as context,
                    trio.open_nursery() as nursery,
                ):
                    for process in range(PROGRAMS):
                        choices = Random(f"{programs} {number} {process}")
                        nursery.start_soon(Program(guest, context, choices).run)

            async def cut_short(flavour: str, number: int) -> None:
                with trio.move_on_after(draw.random()):
                    await one(flavour, number)

            with trio.fail_after(DEADLOCK):
                async with trio.open_nursery() as nursery:
                    for number, flavour in enumerate(GUESTS):
                        nursery.start_soon(cut_short if killed and not number else one, flavour, number)
            assert board.left() == NOTHING_LEFT
        assert board.violations == []
        assert not board.machine.pinned_frames()
        return board

    return run(main, seed)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_result_is_right(seed: int) -> None:
    for programs in range(SEEDS) if NIGHTLY else (seed,):
        twenty(seed, programs)


@pytest.mark.parametrize("seed", range(SEEDS if NIGHTLY else 10))
def test_a_guest_that_is_killed_disturbs_nobody(seed: int) -> None:
    twenty(seed, seed + SEEDS, killed=True)
