"""What a guest holds, against what it may hold (rule R21)."""

from dataclasses import dataclass
from typing import Final, Protocol

RESOURCES: Final = ("pages", "buffers", "rpc_arguments", "calls", "memory")


@dataclass(slots=True)
class Limits:
    """Upper bounds per guest, and what it is sure of.

    pages: 4 KiB pages in shared buffers, one count per mention; buffers: live shared buffers;
    rpc_arguments: live RPC arguments; calls: yielding calls in flight; memory: bytes of the mediator's own
    memory; pages_per_buffer: 4 KiB pages of one buffer; reserved_pages: pages of the host's pool that nobody
    else can have, at most `pages`.
    """

    pages: int
    buffers: int
    rpc_arguments: int
    calls: int
    memory: int
    pages_per_buffer: int
    reserved_pages: int = 0


class OverLimit(Exception):
    """A charge would pass a limit; nothing was charged.

    asked, held, limit: of `resource`, None where it is not the core that counts it. rule: which one says no.
    """

    def __init__(
        self, resource: str, asked: int = 1, held: int | None = None, limit: int | None = None, rule: str = "R21"
    ) -> None:
        super().__init__(resource)
        self.resource = resource
        self.asked = asked
        self.held = held
        self.limit = limit
        self.rule = rule

    def words(self) -> dict[str, str | int | None]:
        """What it says, for an event."""
        return {
            "rule": self.rule,
            "resource": self.resource,
            "asked": self.asked,
            "held": self.held,
            "limit": self.limit,
        }

    def __str__(self) -> str:
        if self.limit is None:
            return f"no {self.resource} left"
        held = "" if self.held is None else f" beside {self.held}"
        return f"{self.asked} {self.resource}{held}, {self.limit} are allowed"


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

    def join(self, other: "Charge") -> "Charge":
        """Take another charge of the same ledger over: it is refunded with this one."""
        other._ledger = None
        self.pages += other.pages
        self.buffers += other.buffers
        self.rpc_arguments += other.rpc_arguments
        self.calls += other.calls
        self.memory += other.memory
        return self

    @property
    def refunded(self) -> bool:
        """Whether everything was given back."""
        return self._ledger is None

    def take_call(self) -> None:
        """Charge a call in flight to a charge that was made while the call waited; its limit was looked at."""
        ledger = self._ledger
        assert ledger is not None
        self.calls += 1
        ledger.calls += 1
        if ledger.calls > ledger.calls_peak:
            ledger.calls_peak = ledger.calls

    def refund(self) -> None:
        """Give everything back; a second time does nothing."""
        ledger = self._ledger
        if ledger is None:
            return
        self._ledger = None
        if self.pages:
            if ledger.lender is not None:
                ledger.lender.give_back(ledger, self.pages)
            ledger.pages -= self.pages
        if self.buffers:
            ledger.buffers -= self.buffers
        if self.rpc_arguments:
            ledger.rpc_arguments -= self.rpc_arguments
        if self.calls:
            ledger.calls -= self.calls
        ledger.memory -= self.memory


class Lender(Protocol):
    """Who has the pages of all guests together; see `mediator.core.pool.Pool`."""

    def take(self, ledger: "Ledger", pages: int) -> None:
        """Before the ledger counts them. Raises OverLimit."""
        ...

    def give_back(self, ledger: "Ledger", pages: int) -> None:
        """Before the ledger counts them off."""
        ...


class Ledger:
    """The sums of one guest. They are zero when the guest is gone.

    `peaks` are the most that was ever held. `lender` backs the pages, None while there is enough for everybody.
    """

    __slots__ = (
        "buffers",
        "buffers_peak",
        "calls",
        "calls_peak",
        "lender",
        "limits",
        "memory",
        "memory_peak",
        "pages",
        "pages_peak",
        "rpc_arguments",
        "rpc_arguments_peak",
    )

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lender: Lender | None = None
        self.pages = self.pages_peak = 0
        self.buffers = self.buffers_peak = 0
        self.rpc_arguments = self.rpc_arguments_peak = 0
        self.calls = self.calls_peak = 0
        self.memory = self.memory_peak = 0

    def charge(
        self, pages: int = 0, buffers: int = 0, rpc_arguments: int = 0, calls: int = 0, memory: int = 0
    ) -> Charge:
        """Charge all or nothing.

        Raises:
            OverLimit: a sum would pass its limit. Lowering a limit never revokes what is held.

        """
        limits = self.limits
        if calls and self.calls + calls > limits.calls:
            raise OverLimit("calls", calls, self.calls, limits.calls)
        if buffers and self.buffers + buffers > limits.buffers:
            raise OverLimit("buffers", buffers, self.buffers, limits.buffers)
        if pages and self.pages + pages > limits.pages:
            raise OverLimit("pages", pages, self.pages, limits.pages)
        if rpc_arguments and self.rpc_arguments + rpc_arguments > limits.rpc_arguments:
            raise OverLimit("rpc_arguments", rpc_arguments, self.rpc_arguments, limits.rpc_arguments)
        held = self.memory + memory
        if held > limits.memory:
            raise OverLimit("memory", memory, self.memory, limits.memory)
        if pages:
            if self.lender is not None:
                self.lender.take(self, pages)
            self.pages += pages
            if self.pages > self.pages_peak:
                self.pages_peak = self.pages
        if buffers:
            self.buffers += buffers
            if self.buffers > self.buffers_peak:
                self.buffers_peak = self.buffers
        if calls:
            self.calls += calls
            if self.calls > self.calls_peak:
                self.calls_peak = self.calls
        if rpc_arguments:
            self.rpc_arguments += rpc_arguments
            if self.rpc_arguments > self.rpc_arguments_peak:
                self.rpc_arguments_peak = self.rpc_arguments
        self.memory = held
        if held > self.memory_peak:
            self.memory_peak = held
        return Charge(self, pages, buffers, rpc_arguments, calls, memory)

    def sums(self) -> dict[str, int]:
        """What is held now, by resource."""
        return {name: getattr(self, name) for name in RESOURCES}

    def peaks(self) -> dict[str, int]:
        """The most that was ever held, by resource."""
        return {name: getattr(self, f"{name}_peak") for name in RESOURCES}
