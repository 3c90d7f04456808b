"""The secure world of this process, and what was seen of every call that reached it."""

from collections import Counter

from hv_models.machine import Machine
from mediator.core.steps import Regs
from mediator.host import Host
from optee.abi.smc import Function, SecCapability
from optee.secure_world import SecureWorld

_LOW = 0xFFFFFFFF


class LocalSecureWorld(Host):
    """OP-TEE's model on a machine.

    inbox: how often each (function, a7) reached OP-TEE; reserved_offered: client ids to which OP-TEE offered
    reserved shared memory, whatever the mediator then let them see.
    """

    def __init__(self, machine: Machine, model: SecureWorld) -> None:
        super().__init__(machine)
        self.model = model
        self.inbox: Counter[tuple[int, int]] = Counter()
        self.reserved_offered: set[int] = set()

    def call(self, regs: Regs) -> Regs:
        """Execute one SMC. Raises optee's SecureWorldFault if OP-TEE dies of it."""
        function = regs[0] & _LOW
        self.inbox[function, regs[7]] += 1
        answer = self.model.call(regs)
        offered = function == Function.EXCHANGE_CAPABILITIES and answer[0] == 0
        if offered and answer[1] & SecCapability.HAVE_RESERVED_SHM:
            self.reserved_offered.add(regs[7])
        return answer
