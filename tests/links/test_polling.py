"""Looking for the next message before sleeping: only where it pays, and never at another VM's cost."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from hv_models import socket_link
from hv_models.link import Flavour, Message, Request, number
from hv_models.machine import RAM_BASE
from hv_models.memory import GuestRam, PageStore
from hv_models.socket_conduit import SocketConduit, open_conduit
from hv_models.socket_link import LinkClosed, SocketLink
from mediator.board import Board
from mediator.service.links import Link
from optee.abi.smc import Function, Registers

FAST: Registers = (int(Function.GET_ASYNC_NOTIF_VALUE), *(0,) * 7)
ROUNDS = 8


@pytest.fixture
async def ends() -> AsyncIterator[tuple[SocketLink, SocketLink]]:
    first, second = map(SocketLink, trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield first, second
    first.close()
    second.close()


@pytest.mark.parametrize("limit", [0, 1 << 60], ids=["late", "prompt"])
async def test_who_was_late_once_is_looked_for_only_when_it_was_prompt_again(
    ends: tuple[SocketLink, SocketLink], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    ours, theirs = ends
    monkeypatch.setattr(socket_link, "HALT_POLL", 0)
    assert ours.poll() is None  # nothing there, and no time to wait for it
    monkeypatch.setattr(socket_link, "HALT_POLL", limit)
    await theirs.send(Request.STOP, number(1))
    assert (await ours.receive()).payload == number(1)
    await theirs.send(Request.STOP, number(2))
    looked = ours.poll()
    if limit:
        assert looked is not None and looked.payload == number(2)
    else:
        assert looked is None
        assert (await ours.receive()).payload == number(2)


async def test_an_end_that_is_gone_is_seen_while_it_is_looked_for(ends: tuple[SocketLink, SocketLink]) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(LinkClosed):
        ours.poll()


async def test_a_busy_peer_does_not_keep_its_link_from_being_cancelled(ends: tuple[SocketLink, SocketLink]) -> None:
    ours, theirs = ends
    taken = 0
    with trio.CancelScope() as scope:
        while taken < 5:
            await theirs.send(Request.STOP, number(taken))
            if taken == 3:
                scope.cancel()
            await ours.receive(poll=True)
            taken += 1
    assert taken == 3 and scope.cancelled_caught


@asynccontextmanager
async def vms_by_socket(board: Board, names: list[str]) -> AsyncIterator[list[SocketConduit]]:
    async with trio.open_nursery() as nursery:
        conduits = []
        for name in names:
            ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            nursery.start_soon(Link(board, ours).serve)
            ram = GuestRam(PageStore(name, 16), RAM_BASE)
            conduits.append(await nursery.start(hold, theirs, name, ram))
        yield conduits
        nursery.cancel_scope.cancel()


async def hold(
    sock: trio.socket.SocketType, name: str, ram: GuestRam, task_status: trio.TaskStatus[SocketConduit]
) -> None:
    async with open_conduit(sock, Flavour.KVM, name, 1, [ram]) as conduit:
        task_status.started(conduit)
        await trio.sleep_forever()


@pytest.mark.parametrize(("names", "looks"), [(["only"], lambda n: n > 0), (["one", "other"], lambda n: n == 0)])
async def test_the_mediator_looks_for_the_next_call_of_a_vm_that_alone_is_busy(
    monkeypatch: pytest.MonkeyPatch, names: list[str], looks: Callable[[int], bool]
) -> None:
    """Else the others would wait for it."""
    asked: Counter[bool] = Counter()
    receive = SocketLink.receive

    async def received(self: SocketLink, *, poll: bool = False) -> Message:
        asked[poll] += 1
        return await receive(self, poll=poll)

    monkeypatch.setattr(SocketLink, "receive", received)
    async with Board() as board, vms_by_socket(board, names) as conduits:
        for _ in range(ROUNDS):
            for conduit in conduits:
                assert (await conduit.call(0, FAST))[0] == 0
    assert looks(asked[True]) and asked[False] > 0


async def test_while_a_call_of_another_vm_is_under_way_nobody_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mediator has work then: the rest of a long list, or an answer that comes from elsewhere."""
    asked: list[bool] = []
    receive = SocketLink.receive

    async def received(self: SocketLink, *, poll: bool = False) -> Message:
        asked.append(poll)
        return await receive(self, poll=poll)

    async with Board() as board, vms_by_socket(board, ["busy", "long"]) as (busy, long):
        paused = board.machine.vms[long.client_id]
        async with trio.open_nursery() as nursery:
            assert board.service.pause(paused)
            nursery.start_soon(long.call, 0, FAST)
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(SocketLink, "receive", received)
            for _ in range(ROUNDS):
                assert (await busy.call(0, FAST))[0] == 0
            meanwhile, asked = asked, []
            assert board.service.resume(paused)
        for _ in range(ROUNDS):
            await busy.call(0, FAST)
        assert meanwhile and not any(meanwhile) and any(asked)


async def test_a_guest_that_waits_for_an_answer_first_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def polled() -> Message | None:
        order.append("waits")
        return None

    async def other() -> None:
        order.append("other")

    async with Board() as board, vms_by_socket(board, ["guest"]) as (conduit,):
        monkeypatch.setattr(conduit._link, "poll", polled)
        for _ in range(ROUNDS):
            order.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduit.call, 0, FAST)
                nursery.start_soon(other)
            assert order[:2] == ["other", "waits"]
