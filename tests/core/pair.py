"""One request drives the guest's side and the secure side.

A `Pair` is a machine with VMs, a mediator that a `Checker` watches, and a secure world that answers from a
script. Guest messages are written as a driver would write them; the secure world reaches memory by PA only.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hv_models.machine import Machine
from hv_models.memory import PAGE_SIZE
from hv_models.vm import VirtualMachine
from mediator.core.ledger import Limits
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.ports import SharedPage
from mediator.core.records import Guest
from mediator.core.steps import Event, Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.host import Host
from mediator.invariants import Checker
from mediator.policies import load_policy
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    NONCONTIG,
    Command,
    Message,
    Param,
    message_size,
    page_count,
)
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand, ShmType
from optee.abi.smc import API_REVISION, API_UID, OS_UUID, Function, ReturnCode, RpcReturn, from_pair, is_rpc, to_pair

THREADS = 8
RAM = 8 << 20
CAPABILITIES = (0, 0xFD, 0x42, 4)
TMEM_IN, TMEM_OUT, TMEM_INOUT = (kind | NONCONTIG for kind in (9, 10, 11))
RMEM_IN, RMEM_OUT, RMEM_INOUT = 5, 6, 7
VALUE_IN, VALUE_OUT, VALUE_INOUT = 1, 2, 3
GENERIC = int(Result.GENERIC)
BAD_PARAMETERS = int(Result.BAD_PARAMETERS)
OUT_OF_MEMORY = int(Result.OUT_OF_MEMORY)
COMMS = int(Origin.COMMS)
NOT_HANDLED = 2**64 - 1
YIELDING = (Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG)

_MESSAGES = frozenset({int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG)})
_POLICIES: dict[str, Policy] = {}


def policy_of(name: str = "default", **limits: int) -> Policy:
    """A built-in policy, with some of its limits changed."""
    if name not in _POLICIES:
        _POLICIES[name] = load_policy(name)
    policy = _POLICIES[name]
    return replace(policy, limits=replace(policy.limits, **limits)) if limits else policy


class CountedHost(Host):
    """The mediator's pages, of which only `left` more can be had if that is a number."""

    left: int | None = None
    on_lend: Callable[[], bool] | None = None

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.lend = self._lend

    def _lend(self) -> SharedPage | None:
        if self.on_lend is not None and not self.on_lend():
            return None
        if self.left is not None:
            if self.left == 0:
                return None
            self.left -= 1
        return self.machine.pages.allocate()


@dataclass
class Conversation:
    """A yielding call as the secure world sees it: where its message is, and where it may ask."""

    vm: int
    pa: int
    behind: bool
    """whether the RPC argument stands behind the message"""


class World:
    """The secure world: answers SMCs from `script`, and in the plain way when that is empty.

    An answer is a function of the world, the conversation and the registers that returns x0..x3.
    """

    def __init__(self, machine: Machine, threads: int) -> None:
        self.memory = machine.memory
        self.threads = threads
        self.script: deque[Answer] = deque()
        self.host_script: deque[Regs] = deque()
        self.fast: dict[int, Regs] = {
            Function.CALLS_UID: API_UID,
            Function.CALLS_REVISION: (*API_REVISION, 0, 0),
            Function.GET_OS_UUID: OS_UUID,
            Function.GET_OS_REVISION: (4, 10, 0xABCD, 0),
            Function.EXCHANGE_CAPABILITIES: CAPABILITIES,
            Function.DISABLE_SHM_CACHE: (ReturnCode.ENOTAVAIL, 0, 0, 0),
            Function.ENABLE_SHM_CACHE: (0, 0, 0, 0),
            Function.GET_THREAD_COUNT: (0, threads, 0, 0),
            Function.ENABLE_ASYNC_NOTIF: (0, 0, 0, 0),
            Function.GET_ASYNC_NOTIF_VALUE: (0, 5, 3, 0),
            Function.VM_CREATED: (0, 0, 0, 0),
            Function.VM_DESTROYED: (0, 0, 0, 0),
        }
        self.inbox: list[Regs] = []
        self.suspended: dict[tuple[int, int], Conversation] = {}
        self.arguments: dict[tuple[int, int], int] = {}
        self.now: Conversation | None = None

    def call(self, regs: Regs) -> Regs:
        self.inbox.append(regs)
        function, vm = regs[0], regs[7]
        if function in _MESSAGES:
            now = Conversation(vm, from_pair(regs[1], regs[2]), function == Function.CALL_WITH_RPC_ARG)
        elif function == Function.RETURN_FROM_RPC:
            now = self.suspended.pop((vm, regs[3]))
            if (regs[1] or regs[2]) and (regs[4] or regs[5]):
                self.arguments[vm, from_pair(regs[4], regs[5])] = from_pair(regs[1], regs[2])
        else:
            answer = self.host_script.popleft() if vm == 0 and self.host_script else self.fast[function]
            if function == Function.VM_DESTROYED and answer[0] == 0:
                self.forget(regs[1])
            return answer
        self.now = now
        act = self.script.popleft() if self.script else succeed()
        result = act(self, now, regs)
        if is_rpc(result[0]):
            self.suspended[vm, result[3]] = now
        return result

    def forget(self, vm: int) -> None:
        """What OP-TEE does when a VM is gone."""
        for table in (self.suspended, self.arguments):
            for key in [key for key in table if key[0] == vm]:
                del table[key]

    def message(self, now: Conversation) -> Message:
        return Message.unpack(self.memory.frame(now.pa))

    def argument(self, now: Conversation, cookie: int = 0) -> int:
        """PA of the RPC argument of a call."""
        if now.behind:
            return now.pa + message_size(HEADER.unpack_from(self.memory.frame(now.pa))[7])
        return self.arguments[now.vm, cookie]

    def pages_of(self, param: Param) -> list[int]:
        """PAs of the data pages that a translated parameter names."""
        left = page_count(param.b, param.a % PAGE_SIZE)
        at, found = param.a & ~(PAGE_SIZE - 1), []
        while left:
            words = np.frombuffer(self.memory.frame(at), np.uint64).tolist()
            found += words[: min(left, ENTRIES_PER_PAGE)]
            left -= min(left, ENTRIES_PER_PAGE)
            at = words[ENTRIES_PER_PAGE]
        return found


