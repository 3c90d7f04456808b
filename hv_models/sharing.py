"""Frames that more than one VM maps (rule R26)."""

from __future__ import annotations

from typing import Protocol

from hv_models.memory import Bank, Ipa, PageArray, PhysicalMemory


class Mapper(Protocol):
    """The stage-2 tables of a VM as far as sharing is concerned."""

    def find(self, pa: int) -> list[Ipa]:
        """All page addresses at which the frame is mapped."""
        ...

    def unmap(self, ipa: int, pages: int) -> None:
        """Make accesses to a range fault."""
        ...

    def refresh(self, bank: Bank, page: int) -> None:
        """Take note that the sharing of an own frame changed."""
        ...


class FrameSharing:
    """Which frames are mapped by VMs other than the one whose RAM they are.

    The owner of a bank always counts as one of those who map its frames, whether or not it does now.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._owners: dict[Bank, Mapper] = {}
        self._users: dict[Bank, dict[int, list[Mapper]]] = {}

    def own(self, bank: Bank, owner: Mapper) -> None:
        """Record whose RAM a bank is."""
        self._owners[bank] = owner
        self._users[bank] = {}

    def disown(self, bank: Bank) -> None:
        """Take a bank away: other VMs that map frames of it lose those mappings."""
        for page, users in list(self._users[bank].items()):
            for user in list(users):
                for ipa in user.find(int(bank.pa[page])):
                    user.unmap(ipa, 1)
        del self._owners[bank], self._users[bank]

    def shared(self, bank: Bank, page: int) -> bool:
        """Whether a VM other than the owner maps this page."""
        return page in self._users.get(bank, ())

    def shared_pages(self, bank: Bank) -> tuple[int, ...]:
        """Pages of a bank that VMs other than the owner map."""
        return tuple(self._users.get(bank, ()))

    def foreign(self, user: Mapper, pas: PageArray) -> list[tuple[Bank, int]]:
        """Those of the addresses that are RAM of another VM."""
        return [
            (bank, page)
            for bank in self._memory.reaching(int(pas.min()), int(pas.max()))
            if self._owners.get(bank, user) is not user
            for page in bank.frames.find(pas).tolist()
            if page >= 0
        ]

    def use(self, user: Mapper, bank: Bank, page: int) -> None:
        """Record one more mapping of somebody else's page."""
        users = self._users[bank].setdefault(page, [])
        users.append(user)
        if len(users) == 1:
            self._owners[bank].refresh(bank, page)

    def drop(self, user: Mapper, bank: Bank, page: int) -> None:
        """Take one such mapping back."""
        users = self._users[bank][page]
        users.remove(user)
        if not users:
            del self._users[bank][page]
            self._owners[bank].refresh(bank, page)
