"""The shell's part of flow control in a fuzz run: a clock that moves make go, and calls that wait for their turn."""

from collections.abc import Callable, Sequence
from typing import Final

from mediator.core.flow import Flow
from mediator.core.records import Call
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Step, Ticket
from mediator.invariants import Checker
from optee.abi.smc import RpcReturn

MICROSECOND: Final = 1_000
TAKES: Final = (0, 1, 20, 400, 1_000, 5_000)
"""Microseconds that a move may take: from nothing to more than a call waits before it gives its vCPU back."""
_SERVED: Final = (GuestState.LIVE, GuestState.PAUSED)


class Turns:
    """Whoever waits is named by `Mediator.turns`, or gives its vCPU back in time. `now` is in nanoseconds.

    keep: told the step of a call that goes on; held: calls that are with OP-TEE, or in the middle of long work.
    """

    def __init__(
        self, checker: Checker, flow: Flow, keep: Callable[[int, Step], None], held: Sequence[Forward | Preempt]
    ) -> None:
        self._checker = checker
        self._flow = flow
        self._keep = keep
        self._held = held
        self._until: dict[Ticket, int] = {}
        self.now = 0

    @property
    def anybody(self) -> bool:
        """Whether a call waits."""
        return bool(self._until)

    def wait(self, ticket: Ticket) -> None:
        """A call has to wait."""
        self._until[ticket] = self.now + self._flow.policy.park

    def give(self) -> None:
        """Let those go on whose turn it is, as soon as whoever holds them does."""
        while tickets := self._checker.turns(self.now):
            for ticket in tickets:
                vm = _call(ticket).guest.vm
                if self._until.pop(ticket, None) is None:
                    self._checker.report(6, vm, "a turn for a call that waits", "one for a call that does not")
                else:
                    self._keep(vm, Preempt(ticket))
        self._look()

    def let_pass(self, nanoseconds: int) -> None:
        """Time passes: whatever is due until then happens at its time."""
        self.give()
        end = self.now + nanoseconds
        while (due := self._next()) <= end:
            self.now = due
            self.give()
            for ticket in [ticket for ticket, until in self._until.items() if until <= due]:
                self._give_back(ticket)
        self.now = end
        self.give()

    def _next(self) -> int:
        """When something is due for no other reason than that time has passed."""
        turn = self._checker.next_turn()
        if turn is not None and turn <= self.now:
            self._checker.report(10, None, "a next turn that is not over yet", f"{self.now - turn} ns ago")
            turn = None
        return min([*self._until.values(), *([] if turn is None else [turn])], default=1 << 62)

    def _give_back(self, ticket: Ticket) -> None:
        """A call has held its vCPU as long as it may (R29)."""
        del self._until[ticket]
        vm = _call(ticket).guest.vm
        reply = self._checker.give_back(ticket)
        if reply.regs[0] != RpcReturn.FOREIGN_INTR:  # whoever waits is not dead: it would have had its turn then
            self._checker.report(10, vm, "a vCPU that goes back with FOREIGN_INTR (R29)", f"{reply.regs[0]:#x}")
        self._keep(vm, reply)

    def _look(self) -> None:
        """No queue is above its bound; nobody waits for nothing: neither a core, a thread, time nor the host."""
        flow, waits_for_time = self._flow, self._checker.next_turn() is not None
        calls = [step for step in self._held if isinstance(step.ticket, Call)]
        inside = sum(isinstance(step, Forward) or _call(step.ticket).guest.state in _SERVED for step in calls)
        if flow.policy.secure_cores is not None and inside > flow.policy.secure_cores:
            self._checker.report(10, None, f"at most {flow.policy.secure_cores} calls with a secure core", str(inside))
        for ticket in self._until:
            call = _call(ticket)
            guest, turn = call.guest, call.turn
            assert turn is not None
            if guest.lane.waiting > flow.policy.queue:
                expected = f"at most {flow.policy.queue} calls that wait to be let in (R29)"
                self._checker.report(2, guest.vm, expected, str(guest.lane.waiting))
            free = turn.counted or not (guest.ledger.calls or waits_for_time)
            if free and guest.state is GuestState.LIVE and not calls:
                self._checker.report(6, guest.vm, "a turn, for nothing is in the way (R29)", "a call that waits")


def _call(ticket: Ticket) -> Call:
    assert isinstance(ticket, Call)
    return ticket