Answer = Callable[[World, Conversation, Regs], Regs]


def succeed(ret: int = 0, origin: int = 4, session: int | None = None, **params: Any) -> Answer:
    """End the call with this result; `p0=Param(...)` changes parameter 0."""

    def answer(world: World, now: Conversation, regs: Regs) -> Regs:
        message = world.message(now)
        message.ret, message.ret_origin = ret, origin
        if session is not None:
            message.session = session
        for name, param in params.items():
            message.params[int(name[1:])] = param
        world.memory.write(now.pa, message.pack())
        return (0, 0, 0, 0)

    return answer


def refuse(code: int) -> Answer:
    """End the call with an error in a0; the message stays as it is."""
    return lambda world, now, regs: (int(code), 0, 0, 0)


def raw(*words: int) -> Answer:
    """Answer these registers."""
    return lambda world, now, regs: words


def ask_alloc(thread: int = 0, size: int = 160) -> Answer:
    """Ask for a page for RPC arguments."""
    return lambda world, now, regs: (int(RpcReturn.ALLOC), *to_pair(size)[::-1][:1], 0, thread)


def ask_free(cookie: int, thread: int = 0) -> Answer:
    """Let the guest free the page of RPC arguments."""
    return lambda world, now, regs: (int(RpcReturn.FREE), *to_pair(cookie), thread)


def interrupt(thread: int = 0) -> Answer:
    """Let normal world take its interrupts."""
    return lambda world, now, regs: (int(RpcReturn.FOREIGN_INTR), 0, 0, thread)


def ask(request: Message, cookie: int = 0, thread: int = 0) -> Answer:
    """Ask for an RPC command; `cookie` is 0 where the argument stands behind the message.

    Without a page to ask by, the call ends with OUT_OF_MEMORY.
    """

    def answer(world: World, now: Conversation, regs: Regs) -> Regs:
        if not now.behind and (now.vm, cookie) not in world.arguments:
            return succeed(OUT_OF_MEMORY, Origin.TEE)(world, now, regs)
        message = replace(request, ret=GENERIC)
        world.memory.write(world.argument(now, cookie), message.pack())
        return (int(RpcReturn.CMD), *to_pair(cookie), thread)

    return answer


def shm_alloc(size: int = PAGE_SIZE, kind: int = ShmType.APPL) -> Message:
    return Message(RpcCommand.SHM_ALLOC, params=[Param(VALUE_IN, kind, size, 8)])


def shm_free(cookie: int, kind: int = ShmType.APPL) -> Message:
    return Message(RpcCommand.SHM_FREE, params=[Param(VALUE_IN, kind, cookie, 0)])


