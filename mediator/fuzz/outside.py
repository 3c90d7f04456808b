"""The same moves against a mediator in another process: hostile guests at its one door, a hostile OP-TEE at the other.

One call is under way at a time, so the same seed makes the same moves. Nothing of the target is seen but what passes
its doors: what it forwards for which guest, where the addresses in it lead, what it answers, whether it answers. Moves
that only a host can make (pages, pauses, resets), and answers that come late, are left out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from time import monotonic
from typing import Final

import numpy as np
import trio

from hv_models.conduit import ConduitClosed
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, PhysicalFault
from mediator.conformance.outside import Target, reached
from mediator.core.steps import Regs, Ticket
from mediator.fuzz.arena import HOSTILE_GUEST
from mediator.fuzz.corpus import Corpus
from mediator.fuzz.engine import Advance, FuzzReport
from mediator.fuzz.failure import Failure
from mediator.fuzz.moves import (
    FUNCTIONS,
    PAGES,
    RPC_COOKIES,
    YIELDING,
    Move,
    message,
    reply,
)
from mediator.fuzz.outside_guest import Guest
from mediator.fuzz.seeds import Conversation, Exchange
from mediator.fuzz.world import HostileWorld
from mediator.invariants.outside import LOW, Outside, page_lists, read_text
from mediator.invariants.violations import Violation
from mediator.scenario.steps import StepFailed
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, HEADER_SIZE, PARAM_SIZE
from optee.abi.smc import Function, RpcReturn, from_pair, is_rpc, to_pair

ANSWER_SECONDS: Final = 10.0
"""For one SMC, and for the end of a VM: longer is never."""
_OF_THE_HOST: Final = (Function.CALLS_UID, Function.GET_THREAD_COUNT, Function.VM_CREATED, Function.VM_DESTROYED)
_WITH_MESSAGE: Final = (int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG))


class OutsideArena:
    """Guests and a secure world around a target; `violations` are what was seen of it."""

    def __init__(self, target: Target, guests: int, nursery: trio.Nursery) -> None:
        self.calls = 0
        self.items: set[tuple[str, int | str]] = set()
        self.violations: list[Violation] = []
        self._target = target
        self._nursery = nursery
        self._world = HostileWorld(target.door.memory, self.items)
        self._guests = [Guest(number) for number in range(guests)]
        self._files = {guest.ram.store.file for guest in self._guests}
        self._calling: Guest | None = None
        self._last: Regs | None = None
        """What OP-TEE last answered to the yielding call that is under way."""
        target.door.entry = self._enter

    # What the target asks of OP-TEE

    def _enter(self, regs: Regs) -> Regs:
        function, client = regs[0], regs[7]
        if client == 0:
            if function not in _OF_THE_HOST:
                self._report(9, None, "a call of the host with a7 = 0", f"{function:#x}")
            answer = self._world.answer(regs)
            if function == Function.VM_DESTROYED:
                for ended in self._guests:
                    if ended.client == regs[1]:
                        ended.destroyed.set()
            return answer
        guest = self._calling
        if guest is None or client != guest.client:
            self._report(9, guest, "a7 of the guest whose call it is", f"{client}")
            return self._world.answer(regs)
        if function not in FUNCTIONS:
            self._report(9, guest, "a function of the ABI", f"{function:#x}")
        if function in _WITH_MESSAGE or function == Function.RETURN_FROM_RPC:
            return self._enter_yielding(guest, regs)
        return self._world.answer(regs)

    def _enter_yielding(self, guest: Guest, regs: Regs) -> Regs:
        thread, text = regs[3] & LOW, None
        assert guest.outside is not None
        if regs[0] == Function.RETURN_FROM_RPC:
            ticket = guest.tickets.pop(thread, None)
            if ticket is None or (guest.client, thread) not in self._world.talks:
                if not guest.blamed:
                    self._report(6, guest, "a thread that waits for an RPC", f"{thread:#x}")
                return self._world.answer(regs)
            text = guest.outside.text_of(ticket)
        else:
            ticket = Ticket()
            frame = self._frame(from_pair(regs[1], regs[2]))
            if frame is None:
                self._report(4, guest, "a message in a page of the mediator's", f"{from_pair(regs[1], regs[2]):#x}")
                return 4, 0, 0, 0
            text = read_text(frame)
        if text is not None:
            for _, address, pages in page_lists(text.params):
                self._check_list(guest, address - address % PAGE_SIZE, pages)
        for name in guest.outside.forwarded(ticket, regs, text):
            if not guest.blamed:
                self._report(5, guest, "no other live object with this name", name)
        answer = self._world.answer(regs)
        kept = guest.outside.answered(ticket, answer)
        self._last = answer
        if is_rpc(answer[0]):
            kept = kept and answer[3] & LOW not in guest.tickets
            guest.tickets[answer[3] & LOW] = ticket
        guest.blamed = guest.blamed or not kept
        return answer

    def _frame(self, pa: int) -> memoryview | None:
        """A page that belongs to no guest; None for any other."""
        try:
            bank, _ = self._target.door.memory.find(pa)
        except PhysicalFault:
            return None
        if pa % PAGE_SIZE or bank.store.file in self._files:
            return None
        return self._target.door.memory.frame(pa)

    def _check_list(self, guest: Guest, page: int, left: int) -> None:
        """Each list page is the mediator's, each address in it a page of the guest's RAM (invariant 4)."""
        while left > 0:
            frame = self._frame(page)
            if frame is None:
                self._report(4, guest, "a list page of the mediator's", f"{page:#x}")
                return
            words = np.frombuffer(frame, dtype="<u8")
            for pa in np.unique(words[: min(left, ENTRIES_PER_PAGE)]).tolist():
                try:
                    bank, _ = self._target.door.memory.find(pa)
                except PhysicalFault:
                    bank = None
                if pa % PAGE_SIZE or bank is None or bank.store.file != guest.ram.store.file:
                    self._report(4, guest, "a page of the guest's RAM", f"{pa:#x}")
                    return
            left -= ENTRIES_PER_PAGE
            page = int(words[ENTRIES_PER_PAGE])

    def _report(self, invariant: int, guest: Guest | None, expected: str, got: str) -> None:
        client = None if guest is None else guest.client
        self.violations.append(Violation(invariant, client, self.calls, expected, got))

    # What guests do

    async def begin(self) -> None:
        """Create all guests."""
        for guest in self._guests:
            await self._create(guest)

    async def finish(self) -> None:
        """End all guests in order."""
        for guest in self._guests:
            await self._end(guest, in_order=True)

    async def _create(self, guest: Guest) -> None:
        guest.furnish()
        try:
            await self._nursery.start(guest.live, self._target)
        except StepFailed as failed:
            self._report(6, guest, "a VM", failed.got)
            return
        guest.outside = Outside(self._frame)

    async def _end(self, guest: Guest, *, in_order: bool) -> None:
        """End a VM; what it had is given back, and OP-TEE is told (R24)."""
        if guest.conduit is None:
            return
        with trio.move_on_after(ANSWER_SECONDS) as ending:
            try:
                if in_order:
                    await guest.conduit.stop()
            except ConduitClosed as error:
                self._report(6, guest, "STOP is answered", str(error))
            await guest.hang_up()
            await guest.destroyed.wait()
        if ending.cancelled_caught:
            self._report(2, guest, "VM_DESTROYED after its end", "nothing")
            await guest.hang_up()
        self._world.forget(guest.client)
        self._world.told[guest.client].clear()

    async def do(self, move: Move) -> None:
        """Make a move."""
        choose = self._world.choose = Random(move.choice << 32 | move.detail)
        guest = self._guests[move.guest % len(self._guests)]
        hostile = choose.random() < HOSTILE_GUEST
        recorded = self._world.planned = move.recorded
        if move.what == "call":
            await self._call(guest, choose, recorded, hostile=hostile)
        elif move.what == "resume":
            await self._resume(guest, choose, recorded, hostile=hostile)
        elif move.what == "fast":
            function = choose.choice(FUNCTIONS) if choose.random() < 0.95 else choose.getrandbits(32)
            function = function if recorded is None else recorded.function
            await self._smc(guest, (function, *(choose.choice((0, 1, 0xC0, 1 << 40)) for _ in range(7))))
        elif move.what in ("destroy", "reset"):
            await self._end(guest, in_order=move.what == "destroy")
            await self._create(guest)
        self._world.planned = None

    async def _call(self, guest: Guest, choose: Random, recorded: Exchange | None, *, hostile: bool) -> None:
        at = RAM_BASE + choose.randrange(8) * PAGE_SIZE
        function = int(choose.choice(YIELDING) if recorded is None else recorded.function)
        if recorded is None:
            guest.ram.write(at, message(choose, RAM_BASE, hostile=hostile))
            guest.write_list(choose, hostile=hostile)
        else:
            guest.write_recorded(at, recorded)
        operands = to_pair(at)
        if function == Function.CALL_WITH_REGD_ARG:
            operands = (0, choose.randrange(1, 6))
        elif hostile and choose.random() < 0.1:
            operands = to_pair(choose.choice((at + 8, 0, 1 << 45, RAM_BASE - PAGE_SIZE)))
        answer = await self._smc(guest, (function, *operands, 0, 0, 0, 0, choose.choice((0, 7))))
        count = HEADER.unpack(guest.ram.read(at, HEADER_SIZE))[7]
        behind = at + HEADER_SIZE + PARAM_SIZE * count if function == Function.CALL_WITH_RPC_ARG else 0
        self._told(guest, answer, behind)

    async def _resume(self, guest: Guest, choose: Random, recorded: Exchange | None, *, hostile: bool) -> None:
        told = self._world.told[guest.client]
        thread = told.pop(choose.randrange(len(told))) if told and choose.random() < 0.95 else choose.choice((0, 9))
        behind, last = guest.arguments.pop(thread, (0, (0, 0, 0, 0)))
        cookie = choose.choice(RPC_COOKIES)
        words = to_pair(RAM_BASE + choose.randrange(16, 24) * PAGE_SIZE)
        if last[0] & LOW == RpcReturn.CMD:
            place = behind or guest.pages.get(from_pair(last[1], last[2]), 0)
            words = (last[1] & LOW, last[2] & LOW)
            if RAM_BASE <= place < RAM_BASE + (PAGES - 1) * PAGE_SIZE:
                if recorded is not None and recorded.said:
                    guest.write_recorded(place, recorded)
                else:
                    guest.ram.write(place, reply(choose, guest.ram.read(place, 160), RAM_BASE, hostile=hostile))
                    guest.write_list(choose, hostile=hostile)
        if hostile and choose.random() < 0.2:
            words = (choose.getrandbits(32), choose.getrandbits(32))
        if last[0] & LOW == RpcReturn.ALLOC:
            guest.pages[cookie] = from_pair(*words)
        regs = (int(Function.RETURN_FROM_RPC), *words, thread, *to_pair(cookie), 0, 0)
        self._told(guest, await self._smc(guest, regs), behind)

    def _told(self, guest: Guest, answer: Regs, behind: int) -> None:
        if is_rpc(answer[0]):
            thread = answer[3] & LOW
            self._world.told[guest.client].append(thread)
            guest.arguments[thread] = behind, answer

    async def _smc(self, guest: Guest, regs: Regs) -> Regs:
        """Execute an SMC, and look at its answer."""
        if guest.conduit is None:
            return 0, 0, 0, 0
        self.calls += 1
        function = regs[0] & LOW
        self.items.add(("function", function if function in FUNCTIONS else -1))
        self._calling, self._last = guest, None
        answer: Regs = (0, 0, 0, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lose_patience, guest)
            try:
                answer = await guest.conduit.call(0, regs)
            except ConduitClosed as error:
                self._report(6, guest, f"an answer to {function:#x}", str(error))
            nursery.cancel_scope.cancel()
        self._calling = None
        code = answer[0] & LOW
        self.items.add(("RPC", code) if is_rpc(code) else ("answer", min(code, 0x100)))
        self._check_end(guest, answer)
        for word in (*answer[:4], from_pair(answer[1] & LOW, answer[2] & LOW)):
            if word not in regs and self._frame(word & ~(PAGE_SIZE - 1)) is not None:
                self._report(4, guest, "no address of the mediator's in registers", f"{word:#x}")
        return answer

    def _check_end(self, guest: Guest, answer: Regs) -> None:
        """A call that OP-TEE ended has ended, and one that it suspended has not."""
        last = self._last
        if last is None or guest.blamed or guest.conduit is None:
            return
        if not is_rpc(last[0]):
            if is_rpc(answer[0]):
                self._report(6, guest, "the end of a call that OP-TEE ended", f"{answer[0]:#x}")
        elif not is_rpc(answer[0]) or answer[3] & LOW != last[3] & LOW:
            self._report(6, guest, f"an RPC of thread {last[3] & LOW:#x}", f"{answer[0]:#x}, {answer[3]:#x}")

    async def _lose_patience(self, guest: Guest) -> None:
        """A call that is never answered can be called off by its link's end only."""
        await trio.sleep(ANSWER_SECONDS)
        await guest.hang_up()


