"""Where a fuzz run happens: guests, the core under the checker, and a secure world that may break its contract."""

from collections.abc import Sequence
from random import Random
from typing import Final

from hv_models.machine import RAM_BASE, Machine, RamBlock
from hv_models.stage2 import PageKind
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.records import Call
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step
from mediator.fuzz.moves import (
    FUNCTIONS,
    PAGES,
    RPC_COOKIES,
    YIELDING,
    Move,
    message,
    page_list,
    reply,
    request,
)
from mediator.host import Host
from mediator.invariants import Checker
from optee.abi.message import HEADER, HEADER_SIZE, PARAM_SIZE
from optee.abi.smc import API_UID, Function, RpcReturn, ThreadId, VmId, is_rpc, to_pair

THREADS: Final = 4
HELD: Final = 12
"""Requests that OP-TEE or the shell may leave lying about."""
HOSTILE_GUEST: Final = 0.4
HOSTILE_WORLD: Final = 0.03
REFUSED: Final = 0.2
"""How often OP-TEE refuses to create or to forget a VM."""
_WITH_MESSAGE: Final = (int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG))
_FAST: Final[dict[int, Regs]] = {
    int(Function.CALLS_UID): API_UID,
    int(Function.EXCHANGE_CAPABILITIES): (0, 0xFD, 0x42, 4),
    int(Function.GET_THREAD_COUNT): (0, THREADS, 0, 0),
}
_KINDS: Final = (PageKind.RAM_RW, PageKind.RAM_RW, PageKind.RAM_RO, PageKind.MMIO, PageKind.NONE)


class Talk:
    """A call as the secure world knows it."""

    __slots__ = ("behind", "cookies", "pa", "rpc")

    def __init__(self, pa: int, *, behind: bool) -> None:
        self.pa = pa
        self.behind = behind
        self.rpc = 0
        self.cookies: dict[int, int] = {}


