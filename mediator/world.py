"""The secure world at the mediator's end of a machine, and what was seen of every call that reached it."""

from collections import Counter

import trio

from hv_models.link import Counts
from hv_models.machine import Machine
from mediator.core.steps import Regs
from mediator.host import Host
from optee.abi.smc import Function, SecCapability
from optee.panic import PanicReport
from optee.secure_world import SecureWorld

_LOW = 0xFFFFFFFF


class SecureWorldEnd(Host):
    """What a mediator sees of a secure world, wherever that runs.

    inbox: how often each (function, a7) reached OP-TEE; reserved_offered: client ids to which OP-TEE offered
    reserved shared memory, whatever the mediator then let them see.
    """

    counted = True
    """Whether OP-TEE says what it holds."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.inbox: Counter[tuple[int, int]] = Counter()
        self.reserved_offered: set[int] = set()

    def counts_of(self, client: int) -> Counts:
        """What OP-TEE holds of a client, and has counted of all, as far as it says so."""
        raise NotImplementedError

    async def settle(self, clients: set[int]) -> None:
        """Bring `counts_of` these clients up to date."""
        await trio.lowlevel.checkpoint()

    def panic_reports(self) -> tuple[PanicReport, ...]:
        """The latest TA panics, as far as OP-TEE's console is to be seen."""
        return ()

    def note_call(self, regs: Regs) -> None:
        """A call goes to OP-TEE."""
        self.inbox[regs[0] & _LOW, regs[7]] += 1

    def note_answer(self, regs: Regs, answer: Regs) -> None:
        """OP-TEE answered."""
        offered = regs[0] & _LOW == Function.EXCHANGE_CAPABILITIES and answer[0] == 0
        if offered and answer[1] & SecCapability.HAVE_RESERVED_SHM:
            self.reserved_offered.add(regs[7])


class LocalSecureWorld(SecureWorldEnd):
    """OP-TEE's model in this process, on a machine."""

    def __init__(self, machine: Machine, model: SecureWorld) -> None:
        super().__init__(machine)
        self.model = model

    def counts_of(self, client: int) -> Counts:
        """See `SecureWorldEnd`."""
        return count(self.model, client)

    def panic_reports(self) -> tuple[PanicReport, ...]:
        """See `SecureWorldEnd`."""
        return tuple(self.model.panic_reports)

    def call(self, regs: Regs) -> Regs:
        """Execute one SMC. Raises optee's SecureWorldFault if OP-TEE dies of it."""
        self.note_call(regs)
        answer = self.model.call(regs)
        self.note_answer(regs, answer)
        return answer


def count(model: SecureWorld, client: int) -> Counts:
    """What OP-TEE's model holds of a client, and has counted of all."""
    held = (model.threads_held(client), len(model.shared_objects(client)), model.session_count(client))
    return Counts(*held, model.ta_invokes, model.panics, model.cancels)
