"""The host's pool of pages that guests may share: a reservation for each, the rest for whoever comes (rule R22).

A guest's pages up to its reservation are its own, whether it holds them or not. What it holds beyond is a loan,
from what nobody has reserved and nobody else has borrowed. A loan is never revoked, so what is reserved is never
lent: a reservation can be honoured at any moment, and it is new loans that are refused first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mediator.core.ledger import Ledger, Limits, OverLimit


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """4 KiB pages of the pool. capacity: None if there is no bound; borrowed: held beyond reservations."""

    capacity: int | None
    held: int
    reserved: int
    borrowed: int


class Pool:
    """Backs the pages of any number of ledgers. capacity: 4 KiB pages, None for as many as guests may have."""

    __slots__ = ("_committed", "_ledgers", "capacity")

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._ledgers: dict[Ledger, None] = {}
        self._committed = 0
        """Pages that are reserved or borrowed: for each guest what it holds, or its reservation if that is more.
        It passes the capacity only when that was lowered over the loans of before."""

    def join(self, ledger: Ledger) -> None:
        """Back a new guest's pages. Raises OverLimit if there is no room for its reservation."""
        reserved = ledger.limits.reserved_pages
        if self.capacity is not None and reserved and self._committed + reserved > self.capacity:
            raise OverLimit("reserved_pages", reserved, self._committed, self.capacity, "R22")
        self._ledgers[ledger] = None
        self._committed += reserved
        ledger.lender = None if self.capacity is None else self

    def leave(self, ledger: Ledger) -> None:
        """The guest is gone: its reservation is free again."""
        del self._ledgers[ledger]
        ledger.lender = None
        self._count()

    def take(self, ledger: Ledger, pages: int) -> None:
        """See `Lender`: within the reservation always, beyond it while there is something to lend."""
        reserved = ledger.limits.reserved_pages
        loan = ledger.pages + pages - max(ledger.pages, reserved)
        if loan > 0:
            assert self.capacity is not None
            if self._committed + loan > self.capacity:
                raise OverLimit("host_pages", loan, self._committed, self.capacity, "R22")
            self._committed += loan

    def give_back(self, ledger: Ledger, pages: int) -> None:
        """See `Lender`: loans first."""
        loan = ledger.pages - max(ledger.pages - pages, ledger.limits.reserved_pages)
        if loan > 0:
            self._committed -= loan

    def change(self, capacity: int | None, limits: Mapping[Ledger, Limits]) -> None:
        """Change the capacity and the limits of some guests: all or nothing.

        What is held stays held. Raises OverLimit where a reservation that is new or larger cannot be honoured
        beside the others and the loans that are out, or where all reservations are more than the capacity.
        """
        wanted = {ledger: limits.get(ledger, ledger.limits) for ledger in self._ledgers}
        if capacity is not None:
            reserved = sum(each.reserved_pages for each in wanted.values())
            if reserved > capacity:
                raise OverLimit("reserved_pages", reserved, None, capacity, "R22")
            before = sum(max(ledger.pages, ledger.limits.reserved_pages) for ledger in self._ledgers)
            after = sum(max(ledger.pages, each.reserved_pages) for ledger, each in wanted.items())
            if after > before and after > capacity:
                raise OverLimit("reserved_pages", after - before, before, capacity, "R22")
        self.capacity = capacity
        for ledger, each in wanted.items():
            ledger.limits = each
            ledger.lender = None if capacity is None else self  # without a bound nobody need ask
        self._count()

    def status(self) -> PoolStatus:
        """What is held, reserved and borrowed now."""
        return PoolStatus(
            self.capacity,
            sum(ledger.pages for ledger in self._ledgers),
            sum(ledger.limits.reserved_pages for ledger in self._ledgers),
            sum(borrowed(ledger) for ledger in self._ledgers),
        )

    def _count(self) -> None:
        self._committed = sum(max(ledger.pages, ledger.limits.reserved_pages) for ledger in self._ledgers)


def borrowed(ledger: Ledger) -> int:
    """Pages that a guest holds beyond its reservation."""
    return max(ledger.pages - ledger.limits.reserved_pages, 0)
