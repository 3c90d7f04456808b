"""A guest that attacks a mediator in another process: its link, its RAM, and what it was told."""

from random import Random

import trio

from hv_models.link import Flavour
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.socket_conduit import SocketConduit
from mediator.conformance.outside import Target
from mediator.core.steps import Regs, Ticket
from mediator.fuzz.arena import flavour
from mediator.fuzz.moves import ENDLESS, LISTS, PAGES, endless_list, first_lists, page_list, relocated
from mediator.fuzz.seeds import Exchange
from mediator.invariants.outside import Outside


class Guest:
    """A guest of the target. It knows what its own calls gave it: threads, and where RPC arguments are."""

    def __init__(self, number: int) -> None:
        self.name = f"guest-{number}"
        self.flavour = Flavour.XEN if flavour(number) == "xen" else Flavour.KVM
        self.ram = GuestRam(PageStore(self.name, PAGES), RAM_BASE)
        self.pages: dict[int, int] = {}
        self.arguments: dict[int, tuple[int, Regs]] = {}
        """By thread: where the RPC argument behind its message is, and what the last answer was."""
        self.client = 0
        self.conduit: SocketConduit | None = None
        self.blamed = False
        """OP-TEE broke its contract with this guest: what becomes of it is open."""
        self.outside: Outside | None = None
        self.tickets: dict[int, Ticket] = {}
        self.destroyed = trio.Event()
        self._scope = trio.CancelScope()
        self._unlinked = trio.Event()

    async def live(self, target: Target, task_status: trio.TaskStatus[None]) -> None:
        """Hold the link until `hang_up`. Raises StepFailed where the target does not want the VM."""
        self._unlinked, self.destroyed = trio.Event(), trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                async with target.linked(self.flavour, self.name, 1, self.ram) as conduit:
                    self.conduit, self.client = conduit, conduit.client_id
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self.conduit = None
            self._unlinked.set()

    async def hang_up(self) -> None:
        """End the link."""
        self._scope.cancel()
        await self._unlinked.wait()

    def furnish(self) -> None:
        """Begin with memory as every guest does."""
        self.ram.store.view[:] = bytes(PAGES * PAGE_SIZE)
        for page, entries in zip(LISTS, first_lists(RAM_BASE), strict=True):
            self.ram.write(RAM_BASE + page * PAGE_SIZE, entries)
        self.ram.write(RAM_BASE + ENDLESS * PAGE_SIZE, endless_list(RAM_BASE))
        self.pages.clear()
        self.arguments.clear()
        self.tickets.clear()
        self.blamed = False

    def write_list(self, choose: Random, *, hostile: bool) -> None:
        """Write one of its page lists anew."""
        at = RAM_BASE + choose.choice(LISTS) * PAGE_SIZE
        self.ram.write(at, page_list(choose, RAM_BASE, hostile=hostile))

    def write_recorded(self, at: int, recorded: Exchange) -> None:
        """Write a message or reply of recorded traffic, and the page lists that it names."""
        data, lists = relocated(recorded.said, RAM_BASE)
        self.ram.write(at, data)
        for page, entries in lists.items():
            self.ram.write(RAM_BASE + page * PAGE_SIZE, entries)
