"""The door against peers that break the protocol: one line for each, and nobody else notices."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from hv_models import link
from hv_models.link import FEATURES, MAX_RECORD, Flavour, MemoryRegion, Request, pack
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.socket_conduit import LinkRefused, SocketConduit, open_conduit
from mediator.board import NOTHING_LEFT, Board
from mediator.service.links import HANDSHAKE_SECONDS, Ending, Link
from optee.abi.smc import API_UID, Function, Registers
from optee.config import Config

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
CALLS_UID = (int(Function.CALLS_UID), *(0,) * 7)
PAGES = 16
SIZE = PAGES * PAGE_SIZE


def memfd(size: int = SIZE, seals: int = SEALS) -> int:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def regions(*given: tuple[int, int, int]) -> bytes:
    return link.memory_table([MemoryRegion(base, size, 0, offset) for base, size, offset in given])


TABLE = regions((RAM_BASE, SIZE, 0))
HELLO = [
    (pack(Request.GET_FEATURES), 0),
    (pack(Request.SET_FEATURES, link.number(FEATURES)), 0),
    (pack(Request.SET_VM, link.vm(Flavour.KVM, 2, "stranger")), 0),
    (pack(Request.SET_MEM_TABLE, TABLE), 1),
    (pack(Request.START), 0),
]


SOCKETS: list[trio.socket.SocketType] = []


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    """Where links are served; sockets that a test left open are closed behind it."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()
    while SOCKETS:
        SOCKETS.pop().close()


class Peer:
    """An end of a link that sends what it likes."""

    def __init__(self, board: Board, nursery: trio.Nursery) -> None:
        ours, self.socket = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        SOCKETS.append(self.socket)
        self.link = Link(board, ours)
        self.endings: list[Ending] = []
        nursery.start_soon(self._serve)

    async def _serve(self) -> None:
        self.endings.append(await self.link.serve())

    async def send(self, record: bytes, fds: tuple[int, ...] = ()) -> None:
        await self.socket.sendmsg([record], link.rights(fds))
        link.close_all(fds)

    async def hello(self, upto: int = len(HELLO), name: str = "stranger") -> None:
        for record, count in (*HELLO[:2], (pack(Request.SET_VM, link.vm(Flavour.KVM, 2, name)), 0), *HELLO[3:])[:upto]:
            await self.send(record, tuple(memfd() for _ in range(count)))
            answer = await self.socket.recv(MAX_RECORD)
            assert answer[:8] == struct.pack("<2I", struct.unpack_from("<I", record)[0], 1 | 4)

    async def refusal(self) -> str:
        """The one line, after which the link ends."""
        record = await self.socket.recv(MAX_RECORD)
        request, flags, size = struct.unpack_from("<3I", record)
        assert (request, flags, size) == (Request.ERROR, 1, len(record) - 12)
        assert await self.socket.recv(MAX_RECORD) == b""
        return record[12:].decode("ascii")


@asynccontextmanager
async def bystander(board: Board, nursery: trio.Nursery) -> AsyncIterator[SocketConduit]:
    """Another VM, which must not notice anything."""
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nursery.start_soon(Link(board, ours).serve)
    ram = GuestRam(PageStore("bystander", PAGES), RAM_BASE)
    async with open_conduit(theirs, Flavour.XEN, "bystander", 2, [ram]) as conduit:
        assert (await conduit.call(0, CALLS_UID))[:4] == API_UID
        yield conduit
        assert (await conduit.call(0, CALLS_UID))[:4] == API_UID
        await conduit.stop()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


CALL = pack(Request.CALL, link.call(0, CALLS_UID))
BAD_RECORDS: dict[str, tuple[bytes, str]] = {
    "no header": (b"\x01", "shorter than a header"),
    "half a header": (CALL[:11], "shorter than a header"),
    "torn": (CALL[:-1], "a payload of 71 bytes where the header says 72"),
    "short": (pack(Request.CALL, link.call(0, CALLS_UID)[:-8]), "CALL has a payload of 72 bytes, not 64"),
    "long": (CALL + b"\0", "a payload of 73 bytes where the header says 72"),
    "too long": (bytes(MAX_RECORD + 1), f"more than {MAX_RECORD} bytes"),
    "version 0": (struct.pack("<3I", Request.CALL, 0, 0), "protocol version 0, not 1"),
    "version 2": (struct.pack("<3I", Request.CALL, 2, 0), "protocol version 2, not 1"),
    "unknown flag": (struct.pack("<3I", Request.CALL, 1 | 8, 0), "unknown flags 0x9"),
    "a reply": (struct.pack("<3I", Request.CALL, 5, 0), "CALL came where"),
    "unknown request": (pack(0xFFFFFFFF), "request 4294967295 came where"),
    "an interrupt": (pack(Request.INTERRUPT, link.interrupt(1)), "INTERRUPT came where"),
}
BAD_CALLS = {
    "no such vCPU": (pack(Request.CALL, link.call(2, CALLS_UID)), "CALL names vCPU 2, which there is not"),
    "a word that must be 0": (CALL[:16] + b"\1" + CALL[17:], "the word behind the vCPU is not 0"),
    "STOP with something": (pack(Request.STOP, b"\0"), "STOP has no payload"),
    "START again": (pack(Request.START), "START came where CALL or STOP is due"),
}


