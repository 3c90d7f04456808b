"""What a guest holds, against what it may hold (rule R21)."""

from dataclasses import dataclass
from typing import Final

RESOURCES: Final = ("pages", "buffers", "rpc_arguments", "calls", "memory")


@dataclass(slots=True)
class Limits:
    """Upper bounds per guest.

    pages: 4 KiB pages in shared buffers, one count per mention; buffers: live shared buffers;
    rpc_arguments: live RPC arguments; calls: yielding calls in flight; memory: bytes of the mediator's own
    memory; pages_per_buffer: 4 KiB pages of one buffer.
    """

    pages: int
    buffers: int
    rpc_arguments: int
    calls: int
    memory: int
    pages_per_buffer: int


class OverLimit(Exception):
    """A charge would pass a limit; nothing was charged."""

    def __init__(self, resource: str) -> None:
        super().__init__(resource)
        self.resource = resource


class Charge:
    """What was charged, and so what is refunded: the same object."""

    __slots__ = ("_ledger", "buffers", "calls", "memory", "pages", "rpc_arguments")

    def __init__(self, ledger: "Ledger", pages: int, buffers: int, rpc_arguments: int, calls: int, memory: int) -> None:
        self._ledger: Ledger | None = ledger
        self.pages = pages
        self.buffers = buffers
        self.rpc_arguments = rpc_arguments
        self.calls = calls
        self.memory = memory

    def reduce_memory(self, size: int) -> None:
        """Give back some of the memory before the rest."""
        if self._ledger is not None:
            self.memory -= size
            self._ledger.memory -= size

    def refund(self) -> None:
        """Give everything back; a second time does nothing."""
        ledger = self._ledger
        if ledger is None:
            return
        self._ledger = None
        ledger.pages -= self.pages
        ledger.buffers -= self.buffers
        ledger.rpc_arguments -= self.rpc_arguments
        ledger.calls -= self.calls
        ledger.memory -= self.memory


class Ledger:
    """The sums of one guest. They are zero when the guest is gone."""

    __slots__ = ("buffers", "calls", "limits", "memory", "pages", "pages_peak", "rpc_arguments")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pages = 0
        self.buffers = 0
        self.rpc_arguments = 0
        self.calls = 0
        self.memory = 0
        self.pages_peak = 0

    def charge(
        self, pages: int = 0, buffers: int = 0, rpc_arguments: int = 0, calls: int = 0, memory: int = 0
    ) -> Charge:
        """Charge all or nothing.

        Raises:
            OverLimit: a sum would pass its limit. Lowering a limit never revokes what is held.

        """
        limits = self.limits
        if calls and self.calls + calls > limits.calls:
            raise OverLimit("calls")
        if buffers and self.buffers + buffers > limits.buffers:
            raise OverLimit("buffers")
        if pages and self.pages + pages > limits.pages:
            raise OverLimit("pages")
        if rpc_arguments and self.rpc_arguments + rpc_arguments > limits.rpc_arguments:
            raise OverLimit("rpc_arguments")
        if self.memory + memory > limits.memory:
            raise OverLimit("memory")
        self.calls += calls
        self.buffers += buffers
        self.pages += pages
        self.rpc_arguments += rpc_arguments
        self.memory += memory
        if self.pages > self.pages_peak:
            self.pages_peak = self.pages
        return Charge(self, pages, buffers, rpc_arguments, calls, memory)

    def sums(self) -> dict[str, int]:
        """What is held now, by resource."""
        return {name: getattr(self, name) for name in RESOURCES}
