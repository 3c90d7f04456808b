"""Where a fuzz run happens: guests, the core under the checker, and a secure world that may break its contract."""

import re
from collections import defaultdict
from random import Random
from typing import Final

from hv_models.machine import RAM_BASE, Machine, RamBlock
from hv_models.stage2 import PageKind
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step
from mediator.fuzz.journal import Journal
from mediator.fuzz.moves import (
    ENDLESS,
    FUNCTIONS,
    LISTS,
    PAGES,
    RPC_COOKIES,
    YIELDING,
    Move,
    endless_list,
    first_lists,
    message,
    page_list,
    relocated,
    reply,
)
from mediator.fuzz.seeds import Exchange
from mediator.fuzz.turns import MICROSECOND, TAKES, Turns
from mediator.fuzz.world import HostileWorld
from mediator.host import Host
from mediator.invariants import Checker
from optee.abi.smc import Function, ReturnCode, RpcReturn, ThreadId, is_rpc, to_pair

HELD: Final = 12
"""Requests that OP-TEE or the shell may leave lying about."""
HOSTILE_GUEST: Final = 0.4
LATE: Final = 0.25
"""How often an answer of OP-TEE, or a next turn, lies about for a while."""
EIGHTHS: Final = 8
REFUSED: Final = 0.2
"""How often OP-TEE refuses to create or to forget a VM."""
_NUMBERS: Final = re.compile(r"0x[0-9a-f]+|[0-9]+")
_KINDS: Final = (PageKind.RAM_RW, PageKind.RAM_RW, PageKind.RAM_RO, PageKind.MMIO, PageKind.NONE)


def flavour(number: int) -> str:
    """Whose VM the guest with this number is."""
    return ("xen", "kvm")[number % 2]