@pytest.mark.parametrize("after", range(len(HELLO) + 1))
@pytest.mark.parametrize("bad", sorted(BAD_RECORDS))
async def test_a_bad_record_at_each_stage_ends_its_link_alone(bad: str, after: int, nursery: trio.Nursery) -> None:
    record, words = BAD_RECORDS[bad]
    async with Board() as board:
        async with bystander(board, nursery):
            peer = Peer(board, nursery)
            await peer.hello(after)
            await peer.send(record)
            line = await peer.refusal()
            assert words in line or "is due" in line or "has a payload of" in line, line
            assert peer.endings == [Ending.FAILED] and peer.link.reason == line
        assert board.left() == NOTHING_LEFT


@pytest.mark.parametrize("bad", sorted(BAD_CALLS))
async def test_a_bad_call_ends_its_link_alone(bad: str, nursery: trio.Nursery) -> None:
    record, words = BAD_CALLS[bad]
    async with Board() as board, bystander(board, nursery):
        peer = Peer(board, nursery)
        await peer.hello()
        await peer.send(record)
        assert words in await peer.refusal()


async def test_a_vcpu_that_calls_twice_at_once(nursery: trio.Nursery) -> None:
    async with Board() as board, bystander(board, nursery):
        peer = Peer(board, nursery)
        await peer.hello()
        assert peer.link.vm is not None and board.core.pause(peer.link.vm.client_id)
        for _ in range(2):
            await peer.send(CALL)
        assert "vCPU 0, whose last call has not returned" in await peer.refusal()


BAD_TABLES: dict[str, tuple[bytes, Callable[[], tuple[int, ...]], str]] = {
    "no file": (TABLE, lambda: (), "0 file descriptors for 1 regions"),
    "one file too many": (TABLE, lambda: (memfd(), memfd()), "2 file descriptors for 1 regions"),
    "far too many files": (TABLE, lambda: tuple(memfd() for _ in range(20)), "more than 8 file descriptors"),
    "unsealed": (TABLE, lambda: (memfd(seals=0),), "sealed against shrinking and growing"),
    "may shrink": (TABLE, lambda: (memfd(seals=fcntl.F_SEAL_GROW),), "sealed against shrinking and growing"),
    "may grow": (TABLE, lambda: (memfd(seals=fcntl.F_SEAL_SHRINK),), "sealed against shrinking and growing"),
    "not writable": (TABLE, lambda: (memfd(seals=SEALS | fcntl.F_SEAL_WRITE),), "must be writable"),
    "no memfd": (TABLE, lambda: (os.open("/dev/zero", os.O_RDWR),), "must be a memfd"),
    "a pipe": (TABLE, lambda: (_pipe(),), "must be a memfd"),
    "shrunk": (TABLE, lambda: (memfd(SIZE - PAGE_SIZE),), "beyond the end of its file"),
    "offset beyond": (regions((RAM_BASE, SIZE, PAGE_SIZE)), lambda: (memfd(),), "beyond the end of its file"),
    "no regions": (regions(), lambda: (), "0 regions are not in 1..8"),
    "nine regions": (struct.pack("<2I", 9, 0), lambda: (), "9 regions are not in 1..8"),
    "a table cut short": (TABLE[:-8], lambda: (memfd(),), "bytes are not those of 1 regions"),
    "no table": (b"", lambda: (), "no table"),
    "unaligned base": (regions((RAM_BASE + 1, SIZE, 0)), lambda: (memfd(),), "not whole pages"),
    "unaligned size": (regions((RAM_BASE, SIZE - 1, 0)), lambda: (memfd(),), "not whole pages"),
    "unaligned offset": (regions((RAM_BASE, PAGE_SIZE, 8)), lambda: (memfd(),), "not whole pages"),
    "no size": (regions((RAM_BASE, 0, 0)), lambda: (memfd(),), "not whole pages"),
    "above the IPA space": (regions((1 << 39, SIZE, 0)), lambda: (memfd(),), "at most 39 bits"),
    "around the end": (regions((2**64 - PAGE_SIZE, SIZE, 0)), lambda: (memfd(),), "at most 39 bits"),
    "too much": (regions((0, 17 << 30, 0)), lambda: (memfd(17 << 30),), "more than 16 GiB"),
    "overlap": (
        regions((RAM_BASE, SIZE, 0), (RAM_BASE + PAGE_SIZE, SIZE, 0)), lambda: (memfd(), memfd()), "overlaps another"
    ),
}  # fmt: skip


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.parametrize("bad", sorted(BAD_TABLES))
async def test_a_bad_memory_table_is_refused_and_its_files_are_closed(bad: str, nursery: trio.Nursery) -> None:
    table, files, words = BAD_TABLES[bad]
    async with Board() as board, bystander(board, nursery):
        before = descriptors()
        peer = Peer(board, nursery)
        await peer.hello(3)
        await peer.send(pack(Request.SET_MEM_TABLE, table), files())
        assert words in await peer.refusal()
        peer.socket.close()
        assert descriptors() == before


