"""Recordings of our own guests on OP-TEE's model, with and without a mediator between."""

from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
import trio

import guests
from guests.client_memory import Direction
from guests.parameters import MemoryResult, Null, Partial, Temporary, Value, Values
from guests.workloads.applications import AES, EXERCISE, HELLO_WORLD, RANDOM, Exercise, HelloWorld
from guests.workloads.applications import Random as RandomCommand
from mediator.policies import load_policy
from optee.abi.message import HEADER
from optee.abi.rpc import RpcCommand
from optee.ta_image import build_image
from optee.tas.catalogue import BUILT_IN
from tests.trace.stories import CMD, NOTHING_LEFT, good
from tests.trace.tapes import (
    Stack,
    record_mediated,
    record_native,
)


async def busy(guest: guests.Guest, stack: Stack) -> None:
    """Six clients on two vCPUs and two threads; notifications in between; one wait is cancelled, one TA panics."""
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(_client, guest, number)
        nursery.start_soon(_notify, stack)
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        with pytest.raises(guests.TeeError):
            await session.invoke(Exercise.PANIC, Value(7, direction=Direction.INPUT))
        await session.close()
        session = await context.open_session(EXERCISE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancelled, session)
            await trio.sleep(0.05)
            await session.request_cancellation()
        await session.close()


async def _notify(stack: Stack) -> None:
    for value in (0, 5, 0, 63):
        await trio.sleep(0.004)
        stack.model.notify(stack.vm, value)


async def _cancelled(session: guests.Session) -> None:
    """The request to cancel needs a thread too: it may come too late."""
    with suppress(guests.TeeError):
        await session.invoke(Exercise.WAIT, Value(200, 1, Direction.INPUT))


async def _client(guest: guests.Guest, number: int) -> None:
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        await session.invoke(Exercise.WAIT, Value(10, 0, Direction.INPUT))
        text = bytes([number]) * 5000
        source = Temporary(text, direction=Direction.INPUT)
        _, output = await session.invoke(8, source, Temporary(size=6000, direction=Direction.OUTPUT))
        assert output == MemoryResult(5000, text)
        async with await context.allocate(3 * 4096) as shared:
            shared.write(text)
            target = Partial(shared, 6000, 5000, Direction.OUTPUT)
            await session.invoke(8, Partial(shared, 0, 5000, Direction.INPUT), target)
            assert shared.read(6000, 5000) == text
        await session.invoke(10, Value(direction=Direction.OUTPUT))
        await session.close()
        session = await context.open_session(HELLO_WORLD)
        assert await session.invoke(HelloWorld.INC_VALUE, Value(number)) == (Values(number + 1, 0),)
        await session.close()
        session = await context.open_session(RANDOM)
        assert await session.invoke(RandomCommand.GENERATE, Null()) == (MemoryResult(0),)
        await session.close()


RPC_ARG_BITS = 0x60


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hidden", [0, RPC_ARG_BITS])
def test_a_busy_guest_of_our_own_without_a_mediator(seed: int, hidden: int, tmp_path: Path) -> None:
    tape = record_native(busy, seed=seed, hidden=hidden, boots=2)
    assert any(event.get("regs", [""])[0] == "0x1" for event in tape.events), "nobody met the thread limit"
    report = good(tape.replay(tmp_path))
    assert report.left == NOTHING_LEFT
    assert report.calls == report.returned > 200


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["xen", "default"])
def test_a_busy_guest_of_our_own_with_a_mediator(seed: int, policy: str, tmp_path: Path) -> None:
    tape = record_mediated(busy, load_policy(policy), seed=seed, boots=2)
    report = good(tape.replay(tmp_path, policy))
    assert report.left == NOTHING_LEFT
    assert report.calls == report.returned > 200


def images(more: int = 0) -> dict[UUID, bytes]:
    """Images of all TAs, so many bytes larger than they are."""
    found = {}
    for ta in BUILT_IN:
        if not ta.is_pseudo:
            larger = type(ta.__name__, (ta,), {"image_size": ta.image_size + more})
            found[ta.uuid] = build_image(larger)
    return found


async def loads(guest: guests.Guest, stack: Stack) -> None:
    """TAs come from the supplicant: LOAD_TA, SHM_ALLOC and the file operations around them."""
    for uuid in (HELLO_WORLD, AES, RANDOM):
        async with guest.context() as context:
            session = await context.open_session(uuid)
            await session.close()


@pytest.mark.parametrize("padding", [0, 64 * 4096, 600 * 4096])
@pytest.mark.parametrize("hidden", [0, RPC_ARG_BITS])
def test_tas_that_the_supplicant_loads(padding: int, hidden: int, tmp_path: Path) -> None:
    tape = record_native(loads, hidden=hidden, images=images(padding))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned > padding // 4096
    commands = {
        HEADER.unpack_from(bytes.fromhex(entry["hex"]))[0]
        for event in tape.events
        if event["e"] == "return" and event["regs"][0] == hex(CMD)
        for entry in event["memory"]
        if entry["is"] == "rpc"
    }
    assert {RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE} <= commands


@pytest.mark.parametrize("policy", ["xen", "default"])
def test_tas_that_the_supplicant_loads_through_a_mediator(policy: str, tmp_path: Path) -> None:
    good(record_mediated(loads, load_policy(policy), images=images()).replay(tmp_path, policy))


def test_a_recorded_ta_that_is_larger_than_xen_allows(tmp_path: Path) -> None:
    """The mediator asks the guest to free OP-TEE's buffer again; opening the session fails, which is recorded too."""

    async def refused(guest: guests.Guest, stack: Stack) -> None:
        async with guest.context() as context:
            with pytest.raises(guests.TeeError):
                await context.open_session(HELLO_WORLD)

    tape = record_mediated(refused, load_policy("xen"), images=images(200 * 4096))
    good(tape.replay(tmp_path, "xen"))


async def shares(guest: guests.Guest, stack: Stack) -> None:
    """Buffers of many pages, and many buffers at once."""
    async with guest.context() as context:
        session = await context.open_session(EXERCISE)
        for size in (512, 1022, 1023, 2000):
            async with await context.allocate(size * 4096) as shared:
                shared.write(b"x" * 100, (size - 1) * 4096)
                source = Partial(shared, (size - 1) * 4096, 100, Direction.INPUT)
                await session.invoke(8, source, Partial(shared, 0, 100, Direction.OUTPUT))
                assert shared.read(0, 100) == b"x" * 100
        held = [await context.allocate(4096 * (number % 5 + 1)) for number in range(40)]
        for shared in held[::2] + held[1::2]:
            await shared.release()
        await session.close()


@pytest.mark.parametrize("made_up", [False, True])
def test_buffers_of_many_pages_of_a_guest_of_our_own(made_up: bool, tmp_path: Path) -> None:
    report = good(record_native(shares, made_up=made_up).replay(tmp_path))
    assert report.peak_pages_pinned >= 2000 and report.left == NOTHING_LEFT