class GuestSide:
    """A VM and what its driver does: pages of its RAM, messages, page lists."""

    def __init__(self, pair: "Pair", vm: VirtualMachine) -> None:
        self.pair = pair
        self.vm = vm
        self.id = vm.client_id
        self.ram = vm.ram[0]
        self._used = 1

    @property
    def record(self) -> Guest:
        return self.pair.mediator.guests[self.id]

    @property
    def limits(self) -> Limits:
        return self.record.ledger.limits

    def page(self, count: int = 1) -> int:
        """IPA of so many unused consecutive pages."""
        ipa = self.ram.base + self._used * PAGE_SIZE
        self._used += count
        assert self._used * PAGE_SIZE <= self.ram.size, "the test needs a larger guest"
        return ipa

    def write(self, message: Message, ipa: int | None = None) -> int:
        ipa = self.page() if ipa is None else ipa
        self.ram.write(ipa, message.pack())
        return ipa

    def read(self, ipa: int) -> Message:
        return Message.unpack(self.ram.read(ipa, PAGE_SIZE - ipa % PAGE_SIZE))

    def page_list(self, pages: Sequence[int], lists: Sequence[int] | None = None) -> int:
        """Lay out a page list; `lists` says where its pages are."""
        count = max(1, -(-len(pages) // ENTRIES_PER_PAGE))
        places = [self.page() for _ in range(count)] if lists is None else list(lists)
        entries = np.array(pages, dtype=np.uint64)
        for number, place in enumerate(places):
            part = entries[number * ENTRIES_PER_PAGE : (number + 1) * ENTRIES_PER_PAGE]
            self.ram.write(place, part.tobytes())
            if number + 1 < len(places):
                self.ram.write(place + PAGE_SIZE - 8, places[number + 1].to_bytes(8, "little"))
        return places[0]

    def tmem(self, pages: int = 1, cookie: int = 1, kind: int = TMEM_INOUT, offset: int = 0) -> Param:
        """A parameter for a new buffer of so many pages; some page may be the same for long ones."""
        if pages <= 64:
            data = [self.page() for _ in range(pages)]
        else:
            first = self.page(64)
            data = [first + (n % 64) * PAGE_SIZE for n in range(pages)]
        return Param(kind, self.page_list(data) | offset, pages * PAGE_SIZE - offset, cookie)

    def submit(self, regs: Regs, vcpu: int = 0) -> Step:
        return self.pair.checker.submit(self.id, vcpu, regs)

    def smc(self, function: int, *operands: int, vcpu: int = 0) -> Regs:
        """Issue an SMC and let the secure world answer."""
        return self.pair.drive(self.submit(smc(function, *operands), vcpu))

    def call(self, message: Message | int, function: int = Function.CALL_WITH_ARG, vcpu: int = 0) -> tuple[Regs, int]:
        """Issue a message (or the one at an IPA): the registers that come back, and its IPA."""
        ipa = message if isinstance(message, int) else self.write(message)
        return self.smc(function, *to_pair(ipa), vcpu=vcpu), ipa

    def run(self, message: Message, function: int = Function.CALL_WITH_ARG) -> Message:
        """Issue a message that is answered without RPC: the message afterwards."""
        regs, ipa = self.call(message, function)
        assert regs[0] == 0, hex(regs[0])
        return self.read(ipa)

    def resume(self, thread: int = 0, a1: int = 0, a2: int = 0, a4: int = 0, a5: int = 0, vcpu: int = 0) -> Regs:
        return self.smc(Function.RETURN_FROM_RPC, a1, a2, thread, a4, a5, vcpu=vcpu)

    def give_page(self, cookie: int, thread: int = 0, ipa: int | None = None) -> tuple[Regs, int]:
        """Answer an RPC ALLOC with a page."""
        ipa = self.page() if ipa is None else ipa
        return self.resume(thread, *to_pair(ipa), *to_pair(cookie)), ipa

    def register(self, param: Param) -> Message:
        return self.run(Message(Command.REGISTER_SHM, params=[replace_kind(param, TMEM_OUT)]))

    def unregister(self, cookie: int) -> Message:
        return self.run(Message(Command.UNREGISTER_SHM, params=[Param(RMEM_IN, 0, 0, cookie)]))

    def invoke(self, *params: Param) -> Message:
        return self.run(invoke(*params))

    def sums(self) -> dict[str, int]:
        return self.record.ledger.sums()

    def pins(self) -> int:
        return self.vm.pins

    def dump(self) -> bytes:
        """All of its RAM."""
        return self.ram.read(self.ram.base, self.ram.size)


def invoke(*params: Param, session: int = 1) -> Message:
    return Message(Command.INVOKE_COMMAND, 7, session, params=list(params))


def register(param: Param) -> Message:
    return Message(Command.REGISTER_SHM, params=[param])


def unregister(cookie: int, kind: int = RMEM_IN) -> Message:
    return Message(Command.UNREGISTER_SHM, params=[Param(kind, 0, 0, cookie)])


def replace_kind(param: Param, kind: int) -> Param:
    return param._replace(attr=kind)


def smc(function: int, *operands: int) -> Regs:
    """Registers of a call; those not given are 0."""
    return (int(function), *operands, *[0] * (7 - len(operands)))


class Pair:
    """See the module. `fill` is what fresh mediator pages hold; a test that says 0xA5 sees what was not cleared."""

    def __init__(self, policy: str | Policy = "default", *, threads: int = THREADS, fill: int = 0) -> None:
        self.machine = Machine(fill=fill)
        self.host = CountedHost(self.machine)
        self.world = World(self.machine, threads)
        self.policy = policy_of(policy) if isinstance(policy, str) else policy
        self.mediator = Mediator(self.policy, self.host)
        self.checker = Checker(self.mediator, self.host, self.threads_held)
        self.events: list[Event] = []
        self.records: list[Guest] = []
        self.errors_expected = False
        assert self.drive(self.checker.probe())[0] == 0

    def threads_held(self, vm: int) -> int:
        return sum(owner == vm for owner, _ in self.world.suspended)

    def guest(
        self, kind: str = "kvm", ram: Any = RAM, client_id: int | None = None, *, rpmb: bool = False
    ) -> GuestSide:
        """Create a VM and announce it."""
        number = len(self.machine.vms)
        if kind == "kvm":
            vm: VirtualMachine = self.machine.create_kvm(f"kvm-{number}", ram, client_id=client_id)
        else:
            domain = None if client_id is None else client_id - 1
            vm = self.machine.create_xen(f"xen-{number}", ram, domain=domain)
        assert self.create(vm, rpmb=rpmb)[0] == 0
        return GuestSide(self, vm)

    def create(self, vm: VirtualMachine, client_id: int | None = None, *, rpmb: bool = False) -> Regs:
        number = vm.client_id if client_id is None else client_id
        regs = self.drive(self.checker.create(number, vm, rpmb=rpmb))
        if regs[0] == 0:
            self.records.append(self.mediator.guests[number])
        return regs

    def note(self, step: Step) -> Step:
        self.events += step.events
        return step

    def answer(self, step: Step) -> Regs:
        """What the secure world answers to a Forward."""
        assert isinstance(step, Forward), step
        return self.world.call(step.regs)

    def returned(self, ticket: Ticket, answer: Regs) -> Step:
        return self.note(self.checker.returned(ticket, answer))

    def drive(self, step: Step) -> Regs:
        """Let the secure world answer until the request is answered."""
        self.note(step)
        while not isinstance(step, Reply):
            if isinstance(step, Forward):
                step = self.returned(step.ticket, self.world.call(step.regs))
            else:
                assert isinstance(step, Preempt), step
                step = self.note(self.checker.proceed(step.ticket))
        return step.regs

    def destroy(self, guest: GuestSide | int) -> Regs:
        """End a VM in the mediator; the machine keeps it."""
        number = guest if isinstance(guest, int) else guest.id
        return self.drive(self.checker.destroy(number))

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def settle(self, guest: GuestSide) -> None:
        """Everything that a guest held is back, though it lives."""
        assert not any(guest.sums().values()), guest.sums()
        assert guest.pins() == 0
        assert self.machine.pages.allocated == 0

    def end_all(self) -> None:
        for number in list(self.mediator.guests):
            step = self.checker.destroy(number)
            assert not isinstance(step, Queue), "a test left a call with OP-TEE"
            assert self.drive(step)[0] == 0

    def check(self) -> None:
        """What holds at the end of every test."""
        self.checker.finish()
        assert self.checker.violations == []
        self.end_all()
        assert self.checker.violations == []
        assert self.machine.pinned_frames() == {}
        assert self.machine.pages.allocated == 0
        for record in self.records:
            assert not any(record.ledger.sums().values()), record.ledger.sums()
            assert not record.calls and not record.suspended and not record.buffers and not record.arguments
        if not self.errors_expected:
            assert [event for event in self.events if event.level not in ("debug", "info")] == []
        vms = [int(regs[1]) for regs in self.world.inbox if regs[0] == Function.VM_CREATED]
        assert all(regs[7] == 0 or regs[7] in vms for regs in self.world.inbox)

    def close(self) -> None:
        self.machine.close()


def suspended_in_command(
    guest: GuestSide, request: Message, *, behind: bool = True, thread: int = 0, cookie: int = 0xC0
) -> tuple[int, int]:
    """Bring a call of the guest to where it waits for a reply to `request`: (IPA of its RPC argument, that of the
    message)."""
    script = guest.pair.world.script
    if behind:
        script.append(ask(request, thread=thread))
        regs, ipa = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
        at = ipa + message_size(0)
    else:
        script += [ask_alloc(thread), ask(request, cookie, thread)]
        regs, ipa = guest.call(invoke())
        assert regs[0] == RpcReturn.ALLOC
        regs, at = guest.give_page(cookie, thread)
    assert regs[0] == RpcReturn.CMD, hex(regs[0])
    return at, ipa