async def test_one_vms_memory_is_not_anothers(nursery: trio.Nursery) -> None:
    async with Board() as board, bystander(board, nursery):
        shared = memfd()
        for name, words in (("first", ""), ("second", "this memory is that of first")):
            peer = Peer(board, nursery)
            await peer.hello(3, name)
            await peer.send(HELLO[3][0], (os.dup(shared),))
            await peer.socket.recv(MAX_RECORD)
            await peer.send(HELLO[4][0])
            if words:
                assert words in await peer.refusal()
            else:
                await peer.socket.recv(MAX_RECORD)
        os.close(shared)


async def test_a_name_is_that_of_one_vm_at_a_time(nursery: trio.Nursery) -> None:
    """Policies and `mediator ctl` go by it."""
    async with Board() as board, bystander(board, nursery):
        peers = [Peer(board, nursery) for _ in range(3)]
        await peers[0].hello()
        await peers[1].hello(4)
        await peers[1].send(HELLO[4][0])
        assert await peers[1].refusal() == "START: a VM stranger runs already"
        peers[0].socket.close()
        await trio.testing.wait_all_tasks_blocked()
        await peers[2].hello()


async def test_others_go_on_while_a_large_domain_is_built(nursery: trio.Nursery) -> None:
    gib = 1 << 30
    async with Board() as board, bystander(board, nursery) as other:
        peer = Peer(board, nursery)
        await peer.hello(2)
        await peer.send(pack(Request.SET_VM, link.vm(Flavour.XEN, 1, "large")))
        await peer.send(pack(Request.SET_MEM_TABLE, regions((gib, 3 * gib, 0))), (memfd(3 * gib),))
        for _ in range(2):
            await peer.socket.recv(MAX_RECORD)
        await peer.send(HELLO[4][0])
        calls = 0
        while not (peer.link.vm or peer.endings):
            assert (await other.call(0, CALLS_UID))[:4] == API_UID
            calls += 1
        assert peer.link.vm is not None and calls >= 2
        await peer.socket.recv(MAX_RECORD)
        vm = peer.link.vm
        assert vm.stage2.walk(gib).pa and vm.stage2.walk(4 * gib - 1).pa and not vm.stage2.walk(4 * gib).pa


async def test_a_domain_that_is_given_up_while_it_is_built_leaves_nothing() -> None:
    async with Board() as board:
        with trio.CancelScope() as scope:
            scope.cancel()
            await board.create("xen", "large", ram=2 << 30)
        assert scope.cancelled_caught and not board.machine.vms
        assert not board.machine.tables.allocated and board.left() == NOTHING_LEFT


@pytest.mark.parametrize("stage", [*range(len(HELLO)), len(HELLO)])
async def test_descriptors_where_none_belong_are_closed(stage: int, nursery: trio.Nursery) -> None:
    async with Board() as board, bystander(board, nursery):
        before = descriptors()
        peer = Peer(board, nursery)
        await peer.hello(stage)
        record = CALL if stage == len(HELLO) else HELLO[stage][0]
        await peer.send(record, (memfd(), memfd()))
        assert "file descriptors" in await peer.refusal()
        if stage < len(HELLO):
            peer.socket.close()
            assert descriptors() == before