async def fuzz_outside(
    guests_socket: Path,
    secure_world: Path,
    *,
    seed: int = 0,
    guests: int = 4,
    calls: int | None = None,
    seconds: float | None = None,
    guided: bool = True,
    recorded: Sequence[Conversation] = (),
    advance: Advance = lambda report: None,
    served: Callable[[], object] = lambda: None,
) -> FuzzReport:
    """Attack the mediator that serves guests at a socket and calls the secure world that we serve at the other.

    Raises TargetError where there is none, DocumentError where there can be no socket.
    """
    report = FuzzReport(seed, "the target's", guests, guided)
    corpus = Corpus(Random(seed), guests, recorded)
    async with reached(guests_socket, secure_world, served) as target, trio.open_nursery() as nursery:
        arena = OutsideArena(target, guests, nursery)
        started = monotonic()
        while (calls is None or report.calls < calls) and (seconds is None or report.seconds < seconds):
            moves = corpus.episode()
            await arena.begin()
            last, made = 0, 0
            for made, move in enumerate(moves, 1):
                await arena.do(move)
                before = len(report.items)
                report.items |= arena.items
                if len(report.items) > before:
                    last = made
                if target.door.reason:
                    arena.violations.append(Violation(9, None, arena.calls, "the doors' protocol", target.door.reason))
                if arena.violations:
                    break
            if not arena.violations:
                await arena.finish()
            report.episodes += 1
            report.calls = arena.calls
            if guided and last:
                corpus.keep(moves[:last])
                report.kept += 1
            report.seconds = monotonic() - started
            advance(report)
            if arena.violations:
                report.failure = Failure(moves[:made], list(map(str, arena.violations)), len(moves))
                break
        nursery.cancel_scope.cancel()
    return report
