"""Frames that more than one VM maps (rule R26)."""

from __future__ import annotations

from typing import Protocol

from hv_models.memory import Bank, PageArray, PhysicalMemory


class Mapper(Protocol):
    """The stage-2 tables of a VM as far as sharing is concerned."""

    def unmap_frames(self, bank: Bank) -> None:
        """Unmap the frames of a bank wherever they are mapped."""
        ...

    def refresh(self) -> None:
        """Take note that the sharing of own frames changed."""
        ...


class FrameSharing:
    """Which frames are mapped by VMs other than the one whose RAM they are.

    The owner of a bank always counts as one of those who map its frames, whether or not it does now.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._owners: dict[Bank, Mapper] = {}
        self._users: dict[Bank, dict[int, list[Mapper]]] = {}
        self.mappings = 0
        """How many mappings there are of other VMs' frames."""

    def own(self, bank: Bank, owner: Mapper) -> None:
        """Record whose RAM a bank is."""
        self._owners[bank] = owner
        self._users[bank] = {}

    def disown(self, bank: Bank) -> None:
        """Take a bank away: other VMs that map frames of it lose those mappings."""
        del self._owners[bank]
        users = [user for mappings in self._users.pop(bank).values() for user in mappings]
        self.mappings -= len(users)
        for user in dict.fromkeys(users):
            user.unmap_frames(bank)

    def shared(self, bank: Bank, page: int) -> bool:
        """Whether a VM other than the owner maps this page."""
        return page in self._users.get(bank, ())

    def shared_pages(self, bank: Bank) -> list[int]:
        """Pages of a bank that VMs other than the owner map."""
        return list(self._users.get(bank, ()))

    def foreign(self, user: Mapper, pas: PageArray) -> list[tuple[Bank, int]]:
        """Those of the addresses that are RAM of another VM, each as often as it occurs."""
        return [
            (bank, page)
            for bank in self._memory.reaching(int(pas.min()), int(pas.max()))
            if self._owners.get(bank, user) is not user
            for page in bank.frames.find(pas).tolist()
            if page >= 0
        ]

    def change(self, user: Mapper, used: list[tuple[Bank, int]], dropped: list[tuple[Bank, int]]) -> None:
        """Record mappings of other VMs' pages that `user` made, and others that it took away."""
        for bank, page in used:
            self._users[bank].setdefault(page, []).append(user)
        for bank, page in dropped:
            users = self._users[bank][page]
            users.remove(user)
            if not users:
                del self._users[bank][page]
        self.mappings += len(used) - len(dropped)
        for owner in {self._owners[bank] for bank, _ in (*used, *dropped)}:
            owner.refresh()
