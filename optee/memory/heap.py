"""A heap as OP-TEE's core has it (bget): first fit, neighbours coalesced at once, nothing ever moved.

Source: memory sizing reference, section 4, for an AArch64 build: a block is the bytes asked for, at least 16 and
rounded up to a multiple of 16, and 16 bytes of header. The list of free blocks is searched from its head. What is
taken comes from the upper end of the block that is found, unless what would remain is no block of its own. A freed
block that has no free neighbour below it goes to the end of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Final

from optee.errors import TeeError
from optee.memory.pool import Owner, Pool

HEADER: Final = 16
"""Bytes before each block, and behind the last one."""
QUANTUM: Final = 16
"""Sizes are multiples of this, and at least this."""
_ROUND: Final = QUANTUM - 1
_SMALLEST_REST: Final = QUANTUM + HEADER  # a free rest must be larger


def block_size(size: int) -> int:
    """Bytes that an allocation of `size` bytes takes."""
    return (size + _ROUND & ~_ROUND or QUANTUM) + HEADER


def block_sizes(sizes: Iterable[int]) -> int:
    """Bytes that allocations of these sizes take together."""
    return sum(map(block_size, sizes))


class Heap(Pool):
    """One pool of `size` bytes. Addresses are offsets in it."""

    __slots__ = ("_free", "_free_ends", "best_fit", "reclaim")

    def __init__(self, size: int, name: str = "Heap", *, best_fit: bool = False) -> None:
        """best_fit: take from the smallest block that suffices (CFG_CORE_BGET_BESTFIT)."""
        super().__init__(size, name)
        self.reclaim: Callable[[int], bool] | None = None
        """Asked for bytes that are not there; True: try once more. For caches: OP-TEE has no such hook."""
        whole = (size & ~_ROUND) - HEADER
        self._free = {0: whole} if whole > HEADER else {}
        """Size of each free block by address, in the order of OP-TEE's free list."""
        self._free_ends = {size: address for address, size in self._free.items()}
        """Address of each free block by its end."""
        self.best_fit = best_fit

    def allocate(self, size: int, owner: Owner) -> int:
        """Take a block: its address. Raises TeeError(OUT_OF_MEMORY)."""
        need = (size + _ROUND & ~_ROUND or QUANTUM) + HEADER
        candidates = self._smallest(need) if self.best_fit else self._free.items()
        for address, free in candidates:
            if free < need:
                continue
            end = address + free
            if free - need > _SMALLEST_REST:
                self._free[address] = free - need
                self._free_ends[end - need] = address
            else:
                need = free
                del self._free[address]
            del self._free_ends[end]
            self._take(end - need, need, owner)
            return end - need
        reclaim, self.reclaim = self.reclaim, None
        if reclaim is not None:
            try:
                if reclaim(size):
                    return self.allocate(size, owner)
            finally:
                self.reclaim = reclaim
        raise self._failure(size)

    def _smallest(self, need: int) -> Iterable[tuple[int, int]]:
        """The first of the smallest free blocks that suffice."""
        enough = [(free, address) for address, free in self._free.items() if free >= need]
        return [(address, free) for free, address in [min(enough, key=itemgetter(0))]] if enough else ()

    def free(self, address: int) -> None:
        """Give a block back. Raises KeyError for one that is not allocated."""
        size, _ = self._used.pop(address)
        self.allocated -= size
        end = address + size
        below = self._free_ends.pop(address, None)
        if below is not None:
            address = below
        above = self._free.pop(end, 0)
        end += above
        self._free[address] = end - address
        self._free_ends[end] = address

    def allocate_all(self, sizes: Iterable[int], owner: Owner) -> tuple[int, ...]:
        """Take a block for each size, in this order, or none. Raises TeeError(OUT_OF_MEMORY)."""
        taken: list[int] = []
        try:
            for size in sizes:
                address = self.allocate(size, owner)
                taken.append(address)
        except TeeError:
            self.free_all(taken)
            raise
        return tuple(taken)

    def free_all(self, addresses: Iterable[int]) -> None:
        """Give blocks back, the last one first."""
        for address in reversed(tuple(addresses)):
            self.free(address)

    def pass_through(self, sizes: Sequence[int], owner: Owner) -> None:
        """Take blocks and give them back at once, the last one first. Raises TeeError(OUT_OF_MEMORY)."""
        need = block_sizes(sizes)
        first = next(iter(self._free.values()), 0)
        if first - need > _SMALLEST_REST and self.allocated + need <= self.max_allocated and not self.best_fit:
            return  # they would come off that block's end and go back there, and no counter would move
        self.free_all(self.allocate_all(sizes, owner))

    @property
    def largest_free(self) -> int:
        """The largest size that can be allocated now; 0 if none."""
        return max(max(self._free.values(), default=HEADER) - HEADER, 0)

    @property
    def free_squares(self) -> int:
        """Sum of the squares of the free blocks' sizes: small where what is free is in pieces (free2_sum)."""
        return sum((size - HEADER) ** 2 for size in self._free.values())
