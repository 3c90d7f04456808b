"""S1 to S10 with one and with four guests, of both flavours, through the mediator to OP-TEE's model."""

from random import Random

import pytest
import trio

from mediator.board import NOTHING_LEFT, Board
from mediator.interleaving import run
from optee.config import Config
from optee.tas.concurrent import Concurrent, ConcurrentLarge
from tests.xtest.cases import CASES, LOADED, Case, Client
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
RAM = 32 << 20  # bytes: less to look at for the invariant checker
DEADLOCK = 1e6
"""Seconds of virtual time: nobody does anything any more."""


def play(client: Client, layout: str, seed: int) -> Traffic:
    """Boot all guests, and let each run the case at the same time; nothing may be left."""
    policy, flavours = LAYOUTS[layout]

    async def main() -> Traffic:
        draw = Random(seed)
        extra = (Concurrent, ConcurrentLarge)
        config = Config(threads=THREADS, guests=len(flavours), early_tas=frozenset(), extra_tas=extra, seed=seed)
        async with Board(policy, config) as board:
            traffic = Traffic(board)
            board.model.interrupt_pending = lambda _: draw.random() < INTERRUPTED

            async def one(flavour: str, number: int) -> None:
                async with board.guest(flavour, tas=LOADED, ram=RAM) as guest:
                    client_id = next(vm.client_id for vm in board.machine.vms.values() if vm.name == guest.name)
                    await client(Case(guest, Random(f"{seed} {number}"), traffic, client_id))

            with trio.fail_after(DEADLOCK):
                async with trio.open_nursery() as nursery:
                    for number, flavour in enumerate(flavours):
                        nursery.start_soon(one, flavour, number)
            assert board.left() == NOTHING_LEFT
        assert board.violations == []
        assert not board.machine.pinned_frames()
        return traffic

    return run(main, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, layout: str) -> None:
    traffic = play(CASES[name], layout, seed=len(name))
    assert len(traffic.smcs) == len(LAYOUTS[layout][1])


PROBE = ["CALLS_UID", "GET_OS_REVISION", "CALLS_REVISION", "EXCHANGE_CAPABILITIES"]
ENUMERATION = ["OPEN_SESSION", "INVOKE_COMMAND", "REGISTER_SHM", "INVOKE_COMMAND", "UNREGISTER_SHM", "CLOSE_SESSION"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_of_probe_and_unload(layout: str) -> None:
    """S1: the SMCs of a guest that boots, starts its tee-supplicant and unloads its driver."""
    calls = {
        "OPEN_SESSION": "CALL_WITH_REGD_ARG",
        "INVOKE_COMMAND": "CALL_WITH_REGD_ARG",
        "CLOSE_SESSION": "CALL_WITH_REGD_ARG",
        "REGISTER_SHM": "CALL_WITH_RPC_ARG",
        "UNREGISTER_SHM": "CALL_WITH_RPC_ARG",
    }
    if LAYOUTS[layout][0] == "xen":
        enumeration = ["CALL_WITH_ARG" for _ in ENUMERATION]
        begin = [*PROBE, "DISABLE_SHM_CACHE", "ENABLE_SHM_CACHE"]
        end = ["DISABLE_SHM_CACHE"]
    else:
        enumeration = [calls[message] for message in ENUMERATION]
        begin = [*PROBE, "ENABLE_ASYNC_NOTIF", "DISABLE_SHM_CACHE", "CALL_WITH_RPC_ARG"]
        end = ["CALL_WITH_REGD_ARG", "CALL_WITH_RPC_ARG"]
    nothing_more = [enumeration[0], enumeration[1], enumeration[-1]]  # no device needs a tee-supplicant
    expected = [*begin, *enumeration, *nothing_more, *end]
    for smcs in play(CASES["S1 probe"], layout, seed=1).smcs.values():
        assert smcs == expected
