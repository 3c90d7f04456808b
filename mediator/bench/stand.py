"""What the mediator's core is measured on: a real VM's memory, and a secure world that answers from a script."""

from typing import Final

import numpy as np

from hv_models.machine import Machine
from hv_models.memory import PAGE_SHIFT, PAGE_SIZE, PageArray
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.steps import Forward, Preempt, Regs, Reply, Step
from mediator.host import Host
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    NONCONTIG,
    OFFSET_RET,
    Command,
    Message,
    Param,
    ParamType,
    list_pages,
)
from optee.abi.results import Result
from optee.abi.smc import API_UID, Function, ReturnCode, from_pair, to_pair

THREADS: Final = 8
"""OP-TEE threads per guest, as `serve` has them."""
SMALL_BUFFERS: Final = 4
"""A message of an application has at most this many parameters (GlobalPlatform TEE Client API)."""
SMALL_PAGES: Final = 16
"""Pages of a temporary buffer: 64 KiB."""
LARGE_PAGES: Final = 16384
"""Pages of the largest buffer that policy `default` lets a guest register: 64 MiB."""
LARGE_COOKIE: Final = 0x1000
TMEM: Final = ParamType.TMEM_OUTPUT | NONCONTIG

_WITH_MESSAGE: Final = frozenset({int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG)})
_OK: Final = (0, 0, 0, 0)
_SUCCESS: Final = bytes(8)
_SPREAD: Final = 40503
"""Odd, so n * _SPREAD modulo a power of two names each page once, with neighbours far apart."""


class ScriptedWorld(Host):
    """A secure world without OP-TEE: every message succeeds at once."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._frame = machine.memory.frame

    def call(self, regs: tuple[int, ...]) -> tuple[int, ...]:
        """Answer OK; in a message `ret` is success."""
        function = regs[0]
        if function in _WITH_MESSAGE:
            self._frame(regs[1] << 32 | regs[2])[OFFSET_RET : OFFSET_RET + 8] = _SUCCESS
        elif function == Function.CALLS_UID:
            return API_UID
        elif function == Function.GET_THREAD_COUNT:
            return (int(ReturnCode.OK), THREADS, 0, 0)
        return _OK


class Stand:
    """One KVM guest with its messages and page lists laid out in its RAM, and a mediator in front of it."""

    def __init__(self, policy: Policy) -> None:
        self.machine = Machine()
        self.world = ScriptedWorld(self.machine)
        self.mediator = Mediator(policy, self.world)
        self.vm = self.machine.create_kvm("bench")
        self.ram = self.vm.ram[0]
        self._used = 1
        self._drive(self.mediator.probe())
        self._drive(self.mediator.create(self.vm.client_id, self.vm))

    def close(self) -> None:
        """Give the machine's memory back."""
        self.machine.close()

    def call(self, regs: Regs) -> Regs:
        """One SMC of the guest, from trap to return."""
        return self._drive(self.mediator.submit(self.vm.client_id, 0, regs))

    def _drive(self, step: Step) -> Regs:
        mediator = self.mediator
        while not isinstance(step, Reply):
            if isinstance(step, Forward):
                step = mediator.returned(step.ticket, self.world.call(step.regs))
            else:
                assert isinstance(step, Preempt)
                step = mediator.proceed(step.ticket)
        return step.regs

    def pages(self, count: int) -> int:
        """Take `count` unused consecutive pages of the guest's RAM; the IPA of the first."""
        ipa = self.ram.base + (self._used << PAGE_SHIFT)
        self._used += count
        return ipa

    def message(self, message: Message) -> Regs:
        """Lay a message out; the registers that call with it."""
        ipa = self.pages(1)
        self.ram.write(ipa, message.pack())
        return (int(Function.CALL_WITH_ARG), *to_pair(ipa), 0, 0, 0, 0, 0)

    def page_list(self, entries: PageArray) -> int:
        """Lay out the page list of a buffer; the IPA of its first page."""
        count = list_pages(len(entries))
        ipa = self.pages(count)
        for number in range(count):
            part = entries[number * ENTRIES_PER_PAGE : (number + 1) * ENTRIES_PER_PAGE]
            at = ipa + (number << PAGE_SHIFT)
            self.ram.write(at, part.tobytes())
            if number + 1 < count:
                self.ram.write(at + PAGE_SIZE - 8, (at + PAGE_SIZE).to_bytes(8, "little"))
        return ipa

    def scattered(self, count: int) -> PageArray:
        """IPAs of `count` different pages, of which no two neighbours in the list are neighbours in RAM."""
        size = 1 << (count - 1).bit_length()
        first = self.pages(size) >> PAGE_SHIFT
        numbers = (np.arange(size, dtype=np.uint64) * np.uint64(_SPREAD)) % np.uint64(size)
        return (numbers[:count] + np.uint64(first)) << np.uint64(PAGE_SHIFT)

    def succeeds(self, regs: Regs) -> None:
        """Make a call and raise RuntimeError unless all went well: a refusal is quick, and worth nothing here."""
        answer = self.call(regs)
        if answer[0] != ReturnCode.OK:
            raise RuntimeError(f"a benchmark's call was answered {answer[0]:#x}")
        if regs[0] in _WITH_MESSAGE:
            ret = int.from_bytes(self.ram.read(from_pair(regs[1], regs[2]) + OFFSET_RET, 4), "little")
            if ret != Result.SUCCESS:
                raise RuntimeError(f"a benchmark's message was answered {ret:#x}")


def fast_call() -> Regs:
    """Registers of the fast call that Linux makes on every notification."""
    return (int(Function.GET_ASYNC_NOTIF_VALUE), 0, 0, 0, 0, 0, 0, 0)


def value_call(stand: Stand) -> Regs:
    """An INVOKE_COMMAND with four values."""
    params = [Param(ParamType.VALUE_INOUT, 1, 2, 3) for _ in range(SMALL_BUFFERS)]
    return stand.message(Message(Command.INVOKE_COMMAND, session=1, params=params))


def buffer_call(stand: Stand) -> Regs:
    """An INVOKE_COMMAND with four temporary buffers."""
    params = [
        Param(
            ParamType.TMEM_INOUT | NONCONTIG,
            stand.page_list(stand.scattered(SMALL_PAGES)),
            SMALL_PAGES * PAGE_SIZE,
            cookie,
        )
        for cookie in range(1, SMALL_BUFFERS + 1)
    ]
    return stand.message(Message(Command.INVOKE_COMMAND, session=1, params=params))


def register_call(stand: Stand, pages: int, cookie: int) -> Regs:
    """A REGISTER_SHM of so many pages, none twice."""
    entries = stand.page_list(stand.scattered(pages))
    param = Param(TMEM, entries, pages * PAGE_SIZE, cookie)
    return stand.message(Message(Command.REGISTER_SHM, params=[param]))


def unregister_call(stand: Stand, cookie: int) -> Regs:
    """The UNREGISTER_SHM that goes with it."""
    return stand.message(Message(Command.UNREGISTER_SHM, params=[Param(ParamType.RMEM_INPUT, 0, 0, cookie)]))
