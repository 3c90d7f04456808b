"""What secure storage takes of the core's heap: the nodes of the files that are open.

Source: OP-TEE secure storage, section 3: all nodes stay in memory as long as their file is open, which limits the
size of an object.
"""

from __future__ import annotations

from typing import Final

from optee.abi.results import Result
from optee.errors import TeeError

FILE_SIZE: Final = 240
"""Bytes of heap for an open file with its root node."""
NODE_SIZE: Final = 120
"""Bytes of heap for each further node, the allocator's own included."""


class CoreHeap:
    """A budget in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.peak = 0

    def take(self, size: int) -> None:
        """Allocate. Raises TeeError(OUT_OF_MEMORY)."""
        if self.used + size > self.size:
            raise TeeError(Result.OUT_OF_MEMORY)
        self.used += size
        self.peak = max(self.peak, self.used)

    def give(self, size: int) -> None:
        """Free."""
        self.used -= size
