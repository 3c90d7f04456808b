"""What the checker asks of the hypervisor model, and which addresses are the host's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from hv_models.memory import PageArray
from optee.abi.smc import VmId


class Host(Protocol):
    """What the checker asks of the hypervisor model."""

    def pins(self, vm: VmId) -> Mapping[int, int]:
        """References per physical page, of the pages of this VM that have any."""
        ...

    def pin_count(self, vm: VmId) -> int:
        """Sum of the same."""
        ...

    def outside_ram(self, vm: VmId, pas: PageArray) -> PageArray:
        """Those of the addresses at which no page of this VM's RAM lies."""
        ...

    def frame(self, pa: int) -> memoryview:
        """The 4096 bytes of the mediator's page with this address; KeyError if it is not the mediator's."""
        ...

    def own_address_in_ram(self, vm: VmId) -> tuple[int, int] | None:
        """IPA and value of a word in this VM's RAM that is the address of a page of the mediator's; None if none is."""
        ...

    def host_addresses(self) -> Sequence[tuple[int, int]]:
        """Ranges [first, end) of addresses that no guest can know."""
        ...


class Addresses:
    """Which words are addresses of the host's. Most words are below all of them, which is asked first."""

    __slots__ = ("_host", "_known", "lowest")

    def __init__(self, host: Host) -> None:
        self._host = host
        self.lowest = 0
        self._known: Sequence[tuple[int, int]] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Memory may have been added."""
        ranges = self._host.host_addresses()
        if ranges is not self._known:
            self._known = ranges
            self.lowest = min((first for first, _ in ranges), default=1 << 64)

    def among(self, words: Iterable[int]) -> Iterator[int]:
        """Those of the words that no guest can know."""
        suspects = [word for word in words if word >= self.lowest]
        if suspects:
            ranges = self._host.host_addresses()
            for word in suspects:
                if any(first <= word < end for first, end in ranges):
                    yield word
