"""A hash-tree file whose nodes and blocks stay in the memory manager's caches.

On the disk it is the same file, and what is committed is committed in the same order: blocks, nodes, head. But a
changed block is written once for each commit, and nodes that lie close together with one RPC, which also writes what
lies between them as it stands there already. The file of the normal world is opened when it is needed first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.structures import HTREE_NODE
from optee.steps import Steps
from optee.storage.fs_rpc import close_file, open_file, read_file, read_into, write_file
from optee.storage.hash_tree import ROOT, HashTree, Services
from optee.storage.keys import NotAuthentic
from optee.storage.layout import (
    BLOCK_SIZE,
    COMMITTED_BLOCK,
    HEAD_SIZE,
    IV_SIZE,
    NODE_SIZE,
    NODES_PER_BLOCK,
    TAG_SIZE,
    Head,
    Node,
    adjacent_blocks,
    block_count,
    block_offset,
    committed_head,
    head_offset,
    node_offset,
)
from optee.storage.memory.blocks import Block, BlockKey
from optee.storage.memory.manager import MemoryManager
from optee.storage.memory.nodes import NodeSet
from optee.storage.memory.objects import CachedFile
from optee.storage.memory.pool import Slot
from optee.threads import Thread

NOT_OPEN: Final = -1
_WINDOWS: Final = (1, 3, 15)
"""Blocks, of either version, that are read at once: more as long as reading goes on from block to block. With a tag
behind them the first two fit a buffer of 16 KiB."""
_PAIR: Final = 2 * NODE_SIZE
_NODE_BLOCK: Final = NODES_PER_BLOCK * _PAIR


class ManagedTree(HashTree):
    """An open file. `name`: of the file, by which caches know it."""

    def __init__(self, services: Services, memory: MemoryManager, name: str, fd: int, owner: bytes | None) -> None:
        super().__init__(services, fd, owner)
        self._name = name
        self._caches = memory
        self._cached: CachedFile | None = None
        self._whole = False
        """It has been opened, with all its nodes."""
        self.alone = True
        """No other handle has had the file open at the same time: nobody else changes its nodes on the disk."""
        self._slots: list[Slot | int] = []
        """Memory of node 2 and those behind it: a slot of the pool, or an address in the heap."""
        self._root_image = bytes(NODE_SIZE)
        """Node 1 as of the last commit; the others' are in their slots."""
        self._first_nodes = b""
        """The first node block as it was read."""
        self._unsealed: dict[int, Block] = {}
        """Changed blocks that are in the cache only."""
        self._window = 0
        self._ahead = range(0)
        """Blocks where reading would go on."""

    def enlist(self) -> None:
        """Tell the caches that the file is open."""
        self._whole = True
        self._first_nodes = b""
        self._root_image = self._nodes[ROOT].pack()
        if self._cached is None:
            self._cached = self._caches.objects.add(self._name, self._cipher)
        others = self._caches.open_files.setdefault(self._name, [])
        for other in others:
            other.alone = self.alone = False
        others.append(self)

    def resume(self, thread: Thread, cached: CachedFile) -> Steps[None]:
        """Open a file that the object cache knows. Raises TeeError if its nodes are not what they were."""
        self._cached = cached
        self._cipher = cached.cipher
        self._counter = cached.counter
        self.length = cached.length
        self.max_node_id = cached.max_node_id
        if self._claim_nodes(cached.root_hash):
            return
        root = yield from self._read_root(thread, self._counter & 1)
        if root.hash != cached.root_hash:
            raise TeeError(Result.CORRUPT_OBJECT)
        self._nodes = {ROOT: root}
        yield from self._load_nodes(thread)

    def _read_latest(self, thread: Thread) -> Steps[tuple[Head, Node]]:
        heads = yield from self._read_heads(thread)
        even, odd = (_head(heads, slot) for slot in (0, 1))
        slot = committed_head(even.counter, odd.counter)
        if slot is None:
            raise TeeError(Result.SECURITY)
        return odd if slot else even, (yield from self._read_root(thread, slot))

    def _read_expected(self, thread: Thread, expected: bytes) -> Steps[tuple[Head, Node]]:
        for slot in (0, 1):
            root = yield from self._read_root(thread, slot)
            if root.hash == expected:
                return _head((yield from self._read_heads(thread)), slot), root
        raise TeeError(Result.CORRUPT_OBJECT)

    def _read_heads(self, thread: Thread) -> Steps[bytes]:
        return (yield from self._read_some(thread, head_offset(0), 2 * HEAD_SIZE))

    def _read_root(self, thread: Thread, version: int) -> Steps[Node]:
        if not self._first_nodes:
            self._first_nodes = yield from self._read_some(thread, node_offset(ROOT, 0), _NODE_BLOCK)
        return _node(self._first_nodes, ROOT, version)

    def _read_nodes(self, thread: Thread) -> Steps[None]:
        if not self._claim_nodes(self.root_hash):
            yield from self._load_nodes(thread)

    def _claim_nodes(self, root_hash: bytes) -> bool:
        known = self._caches.nodes.claim(self._name, root_hash)
        if known is None:
            return False
        self._nodes = known.nodes
        self._slots = list(known.slots)
        return True

    def _load_nodes(self, thread: Thread) -> Steps[None]:
        """Read the node blocks, each with one RPC, and verify the tree."""
        data, self._first_nodes = self._first_nodes, b""
        for number in range(ROOT + 1, self.max_node_id + 1):
            if (number - 1) % NODES_PER_BLOCK == 0:
                data = yield from self._read_some(thread, node_offset(number, 0), _NODE_BLOCK)
            node = _node(data, number, self._version(number))
            self._take_node()
            self._nodes[number] = node
            self._note(number)
        self._verify()

    def _read(self, thread: Thread, offset: int, size: int) -> Steps[bytes]:
        if self.fd == NOT_OPEN:
            yield from self._open_file(thread)
        return (yield from read_file(thread, self.fd, offset, size))

    def _read_some(self, thread: Thread, offset: int, size: int) -> Steps[bytes]:
        """Read up to `size` bytes."""
        if self.fd == NOT_OPEN:
            yield from self._open_file(thread)
        target = bytearray(size)
        count = yield from read_into(thread, self.fd, offset, memoryview(target))
        return bytes(target[:count])

    def _write(self, thread: Thread, offset: int, data: bytes | memoryview) -> Steps[None]:
        if self.fd == NOT_OPEN:
            yield from self._open_file(thread)
        yield from write_file(thread, self.fd, offset, data)

    def _open_file(self, thread: Thread) -> Steps[None]:
        try:
            self.fd = yield from open_file(thread, self._name, create=False)
        except TeeError as error:
            if error.result == Result.ITEM_NOT_FOUND:  # somebody took the file away
                raise TeeError(Result.CORRUPT_OBJECT) from None
            raise

    def read_block(self, thread: Thread, block: int, start: int = 0, end: int = BLOCK_SIZE) -> Steps[bytes]:
        """Bytes of a block, from the cache if it is there. Raises TeeError(CORRUPT_OBJECT)."""
        self.check()
        held = self._unsealed.get(block)
        if held is None:
            held = self._caches.blocks.look_up(*self._key(block))
        if held is None:
            held = yield from self._fill(thread, block)
        if held is None:  # no memory: nothing is kept
            return (yield from super().read_block(thread, block, start, end))
        return bytes(held.buffer.view[start:end])

    def _key(self, block: int) -> tuple[BlockKey, bytes]:
        """Place and tag of a block's committed version."""
        node = self._nodes[block + 1]
        return (self._name, 2 * block + (node.flags & COMMITTED_BLOCK)), node.tag

    def _fill(self, thread: Thread, block: int) -> Steps[Block | None]:
        """Read a block into the cache, and what lies behind it if reading goes on; None if there is no memory."""
        blocks = self._caches.blocks
        try:
            taken = yield from blocks.take(thread)
            if taken is None:
                return None
            key, tag = self._key(block)
            count = self._window_at(block, key[1])
            staging = self._caches.buffers.allocate(count * BLOCK_SIZE + TAG_SIZE)
            if staging is None:
                blocks.release(taken)
                return None
            try:
                yield from self._fill_from(thread, staging.view, block, count, taken)
            except TeeError:
                blocks.release(taken)
                raise
            finally:
                staging.release()
        except TeeError:
            self._close_on_error()
            raise
        blocks.keep(taken, key, tag)
        return taken

    def _window_at(self, block: int, place: int) -> int:
        """How many blocks, of either version, to read from this one on."""
        self._window = min(self._window + 1, len(_WINDOWS) - 1) if block in self._ahead else 0
        widest = min(adjacent_blocks(place), max(self._caches.blocks.capacity // 2, 1))
        count = min(_WINDOWS[self._window], widest)
        self._ahead = range(block + 1, block + 2 + count // 2)
        return count

    def _fill_from(self, thread: Thread, staging: memoryview, block: int, count: int, taken: Block) -> Steps[None]:
        """Read blocks and decrypt them into the cache. A tag goes behind its block: so the last block is first."""
        if self.fd == NOT_OPEN:
            yield from self._open_file(thread)
        blocks = self._caches.blocks
        (_, first), _ = self._key(block)
        offset = block_offset(block, first & 1)
        size = yield from read_into(thread, self.fd, offset, staging[: count * BLOCK_SIZE])
        blocks.copied += size
        if size < BLOCK_SIZE:
            raise TeeError(Result.CORRUPT_OBJECT)
        for index in reversed(range(1, size // BLOCK_SIZE)):
            other = (first + index) // 2
            if other >= block_count(self.length) or other + 1 not in self._nodes or other in self._unsealed:
                continue
            key, tag = self._key(other)
            if key[1] != first + index or blocks.contains(key, tag):
                continue
            ahead = blocks.take_clean()
            if ahead is None:
                continue
            if self._decrypt(staging[index * BLOCK_SIZE :], other, ahead):
                blocks.keep(ahead, key, tag)
            else:  # who needs it will be told
                blocks.release(ahead)
        if not self._decrypt(staging, block, taken):
            raise TeeError(Result.CORRUPT_OBJECT)

    def _decrypt(self, staging: memoryview, block: int, target: Block) -> bool:
        node = self._nodes[block + 1]
        staging[BLOCK_SIZE : BLOCK_SIZE + TAG_SIZE] = node.tag
        try:
            self._cipher.open_block_into(node, staging[: BLOCK_SIZE + TAG_SIZE], target.buffer.view)
        except NotAuthentic:
            return False
        return True

    def write_block(self, thread: Thread, block: int, start: int, piece: memoryview, *, fresh: bool) -> Steps[None]:
        """Change bytes of a block in the cache; it is written when it has to go, and by `sync` at the latest."""
        self.check()
        held = self._unsealed.get(block)
        if held is None:
            held = yield from self._begin_change(thread, block, whole=fresh or len(piece) == BLOCK_SIZE)
        if held is None:
            yield from super().write_block(thread, block, start, piece, fresh=fresh)
            return
        held.buffer.view[start : start + len(piece)] = piece

    def _begin_change(self, thread: Thread, block: int, *, whole: bool) -> Steps[Block | None]:
        """Have a block in the cache as it is to be changed; `whole`: what it holds does not matter."""
        blocks = self._caches.blocks
        try:
            self._add_nodes(block + 1)
        except TeeError:
            self._close_on_error()
            raise
        held = blocks.look_up(*self._key(block)) if block < block_count(self.length) else None
        if held is None and whole:
            try:
                held = yield from blocks.take(thread)
            except TeeError:
                self._close_on_error()
                raise
        elif held is None:
            held = yield from self._fill(thread, block)
        if held is None:
            return None
        version = self._next_version(block)
        node = self._nodes[block + 1]
        self._set_block(block, node.iv, node.tag, version)
        blocks.change(held, (self._name, 2 * block + version), self, block)
        self._unsealed[block] = held
        return held

    def write_back(self, thread: Thread, block: int) -> Steps[None]:
        """Write a changed block to its uncommitted version."""
        held = self._unsealed[block]
        version = self._nodes[block + 1].flags & COMMITTED_BLOCK
        iv = self._services.random(IV_SIZE)
        sealed, tag = self._cipher.seal_block(iv, held.buffer.view)
        try:
            yield from self._write(thread, block_offset(block, version), sealed)
        except TeeError:
            self._close_on_error()
            raise
        self._set_block(block, iv, tag, version)
        del self._unsealed[block]
        self._caches.blocks.written(held, tag)

    def sync(self, thread: Thread) -> Steps[None]:
        """Commit: blocks that are in the cache only, nodes, head."""
        self.check()
        for block in sorted(self._unsealed):
            yield from self.write_back(thread, block)
        if self._dirty:
            yield from super().sync(thread)
            self._root_image = self._nodes[ROOT].pack()

    def _write_nodes(self, thread: Thread) -> Steps[None]:
        sealed = {number: self._seal_node(number) for number in list(self._to_write())}
        for first, last in self._runs(sorted(sealed)):
            yield from self._write_run(thread, first, last, sealed)
        for number in sealed:
            self._note(number)

    def _note(self, number: int) -> None:
        """Keep a node as it stands on the disk."""
        slot = None if number == ROOT else self._slots[number - ROOT - 1]
        if isinstance(slot, Slot):
            slot.view[:NODE_SIZE] = self._nodes[number].pack()

    def _runs(self, numbers: list[int]) -> Iterator[tuple[int, int]]:
        """First and last of those nodes that one write covers: in one node block, with nothing unknown between.

        Between them lie nodes that stay as they are, which are written so, and versions that nothing refers to: the
        state before the last commit ended with its root node, in whose place this commit's root is written.
        """
        first = last = 0
        for number in numbers:
            near = last and (last - 1) // NODES_PER_BLOCK == (number - 1) // NODES_PER_BLOCK
            if near and self.alone and all(self._committed(each) is not None for each in range(last, number + 1)):
                last = number
                continue
            if first:
                yield first, last
            first = last = number
        yield first, last

    def _write_run(self, thread: Thread, first: int, last: int, sealed: dict[int, tuple[int, Node]]) -> Steps[None]:
        version, node = sealed[first]
        offset = node_offset(first, version)
        if first == last:
            yield from self._write(thread, offset, node.pack())
            return
        size = node_offset(last, sealed[last][0]) + NODE_SIZE - offset
        staging = self._caches.buffers.allocate((last - first + 1) * _PAIR)
        if staging is None:
            for number in range(first, last + 1):
                if number in sealed:
                    yield from self._write_run(thread, number, number, sealed)
            return
        for index, number in enumerate(range(first, last + 1)):
            pair = staging.view[index * _PAIR : (index + 1) * _PAIR]
            committed = self._committed(number) or b""
            pair[:NODE_SIZE] = pair[NODE_SIZE:] = committed
            if number in sealed:
                at = sealed[number][0] * NODE_SIZE
                pair[at : at + NODE_SIZE] = sealed[number][1].pack()
        start = version * NODE_SIZE
        try:
            yield from self._write(thread, offset, staging.view[start : start + size])
        finally:
            staging.release()

    def _committed(self, number: int) -> bytes | memoryview | None:
        """A node as of the last commit, as on the disk; None if that is not known any more."""
        if number == ROOT:
            return self._root_image
        slot = self._slots[number - ROOT - 1]
        return slot.view[:NODE_SIZE] if isinstance(slot, Slot) else None

    def _take_node(self) -> None:
        slot = self._caches.nodes.allocate()
        if slot is None:
            self._slots.append(self._services.heap.allocate(HTREE_NODE, self._services.owner))
        else:
            self._slots.append(slot)

    def _give_node(self) -> None:
        slot = self._slots.pop()
        if isinstance(slot, Slot):
            self._caches.nodes.release(slot)
        else:
            self._services.heap.free(slot)

    def _close_on_error(self) -> None:
        self._abandon()
        super()._close_on_error()

    def _abandon(self) -> None:
        while self._unsealed:
            _, held = self._unsealed.popitem()
            self._caches.blocks.abandon(held)

    def _free(self) -> None:
        while self._slots:
            self._give_node()
        super()._free()

    def cut(self, thread: Thread) -> Steps[None]:
        """Give the disk back what a committed truncation freed."""
        if self.fd != NOT_OPEN:
            yield from super().cut(thread)

    def close(self, thread: Thread) -> Steps[None]:
        """Close the file. The caches keep what is committed; what is not is lost."""
        self._park()
        self._valid = False
        self._free()
        if self.fd != NOT_OPEN:
            fd, self.fd = self.fd, NOT_OPEN
            yield from close_file(thread, fd)

    def _park(self) -> None:
        clean = self._whole and self._valid and not (self._dirty or self._updated or self._unsealed)
        self._abandon()
        self._caches.closed(self._name, self)
        cached, self._cached = self._cached, None
        objects, nodes = self._caches.objects, self._caches.nodes
        if cached is not None:
            cached.references -= 1
            if not objects.holds(self._name, cached):  # removed while it was open
                return
            if not clean:
                objects.discard(self._name)
                return
            cached.root_hash, cached.counter = self.root_hash, self._counter
            cached.length, cached.max_node_id = self.length, self.max_node_id
        slots = [slot for slot in self._slots if isinstance(slot, Slot)]
        if clean and self.alone and nodes.capacity and len(slots) == len(self._slots):
            nodes.insert(self._name, NodeSet(self.root_hash, self._nodes, slots))
            self._slots, self._nodes = [], {}


def _head(data: bytes, slot: int) -> Head:
    image = data[slot * HEAD_SIZE : (slot + 1) * HEAD_SIZE]
    if len(image) < HEAD_SIZE:
        raise TeeError(Result.CORRUPT_OBJECT)
    return Head.unpack(image)


def _node(data: bytes, number: int, version: int) -> Node:
    """A node in its node block. Raises TeeError(CORRUPT_OBJECT) if the file ends before it."""
    at = (number - 1) % NODES_PER_BLOCK * _PAIR + version * NODE_SIZE
    image = data[at : at + NODE_SIZE]
    if len(image) < NODE_SIZE:
        raise TeeError(Result.CORRUPT_OBJECT)
    return Node.unpack(image)
