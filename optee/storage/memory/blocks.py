"""Cache of data blocks, decrypted: the least recently used goes first; what was changed is written back before."""

from __future__ import annotations

from typing import Protocol

from optee.steps import Steps
from optee.storage.layout import BLOCK_SIZE
from optee.storage.memory.buffers import Buffer, Buffers
from optee.storage.memory.lru import Clock, Entry, Lru
from optee.storage.memory.statistics import LevelStatistics
from optee.threads import Thread

BlockKey = tuple[str, int]
"""File, and the place of the block in it: twice its number, and one more for version 1."""


class Writer(Protocol):
    """An open file that has changed blocks in the cache."""

    def write_back(self, thread: Thread, block: int) -> Steps[None]:
        """Write a changed block to its uncommitted version. Raises TeeError."""
        ...


class Block(Entry):
    """A block. It answers to the tag that its file's node has now, so an outdated one is never found."""

    __slots__ = ("buffer", "key", "number", "tag", "writer")

    def __init__(self, buffer: Buffer) -> None:
        super().__init__()
        self.buffer = buffer
        self.key: BlockKey = "", 0
        self.tag = b""
        self.writer: Writer | None = None
        """Whose change is not on the disk yet."""
        self.number = 0


class BlockCache(Lru[BlockKey, Block]):
    """Blocks of all files of a guest."""

    def __init__(self, clock: Clock, capacity: int, buffers: Buffers) -> None:
        super().__init__(clock, capacity, LevelStatistics())
        self._buffers = buffers
        self.written_back = 0
        self.filled = 0
        """Blocks that came in from the disk."""
        self.copied = 0
        """Bytes copied out of RPC memory for that. From the copy a block is decrypted into its place in the cache."""

    def look_up(self, key: BlockKey, tag: bytes) -> Block | None:
        """The block at this place if it is the one with this tag."""
        block = self.find(key)
        if block is None or block.tag != tag or block.writer is not None:
            self.statistics.misses += 1
            return None
        self.statistics.hits += 1
        return block

    def contains(self, key: BlockKey, tag: bytes) -> bool:
        """Tell whether `look_up` would find it; nothing is counted."""
        block = self._entries.get(key)
        return block is not None and block.tag == tag

    def take(self, thread: Thread) -> Steps[Block | None]:
        """A block full of zeroes, for `keep` or for `release`; None if nothing can go. Raises TeeError."""
        while True:
            block = self.take_clean()
            if block is not None:
                return block
            changed = next((block for block in self._entries.values() if block.writer is not None), None)
            if changed is None or changed.writer is None:
                return None
            yield from changed.writer.write_back(thread, changed.number)

    def take_clean(self) -> Block | None:
        """The same without writing anything back."""
        block = self.take_free()
        return block if block is not None or not self.make_room() else self.take_free()

    def take_free(self) -> Block | None:
        """The same from free memory only."""
        if len(self._entries) >= self.capacity:
            return None
        buffer = self._buffers.allocate(BLOCK_SIZE, BLOCK_SIZE)
        if buffer is None:
            return None
        self.statistics.took(BLOCK_SIZE)
        return Block(buffer)

    def keep(self, block: Block, key: BlockKey, tag: bytes) -> None:
        """Put a block that was read, or is on the disk now, into the cache."""
        self.filled += 1
        block.tag = tag
        self._place(block, key)

    def change(self, block: Block, key: BlockKey, writer: Writer, number: int) -> None:
        """A block is about to be changed: it stays until it is written back."""
        block.tag = b""
        block.writer = writer
        block.number = number
        block.references += 1
        self._place(block, key)

    def written(self, block: Block, tag: bytes) -> None:
        """A changed block is on the disk."""
        self.written_back += 1
        block.tag = tag
        block.writer = None
        block.references -= 1

    def _place(self, block: Block, key: BlockKey) -> None:
        if self._entries.get(block.key) is block:
            del self._entries[block.key]
        block.key = key
        self.insert(key, block)

    def abandon(self, block: Block) -> None:
        """A change will not be written."""
        if block.writer is not None:
            block.writer = None
            block.references -= 1
        self.discard(block.key)

    def release(self, block: Block) -> None:
        """Give back a block that was taken and not kept."""
        self._drop(block)

    def forget(self, file: str) -> None:
        """Drop all blocks of a file."""
        for key in [key for key in self._entries if key[0] == file]:
            self.discard(key)

    def _drop(self, entry: Block) -> None:
        self.statistics.gave(BLOCK_SIZE)
        entry.buffer.release()