class Arena(Host):
    """One run. `calls` counts the SMCs of guests; `items` are the ABI's parts that were seen.

    journal: told everything that happens, if there is one.
    """

    def __init__(self, policy: Policy, guests: int, journal: Journal | None = None) -> None:
        super().__init__(Machine())
        self.journal = journal
        self.mediator = Mediator(policy, self)
        self.checker = Checker(self.mediator, self, lambda vm: self.world.threads_held(vm))
        self.calls = 0
        self.items: set[tuple[str, int | str]] = set()
        self.vms = [
            (self.machine.create_kvm if flavour(number) == "kvm" else self.machine.create_xen)(
                f"guest-{number}", [RamBlock(RAM_BASE, PAGES * 4096)]
            )
            for number in range(guests)
        ]
        self.world = HostileWorld(self.machine.memory, self.items)
        self._held: list[Forward | Preempt] = []
        flow = self.mediator.flow
        self._turns = None if flow is None else Turns(self.checker, flow, self._keep, self._held)
        """Who waits for a turn, where the policy has flow control."""
        self._choose = Random(0)
        self._changed: defaultdict[int, set[int]] = defaultdict(set)
        self.depths: set[tuple[str, int]] = set()
        """Eighths of its quotas that a guest held."""
        for vm in self.vms:
            self._furnish(vm)
        self._finish(self.checker.probe())
        for vm in self.vms:
            self._finish(self.checker.create(vm.client_id, vm))

    def do(self, move: Move) -> None:
        """Make a move."""
        choose = self._choose = self.world.choose = Random(move.choice << 32 | move.detail)
        vm = self.vms[move.guest % len(self.vms)]
        client, base = vm.client_id, vm.ram[0].base
        hostile = choose.random() < HOSTILE_GUEST
        guest = self.mediator.guests.get(client)
        recorded = self.world.planned = move.recorded
        if self._turns is not None:
            self._turns.let_pass(TAKES[move.detail % len(TAKES)] * MICROSECOND)
        if move.what == "call":
            at = base + choose.randrange(8) * 4096
            if recorded is not None:
                self._write_recorded(vm, at, recorded)
            else:
                self._write(vm, at, message(choose, base, hostile=hostile))
                self._write_list(vm, choose, hostile=hostile)
            function = choose.choice(YIELDING) if recorded is None else recorded.function
            operands = to_pair(at)
            if function is Function.CALL_WITH_REGD_ARG:
                operands = (0, choose.randrange(1, 6))
            elif hostile and choose.random() < 0.1:
                operands = to_pair(choose.choice((at + 8, 0, 1 << 45, base - 4096)))
            self._submit(vm, (int(function), *operands, 0, 0, 0, 0, choose.choice((0, 7))))
        elif move.what == "resume":
            self._resume(vm, recorded, hostile=hostile)
        elif move.what == "answer" and self._held:
            self._go_on(self._held.pop(choose.randrange(len(self._held))))
        elif move.what == "fast":
            function_id = choose.choice(FUNCTIONS) if choose.random() < 0.95 else choose.getrandbits(32)
            if recorded is not None:
                function_id = recorded.function
            self._submit(vm, (function_id, *(choose.choice((0, 1, 0xC0, 1 << 40)) for _ in range(7))))
        elif move.what == "page":
            ipa, kind = base + choose.randrange(PAGES) * 4096, choose.choice(_KINDS)
            vm.set_kind(ipa, kind)
            self._changed[client].add(ipa)
            if self.journal is not None:
                self.journal.changed(vm.name, ipa, kind)
        elif move.what == "pause" and guest is not None:
            done = "pause" if self.checker.pause(client) else "resume" if self.checker.resume(client) else ""
            if self.journal is not None and done:
                self.journal.asked(vm.name, done)
        elif move.what in ("destroy", "reset"):
            self.world.refusing = choose.random() < REFUSED
            self._end(vm, again=move.what == "reset")
            self.world.refusing = False
        if self._turns is not None:
            self._turns.give()
        self.world.planned = None
        if guest is not None:
            limits, ledger = guest.ledger.limits, guest.ledger
            held = (
                ("pages", EIGHTHS * ledger.pages // limits.pages),
                ("buffers", EIGHTHS * ledger.buffers // limits.buffers),
                ("RPC arguments", EIGHTHS * ledger.rpc_arguments // limits.rpc_arguments),
                ("calls", EIGHTHS * ledger.calls // limits.calls),
                ("memory", EIGHTHS * ledger.memory // limits.memory),
            )
            self.depths.update(held)
            if guest.lane.waiting:
                self.depths.add(("waiting", guest.lane.waiting))

    def finish(self) -> None:
        """Let everything come to its end; what is left then is somebody's mistake."""
        self._choose = self.world.choose = Random(0)
        while self._held or (self._turns is not None and self._turns.anybody):
            if self._held:
                self._go_on(self._held.pop(), plain=True)
            if self._turns is not None:
                self._turns.let_pass(0 if self._held else TAKES[-1] * MICROSECOND)
        self.checker.finish()
        self.journal = None  # a scenario's guests end by themselves
        for vm in self.vms:
            self._end(vm, again=False)
        if self.machine.pages.allocated:
            self.checker.report(2, None, "no mediator page in use", str(self.machine.pages.allocated))

    def close(self) -> None:
        """Give back the machine."""
        self.machine.close()

    # Guests

    def _furnish(self, vm: VirtualMachine) -> None:
        """A VM as it begins: page lists, and one that has no end."""
        base = vm.ram[0].base
        for page, entries in zip(LISTS, first_lists(base), strict=True):
            self._write(vm, base + page * 4096, entries)
        self._write(vm, base + ENDLESS * 4096, endless_list(base))

    def _write(self, vm: VirtualMachine, at: int, data: bytes) -> None:
        vm.ram[0].write(at, data)
        if self.journal is not None:
            self.journal.wrote(vm.name, at, data)

    def _write_list(self, vm: VirtualMachine, choose: Random, *, hostile: bool) -> None:
        base = vm.ram[0].base
        self._write(vm, base + choose.choice(LISTS) * 4096, page_list(choose, base, hostile=hostile))

    def _submit(self, vm: VirtualMachine, regs: Regs) -> None:
        self.calls += 1
        self.items.add(("function", regs[0] & 0xFFFFFFFF if regs[0] & 0xFFFFFFFF in FUNCTIONS else -1))
        guest = self.mediator.guests.get(vm.client_id)
        own = 0 if guest is None else guest.ledger.calls + guest.lane.waiting
        step = self.checker.submit(vm.client_id, 0, regs)
        if isinstance(step, Reply) and step.regs[0] == ReturnCode.ETHREAD_LIMIT and not own:
            self.checker.report(
                6, vm.client_id, "a place, for no call of this guest is in flight (R29)", "ETHREAD_LIMIT"
            )
        if self.journal is not None and not (isinstance(step, Queue) and step.ticket is None):
            self.journal.called(vm.name, regs, step)  # a paused guest tries again later
        self._keep(vm.client_id, step)

    def _write_recorded(self, vm: VirtualMachine, at: int, recorded: Exchange) -> None:
        base = vm.ram[0].base
        data, lists = relocated(recorded.said, base)
        self._write(vm, at, data)
        for page, entries in lists.items():
            self._write(vm, base + page * 4096, entries)

    def _resume(self, vm: VirtualMachine, recorded: Exchange | None, *, hostile: bool) -> None:
        choose, client, base = self._choose, vm.client_id, vm.ram[0].base
        told = self.world.told[client]
        thread = (
            told.pop(choose.randrange(len(told))) if told and choose.random() < 0.95 else choose.choice((0, 9, 1 << 30))
        )
        guest = self.mediator.guests.get(client)
        call = None if guest is None else guest.suspended.get(ThreadId(thread))
        cookie = choose.choice(RPC_COOKIES)
        words = to_pair(base + choose.randrange(16, 24) * 4096)
        if call is not None and call.rpc == RpcReturn.CMD:
            place = call.argument.ipa if call.argument is not None else call.ipa + call.rpc_offset
            words = (call.rpc_words[0] & 0xFFFFFFFF, call.rpc_words[1] & 0xFFFFFFFF)
            if base <= place < base + (PAGES - 1) * 4096:
                if recorded is not None and recorded.said:
                    self._write_recorded(vm, place, recorded)
                else:
                    asked = vm.ram[0].read(place, 160)
                    self._write(vm, place, reply(choose, asked, base, hostile=hostile))
                    self._write_list(vm, choose, hostile=hostile)
        if hostile and choose.random() < 0.2:
            words = (choose.getrandbits(32), choose.getrandbits(32))
        self._submit(vm, (int(Function.RETURN_FROM_RPC), *words, thread, *to_pair(cookie), 0, 0))

    def _keep(self, client: int, step: Step) -> None:
        """Do what a step says, or let it lie for a while."""
        self._note(step)
        if isinstance(step, Reply):
            if is_rpc(step.regs[0]):
                self.world.told[client].append(step.regs[3] & 0xFFFFFFFF)
                self.items.add(("RPC", step.regs[0] & 0xFFFFFFFF))
            else:
                self.items.add(("answer", min(step.regs[0] & 0xFFFFFFFF, 0x100)))
        elif isinstance(step, Forward | Preempt):
            if len(self._held) < HELD and self._choose.random() < LATE:
                self._held.append(step)
            else:
                self._go_on(step)
        elif isinstance(step, Queue) and step.ticket is not None and self._turns is not None:
            self._turns.wait(step.ticket)

    def _go_on(self, step: Forward | Preempt, *, plain: bool = False) -> None:
        guest = getattr(step.ticket, "guest", None)
        then = self._next(step, plain=plain)
        if plain:
            self._finish(then)
        else:
            self._keep(0 if guest is None else guest.vm, then)

    def _next(self, step: Forward | Preempt, *, plain: bool) -> Step:
        if isinstance(step, Preempt):
            then: Step = self.checker.proceed(step.ticket)
        else:
            answer = self.world.answer(step.regs, plain=plain)
            if self.journal is not None:
                self.journal.answered(step, answer, self.world.writes)
            then = self.checker.returned(step.ticket, answer)
        if self.journal is not None:
            self.journal.went_on(step.ticket, then)
        return then

    def _finish(self, step: Step) -> None:
        while isinstance(step, Forward | Preempt):
            step = self._next(step, plain=True)
        self._note(step)

    def _note(self, step: Step) -> None:
        """What the core says happened, and why, is part of what there is to be seen."""
        for event in step.events:
            why = str(event.detail.get("why", ""))
            self.items.add((event.name, _NUMBERS.sub("n", why)))

    def _end(self, vm: VirtualMachine, *, again: bool) -> None:
        """End a VM, or begin it anew; what waits for OP-TEE comes back first."""
        client = vm.client_id
        if self.journal is not None:
            self.journal.asked(vm.name, "kexec" if again else "kill", refused=self.world.refusing)
        request_again = self.checker.reset if again else self.checker.destroy
        step = request_again(client)
        while isinstance(step, Queue):
            self._go_on(self._held.pop(0), plain=True)
            step = request_again(client)
        self._finish(step)
        guest = self.mediator.guests.get(client)
        if guest is not None and guest.state is GuestState.QUARANTINED:
            abandoned = self._choose.random() < 0.5
            if self.journal is not None:
                self.journal.asked(vm.name, "abandon" if abandoned else "kill")
            self._finish(self.checker.abandon(client) if abandoned else self.checker.destroy(client))
        self.world.told[client].clear()
        if client not in self.mediator.guests:
            self._begin_anew(vm, ended=not again)

    def _begin_anew(self, vm: VirtualMachine, *, ended: bool) -> None:
        """Create a VM that is gone, with memory as it was when it began. ended: its VM was taken away, too."""
        client = vm.client_id
        self.world.forget(client)
        if self.journal is not None:
            if not ended:
                self.journal.asked(vm.name, "kill")
            self.journal.asked(vm.name, "create")
        vm.ram[0].store.view[:] = bytes(PAGES * 4096)
        for ipa in self._changed.pop(client, ()):
            vm.set_kind(ipa, PageKind.RAM_RW)
        self._furnish(vm)
        self.world.refusing = self.world.refusing or self._choose.random() < REFUSED
        self._finish(self.checker.create(client, vm))
        self.world.refusing = False
        if client not in self.mediator.guests:
            self._finish(self.checker.create(client, vm))