class Arena(Host):
    """One run. `calls` counts the SMCs of guests; `items` are the ABI's parts that were seen."""

    def __init__(self, policy: Policy, guests: int) -> None:
        super().__init__(Machine())
        self.mediator = Mediator(policy, self)
        self.checker = Checker(self.mediator, self, self.threads_held)
        self.calls = 0
        self.items: set[tuple[str, int]] = set()
        self.vms = [
            (self.machine.create_kvm if number % 2 else self.machine.create_xen)(
                f"guest-{number}", [RamBlock(RAM_BASE, PAGES * 4096)]
            )
            for number in range(guests)
        ]
        self._talks: dict[tuple[int, int], Talk] = {}
        self._told: dict[int, list[int]] = {vm.client_id: [] for vm in self.vms}
        self._held: list[Forward | Preempt] = []
        self._choose = Random(0)
        self._refusing = False
        for number, vm in enumerate(self.vms):
            base = vm.ram[0].base
            for page in range(8, 16):
                self._write(number, base + page * 4096, page_list(self._choose, base, hostile=False))
        self._finish(self.checker.probe())
        for vm in self.vms:
            self._finish(self.checker.create(vm.client_id, vm))

    def threads_held(self, vm: int) -> int:
        """Calls that OP-TEE has suspended."""
        return sum(owner == vm for owner, _ in self._talks)

    def do(self, move: Move) -> None:
        """Make a move."""
        choose = self._choose = Random(move.choice << 32 | move.detail)
        vm = self.vms[move.guest % len(self.vms)]
        client, base = vm.client_id, vm.ram[0].base
        hostile = choose.random() < HOSTILE_GUEST
        guest = self.mediator.guests.get(client)
        if move.what == "call":
            at = base + choose.randrange(8) * 4096
            self._write(move.guest, at, message(choose, base, hostile=hostile))
            self._write(move.guest, base + choose.randrange(8, 16) * 4096, page_list(choose, base, hostile=hostile))
            function = choose.choice(YIELDING)
            operands = to_pair(at)
            if function is Function.CALL_WITH_REGD_ARG:
                operands = (0, choose.randrange(1, 6))
            elif hostile and choose.random() < 0.1:
                operands = to_pair(choose.choice((at + 8, 0, 1 << 45, base - 4096)))
            self._submit(client, (int(function), *operands, 0, 0, 0, 0, choose.choice((0, 7))))
        elif move.what == "resume":
            self._resume(move.guest, client, base, hostile=hostile)
        elif move.what == "answer" and self._held:
            self._go_on(self._held.pop(choose.randrange(len(self._held))))
        elif move.what == "fast":
            function_id = choose.choice(FUNCTIONS) if choose.random() < 0.95 else choose.getrandbits(32)
            self._submit(client, (function_id, *(choose.choice((0, 1, 0xC0, 1 << 40)) for _ in range(7))))
        elif move.what == "page":
            vm.set_kind(base + choose.randrange(PAGES) * 4096, choose.choice(_KINDS))
        elif move.what == "pause" and guest is not None:
            if not self.checker.pause(client):
                self.checker.resume(client)
        elif move.what in ("destroy", "reset") and choose.random() < 0.3:
            self._refusing = choose.random() < REFUSED
            self._end(client, again=move.what == "reset")
            self._refusing = False
        elif move.what == "give-back":
            for step in [step for step in self._held if isinstance(step, Preempt) and isinstance(step.ticket, Call)]:
                self._held.remove(step)
                self._keep(client, self.checker.give_back(step.ticket))

    def finish(self) -> None:
        """Let everything come to its end; what is left then is somebody's mistake."""
        self._choose = Random(0)
        while self._held:
            self._go_on(self._held.pop(), plain=True)
        self.checker.finish()
        for vm in self.vms:
            self._end(vm.client_id, again=False)
        if self.machine.pages.allocated:
            self.checker.report(2, None, "no mediator page in use", str(self.machine.pages.allocated))

    def close(self) -> None:
        """Give back the machine."""
        self.machine.close()

    # Guests

    def _write(self, guest: int, at: int, data: bytes) -> None:
        self.vms[guest % len(self.vms)].ram[0].write(at, data)

    def _submit(self, client: VmId, regs: Regs) -> None:
        self.calls += 1
        self.items.add(("function", regs[0] & 0xFFFFFFFF if regs[0] & 0xFFFFFFFF in FUNCTIONS else -1))
        self._keep(client, self.checker.submit(client, 0, regs))

    def _resume(self, number: int, client: VmId, base: int, *, hostile: bool) -> None:
        choose = self._choose
        told = self._told[client]
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
                asked = self.vms[number % len(self.vms)].ram[0].read(place, 160)
                self._write(number, place, reply(choose, asked, base, hostile=hostile))
                self._write(number, base + choose.randrange(8, 16) * 4096, page_list(choose, base, hostile=hostile))
        if hostile and choose.random() < 0.2:
            words = (choose.getrandbits(32), choose.getrandbits(32))
        self._submit(client, (int(Function.RETURN_FROM_RPC), *words, thread, *to_pair(cookie), 0, 0))

    def _keep(self, client: int, step: Step) -> None:
        """Do what a step says, or let it lie for a while."""
        if isinstance(step, Reply):
            if is_rpc(step.regs[0]):
                self._told[client].append(step.regs[3] & 0xFFFFFFFF)
                self.items.add(("rpc", step.regs[0] & 0xFFFFFFFF))
            else:
                self.items.add(("answer", min(step.regs[0] & 0xFFFFFFFF, 0x100)))
        elif isinstance(step, Forward | Preempt):
            if len(self._held) < HELD and self._choose.random() < 0.25:
                self._held.append(step)
            else:
                self._go_on(step)

    def _go_on(self, step: Forward | Preempt, *, plain: bool = False) -> None:
        guest = getattr(step.ticket, "guest", None)
        then = self._next(step, plain=plain)
        if plain:
            self._finish(then)
        else:
            self._keep(0 if guest is None else guest.vm, then)

    def _next(self, step: Forward | Preempt, *, plain: bool) -> Step:
        if isinstance(step, Preempt):
            return self.checker.proceed(step.ticket)
        return self.checker.returned(step.ticket, self._answer(step.regs, plain=plain))

    def _finish(self, step: Step) -> None:
        while isinstance(step, Forward | Preempt):
            step = self._next(step, plain=True)

    def _end(self, client: VmId, *, again: bool) -> None:
        """End a VM, or begin it anew; what waits for OP-TEE comes back first."""
        request_again = self.checker.reset if again else self.checker.destroy
        step = request_again(client)
        while isinstance(step, Queue):
            self._go_on(self._held.pop(0), plain=True)
            step = request_again(client)
        self._finish(step)
        guest = self.mediator.guests.get(client)
        if guest is not None and guest.state is GuestState.QUARANTINED:
            self._finish(self.checker.abandon(client) if self._choose.random() < 0.5 else self.checker.destroy(client))
        self._told[client].clear()
        if client not in self.mediator.guests:
            for key in [key for key in self._talks if key[0] == client]:
                del self._talks[key]
            vm = next(vm for vm in self.vms if vm.client_id == client)
            self._refusing = self._refusing or self._choose.random() < REFUSED
            self._finish(self.checker.create(client, vm))
            self._refusing = False
            if client not in self.mediator.guests:
                self._finish(self.checker.create(client, vm))

    # The secure world

    def _answer(self, regs: Sequence[int], *, plain: bool) -> Regs:
        choose, function, vm = self._choose, regs[0], regs[7]
        if function in (Function.VM_CREATED, Function.VM_DESTROYED) and self._refusing:
            self._refusing = False
            return (5, 0, 0, 0)
        if function == Function.VM_DESTROYED:
            for key in [key for key in self._talks if key[0] == regs[1]]:
                del self._talks[key]
            return (0, 0, 0, 0)
        if function in _WITH_MESSAGE:
            talk = Talk(regs[1] << 32 | regs[2], behind=function == Function.CALL_WITH_RPC_ARG)
        elif function == Function.RETURN_FROM_RPC:
            found = self._talks.pop((vm, regs[3]), None)
            if found is None:
                return (0, 0, 0, 0)
            talk = found
            if talk.rpc == RpcReturn.ALLOC and (regs[1] or regs[2]):
                talk.cookies[regs[4] << 32 | regs[5]] = regs[1] << 32 | regs[2]
        elif function == Function.DISABLE_SHM_CACHE:
            return (7, 0, 0, 0)
        else:
            return _FAST.get(function, (0, 0, 0, 0))
        return self._speak(choose, talk, vm, plain=plain)

    def _speak(self, choose: Random, talk: Talk, vm: int, *, plain: bool) -> Regs:
        free = [thread for thread in range(THREADS) if (vm, thread) not in self._talks]
        kind = choose.choice(("end", "end", "end", "cmd", "cmd", "cmd", "alloc", "alloc", "interrupt"))
        broken = choose.random() < HOSTILE_WORLD and not plain
        if plain or not free or kind == "end":
            if talk.cookies and free and not broken:
                return self._suspend(talk, vm, free[0], RpcReturn.FREE, talk.cookies.popitem()[0])
            if choose.random() < 0.1:
                return (4, 0, 0, 0)
            frame = self.machine.memory.frame(talk.pa)
            frame[20:28] = choose.choice((0, 0, 0, 0xFFFF0006)).to_bytes(4, "little") + b"\3\0\0\0"
            return (0, 0, 0, 0)
        thread = choose.choice((*self._told[VmId(vm)], 1 << 30, 0xFFFFFFFF)) if broken else free[0]
        if kind == "cmd" and (talk.behind or talk.cookies):
            cookie = 0 if talk.behind else next(iter(talk.cookies))
            place = talk.pa + self._behind(talk.pa) if talk.behind else talk.cookies[cookie]
            data = request(choose)
            if place % 4096 + len(data) <= 4096:
                self.machine.memory.write(place, data)
            if broken:
                cookie = choose.getrandbits(64)
            return self._suspend(talk, vm, thread, RpcReturn.CMD, cookie)
        if kind == "alloc" and not talk.behind:
            return self._suspend(talk, vm, thread, RpcReturn.ALLOC, 160 << 32)
        code = 0xFFFF0000 | choose.getrandbits(16) if broken else int(RpcReturn.FOREIGN_INTR)
        return self._suspend(talk, vm, thread, code if code != 0xFFFFFFFF else 0xFFFF0004, 0)

    def _suspend(self, talk: Talk, vm: int, thread: int, rpc: int, pair: int) -> Regs:
        talk.rpc = int(rpc)
        self._talks.setdefault((vm, thread), talk)
        return (int(rpc), *to_pair(pair), thread)

    def _behind(self, pa: int) -> int:
        return HEADER_SIZE + PARAM_SIZE * int(HEADER.unpack_from(self.machine.memory.frame(pa))[7])
