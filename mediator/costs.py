"""What happens between a guest and OP-TEE takes, in virtual time: a table that is printed with every result.

The numbers are of the order of an Arm application processor; what matters is that they are the same in every run, so
that what waits for what can be compared. How long Python takes is never part of it.
"""

from dataclasses import dataclass
from typing import Final

import trio

from mediator.core.ports import SecureWorld
from mediator.core.steps import Regs
from optee.abi.smc import Function
from optee.secure_world import SecureWorld as SecureWorldModel

SECOND: Final = 1_000_000_000
_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds, and the CPUs that the secure world may run on.

    world_switch: into the secure world and out again. page: to translate and pin one page. command: a TA's command and
    OP-TEE's way to it. portion: of long work in a TA. tick: between two interrupts of the normal world, which suspend
    long work.
    """

    world_switch: int = 4_000
    page: int = 20
    command: int = 50_000
    portion: int = 100_000
    tick: int = 500_000
    cpus: int = 2

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and how long."""
        return [
            ("world switch, there and back", f"{self.world_switch / 1000:g} us"),
            ("page translated and pinned", f"{self.page / 1000:g} us"),
            ("TA command", f"{self.command / 1000:g} us"),
            ("portion of long work in a TA", f"{self.portion / 1000:g} us"),
            ("interrupt of the normal world", f"each {self.tick / 1000:g} us"),
            ("CPUs", str(self.cpus)),
        ]


def costs_in_words(costs: Costs = Costs()) -> str:
    """The table in a line, to stand beside results."""
    return "virtual time: " + ", ".join(f"{what} {cost}" for what, cost in costs.rows())


class VirtualTime:
    """Lets calls take the time that the table says. Use it under a clock that is not the wall's.

    More calls than there are CPUs wait for one, first come first served, as vCPUs do that nobody holds back.
    """

    def __init__(self, world: SecureWorld, model: SecureWorldModel, costs: Costs) -> None:
        self.costs = costs
        self._world = world
        self._model = model
        self._cpus = trio.CapacityLimiter(costs.cpus)
        self._spent = 0
        self._begins = False
        model.interrupt_pending = self._portion
        model.clock = lambda: round(trio.current_time() * 1000)

    async def forward(self, regs: Regs) -> Regs:
        """Execute one SMC, and be back when its time has passed. Not to be cancelled."""
        costs = self.costs
        borrower = object()
        with trio.CancelScope(shield=True):
            await self._cpus.acquire_on_behalf_of(borrower)
            try:
                self._spent = costs.world_switch
                self._begins = regs[0] & _LOW != Function.RETURN_FROM_RPC
                commands = self._model.ta_invokes
                answer = self._world.call(regs)
                self._spent += costs.command * (self._model.ta_invokes - commands)
                await trio.sleep(self._spent / SECOND)
            finally:
                self._cpus.release_on_behalf_of(borrower)
        return answer

    async def translate(self, pages: int) -> None:
        """Translate and pin so many pages. Not to be cancelled."""
        if pages:
            with trio.CancelScope(shield=True):
                await trio.sleep(pages * self.costs.page / SECOND)

    def _portion(self, client: int) -> bool:
        """A portion of long work is done; True if an interrupt has come in meanwhile."""
        if self._begins:  # the moment before a call's work, at which interrupts are unmasked
            self._begins = False
            return False
        self._spent += self.costs.portion
        return self._spent >= self.costs.tick