@pytest.mark.parametrize("half", [False, True], ids=["closed", "half closed"])
@pytest.mark.parametrize("stage", range(len(HELLO) + 2))
async def test_a_peer_that_goes_at_any_stage(stage: int, half: bool, nursery: trio.Nursery) -> None:
    async with Board() as board:
        async with bystander(board, nursery):
            peer = Peer(board, nursery)
            await peer.hello(min(stage, len(HELLO)))
            if stage > len(HELLO):
                await peer.send(CALL)
            if half:
                peer.socket.shutdown(socket.SHUT_WR)
            else:
                peer.socket.close()
            await trio.testing.wait_all_tasks_blocked()
            assert peer.endings == [Ending.KILLED] and peer.link.reason == "the peer is gone"
            assert len(board.machine.vms) == 1
        assert board.left() == NOTHING_LEFT


async def test_a_peer_that_goes_before_it_learns_of_its_vm(nursery: trio.Nursery) -> None:
    """START is done, and its answer finds nobody: the VM ends nevertheless."""
    async with Board() as board:
        async with bystander(board, nursery):
            peer = Peer(board, nursery)
            await peer.hello(4)
            await peer.send(HELLO[4][0])
            peer.socket.close()
            await trio.testing.wait_all_tasks_blocked()
            assert peer.endings == [Ending.KILLED] and len(board.machine.vms) == 1
        assert board.left() == NOTHING_LEFT


async def test_a_guest_that_dies_leaves_its_id_to_the_next(nursery: trio.Nursery) -> None:
    async with Board() as board:
        for _ in range(3):
            peer = Peer(board, nursery)
            await peer.hello()
            assert peer.link.vm is not None and peer.link.vm.client_id == 1
            await peer.send(CALL)
            peer.socket.close()
            await trio.testing.wait_all_tasks_blocked()
            assert not board.machine.vms


async def test_a_peer_that_does_not_read_keeps_nobody_waiting(nursery: trio.Nursery) -> None:
    """It may call on each of its vCPUs; the answers wait in its own socket."""
    async with Board() as board, bystander(board, nursery) as other:
        peer = Peer(board, nursery)
        peer.link._link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        await peer.hello()
        for _ in range(1000):
            if peer.endings:
                break
            await peer.send(CALL)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(10):
            assert (await other.call(0, CALLS_UID))[:4] == API_UID
        peer.socket.close()


async def test_idle_connections_end_by_themselves(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with Board() as board, bystander(board, nursery) as other:
        peers = [Peer(board, nursery) for _ in range(100)]
        began = trio.current_time()
        for peer in peers:
            assert await peer.refusal() == f"no VM was started within {HANDSHAKE_SECONDS:g} seconds"
        assert trio.current_time() - began < 2 * HANDSHAKE_SECONDS
        assert (await other.call(0, CALLS_UID))[:4] == API_UID


async def test_a_vm_too_many_is_told_so(nursery: trio.Nursery) -> None:
    async with Board(config=Config(guests=1)) as board, bystander(board, nursery):
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nursery.start_soon(Link(board, ours).serve)
        ram = GuestRam(PageStore("second", PAGES), RAM_BASE)
        with pytest.raises(LinkRefused, match="OP-TEE has no room for second"):
            async with open_conduit(theirs, Flavour.KVM, "second", 2, [ram]):
                pass


@pytest.mark.parametrize("name", ["", "two words", "bell\a", "new\nline", "\x1b[2J", "caf\xe9"])
async def test_a_name_is_printable(name: str, nursery: trio.Nursery) -> None:
    async with Board() as board:
        peer = Peer(board, nursery)
        await peer.hello(2)
        await peer.send(pack(Request.SET_VM, link.vm(Flavour.KVM, 1, name)))
        assert "a name of printable ASCII is wanted" in await peer.refusal()


@pytest.mark.parametrize(("flavour", "vcpus"), [(0, 1), (3, 1), (1, 0), (1, 65), (2, 0xFFFFFFFF)])
async def test_a_vm_that_cannot_be(flavour: int, vcpus: int, nursery: trio.Nursery) -> None:
    async with Board() as board:
        peer = Peer(board, nursery)
        await peer.hello(2)
        await peer.send(pack(Request.SET_VM, link.vm(flavour, vcpus, "odd")))
        assert "SET_VM" in await peer.refusal()


def test_registers_are_taken_apart_as_they_were_put_together() -> None:
    regs: Registers = tuple(1 << 8 * bit for bit in range(8))
    assert link.read_call(link.unpack(pack(Request.CALL, link.call(7, regs)))) == (7, regs)
