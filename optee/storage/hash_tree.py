"""A hash-tree file that is open: its nodes in memory, its blocks on the normal world's disk.

Source: OP-TEE secure storage, sections 3, 5 and 6. Nothing of the committed version is overwritten before the head of
the next one is written: a block goes to its other version, a node to the slot that its parent does not name, the head
to the slot of its counter. There is no cache of blocks: each access is an RPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.memory.structures import FS_HTREE, HTREE_NODE
from optee.steps import Steps
from optee.storage.fs_rpc import close_file, read_file, truncate_file, write_file
from optee.storage.keys import FileCipher, NotAuthentic, StorageKeys, node_hash
from optee.storage.layout import (
    BLOCK_SIZE,
    COMMITTED_BLOCK,
    FEK_SIZE,
    HASH_SIZE,
    HEAD_SIZE,
    IV_SIZE,
    NODE_SIZE,
    TAG_SIZE,
    Head,
    Meta,
    Node,
    block_count,
    block_offset,
    committed_child,
    committed_head,
    head_offset,
    node_offset,
)
from optee.threads import Thread

ROOT: Final = 1
_VOID_HEAD: Final = bytes(HEAD_SIZE)
_EMPTY_NODE: Final = Node(bytes(HASH_SIZE), bytes(IV_SIZE), bytes(TAG_SIZE), 0)


class Services:
    """What files need of their surroundings: keys, random bytes, and memory of the core's heap."""

    def __init__(self, keys: StorageKeys, random: Callable[[int], bytes], heap: Heap, guest: int) -> None:
        self.keys = keys
        self.random = random
        self.heap = heap
        self.owner = Owner("storage file", guest)
        """Of what open files take of the heap."""


class HashTree:
    """One file. After an error it is closed for good: every later operation answers CORRUPT_OBJECT."""

    def __init__(self, services: Services, fd: int, owner: bytes | None) -> None:
        self.fd = fd
        self.length = 0
        """Bytes of content."""
        self.max_node_id = 0
        self._services = services
        self._owner = owner
        self._cipher: FileCipher
        self._counter = 0
        self._nodes = {ROOT: _EMPTY_NODE}
        self._dirty: set[int] = set()
        """Nodes whose hash is to be computed anew, but for those above them."""
        self._updated: set[int] = set()
        """Nodes whose block has been written since the last commit."""
        self._valid = True
        self._cut_to: int | None = None
        self._memory = [services.heap.allocate(FS_HTREE, services.owner)]
        """Of the file and its root, then of each further node."""

    @property
    def root_hash(self) -> bytes:
        """Of the last commit."""
        return self._nodes[ROOT].hash

    def create(self, thread: Thread) -> Steps[None]:
        """Write an empty file: node 1 and head of version 1, and a void head as version 0."""
        self._cipher = self._services.keys.new_file(self._owner, self._services.random(FEK_SIZE))
        self._nodes = {ROOT: _EMPTY_NODE}
        self._counter = 0
        self._dirty.add(ROOT)
        yield from self.sync(thread)
        yield from self._write(thread, head_offset(0), _VOID_HEAD)

    def open(self, thread: Thread, expected: bytes | None) -> Steps[None]:
        """Read and verify head and nodes. Raises TeeError: CORRUPT_OBJECT, SECURITY, or the supplicant's.

        expected: root hash. Without it the head with the larger counter is taken, and a file whose making was
        interrupted is made anew.
        """
        if expected is None:
            head, root = yield from self._read_latest(thread)
            if not head.counter and head.tag == bytes(TAG_SIZE):
                yield from self.create(thread)
                return
        else:
            head, root = yield from self._read_expected(thread, expected)
        self._cipher = self._services.keys.open_file(self._owner, head.enc_fek)
        self._counter = head.counter
        try:
            self.length, self.max_node_id = self._cipher.open_head(head, root.hash)
        except NotAuthentic:
            raise TeeError(Result.CORRUPT_OBJECT) from None
        self._nodes = {ROOT: root}
        yield from self._read_nodes(thread)

    def _read_nodes(self, thread: Thread) -> Steps[None]:
        """Read all nodes below the root, each with an RPC of its own, and verify the tree."""
        for number in range(ROOT + 1, self.max_node_id + 1):
            node = yield from self._read_node(thread, number, self._version(number))
            self._take_node()
            self._nodes[number] = node
        self._verify()

    def _verify(self) -> None:
        if any(self._hash(number) != node.hash for number, node in self._nodes.items()):
            raise TeeError(Result.CORRUPT_OBJECT)

    def _version(self, number: int) -> int:
        """Which version of a node is committed; not for the root."""
        return int(bool(self._nodes[number >> 1].flags & committed_child(number & 1)))

    def _read_latest(self, thread: Thread) -> Steps[tuple[Head, Node]]:
        even = yield from self._read_head(thread, 0)
        odd = yield from self._read_head(thread, 1)
        slot = committed_head(even.counter, odd.counter)
        if slot is None:
            raise TeeError(Result.SECURITY)
        root = yield from self._read_node(thread, ROOT, slot)
        return odd if slot else even, root

    def _read_expected(self, thread: Thread, expected: bytes) -> Steps[tuple[Head, Node]]:
        for slot in (0, 1):
            root = yield from self._read_node(thread, ROOT, slot)
            if root.hash == expected:
                return (yield from self._read_head(thread, slot)), root
        raise TeeError(Result.CORRUPT_OBJECT)

    def _read_head(self, thread: Thread, slot: int) -> Steps[Head]:
        return Head.unpack((yield from self._read(thread, head_offset(slot), HEAD_SIZE)))

    def _read_node(self, thread: Thread, number: int, version: int) -> Steps[Node]:
        return Node.unpack((yield from self._read(thread, node_offset(number, version), NODE_SIZE)))

    def _hash(self, number: int) -> bytes:
        nodes = self._nodes
        children = [nodes[child].hash for child in (2 * number, 2 * number + 1) if child in nodes]
        return node_hash(nodes[number], children, self.length if number == ROOT else None)

    def read_block(self, thread: Thread, block: int, start: int = 0, end: int = BLOCK_SIZE) -> Steps[bytes]:
        """Bytes of a block. Raises TeeError(CORRUPT_OBJECT) if it is not what was written."""
        self.check()
        try:
            node = self._nodes[block + 1]
            at = block_offset(block, node.flags & COMMITTED_BLOCK)
            data = yield from self._read(thread, at, BLOCK_SIZE)
            return self._cipher.open_block(node, data)[start:end]
        except NotAuthentic:
            self._close_on_error()
            raise TeeError(Result.CORRUPT_OBJECT) from None
        except TeeError:
            self._close_on_error()
            raise

    def write_block(self, thread: Thread, block: int, start: int, piece: memoryview, *, fresh: bool) -> Steps[None]:
        """Change bytes of a block, from `start` on; one that is `fresh` holds nothing yet. `sync` commits it."""
        content = bytearray(BLOCK_SIZE if fresh else (yield from self.read_block(thread, block)))
        content[start : start + len(piece)] = piece
        self.check()
        try:
            self._add_nodes(block + 1)
            version = self._next_version(block)
            iv = self._services.random(IV_SIZE)
            sealed, tag = self._cipher.seal_block(iv, content)
            yield from self._write(thread, block_offset(block, version), sealed)
        except TeeError:
            self._close_on_error()
            raise
        self._set_block(block, iv, tag, version)

    def _next_version(self, block: int) -> int:
        """Where a block that is written goes: always the version that is not committed."""
        number = block + 1
        flags = self._nodes[number].flags & COMMITTED_BLOCK
        return flags if number in self._updated else flags ^ COMMITTED_BLOCK

    def _set_block(self, block: int, iv: bytes, tag: bytes, version: int) -> None:
        """Note what a block was sealed with."""
        number = block + 1
        node = self._nodes[number]
        self._nodes[number] = Node(node.hash, iv, tag, node.flags & ~COMMITTED_BLOCK | version)
        self._updated.add(number)
        self._dirty.add(number)

    def _read(self, thread: Thread, offset: int, size: int) -> Steps[bytes]:
        return read_file(thread, self.fd, offset, size)

    def _write(self, thread: Thread, offset: int, data: bytes | memoryview) -> Steps[None]:
        return write_file(thread, self.fd, offset, data)

    def _add_nodes(self, last: int) -> None:
        for number in range(max(self.max_node_id, ROOT) + 1, last + 1):
            self._take_node()
            self._nodes[number] = _EMPTY_NODE
            self.max_node_id = number

    def _take_node(self) -> None:
        """Memory for one more node. Raises TeeError(OUT_OF_MEMORY)."""
        self._memory.append(self._services.heap.allocate(HTREE_NODE, self._services.owner))

    def _give_node(self) -> None:
        """The last node's memory is not needed any more."""
        self._services.heap.free(self._memory.pop())

    def set_length(self, length: int) -> None:
        """Lengthen the content; `sync` commits it. The blocks have been written."""
        self.length = length
        self._dirty.add(ROOT)

    def truncate(self, length: int) -> None:
        """Shorten the content; `sync` commits it, `cut` then shortens the file.

        Unlike OP-TEE, which cuts the file first and does not hash the surviving parents of dropped nodes anew: there,
        a power cut loses the object. Ours is as atomic as every other operation.
        """
        self.check()
        last = length // BLOCK_SIZE + 1
        for number in range(last + 1, self.max_node_id + 1):
            del self._nodes[number]
            self._give_node()
            self._dirty.add(number >> 1)
        self._dirty &= self._nodes.keys()
        self._updated &= self._nodes.keys()
        self.max_node_id = min(self.max_node_id, last)
        self._cut_to = block_offset(block_count(length), 1) + BLOCK_SIZE
        self.set_length(length)

    def cut(self, thread: Thread) -> Steps[None]:
        """Give the disk back what a committed truncation freed. A refusal changes nothing."""
        size, self._cut_to = self._cut_to, None
        if size is None:
            return
        try:
            yield from truncate_file(thread, self.fd, size)
        except TeeError:
            return

    def sync(self, thread: Thread) -> Steps[None]:
        """Commit: nodes from the leaves up, then the head."""
        self.check()
        if not self._dirty:
            return
        try:
            yield from self._write_nodes(thread)
            iv = self._services.random(IV_SIZE)
            self._counter = (self._counter + 1) & 0xFFFFFFFF
            head = self._cipher.seal_head(iv, Meta(self.length, self.max_node_id), self.root_hash, self._counter)
            yield from self._write(thread, head_offset(self._counter & 1), head.pack())
        except TeeError:
            self._close_on_error()
            raise
        self._dirty.clear()
        self._updated.clear()

    def _to_write(self) -> Iterator[int]:
        """Dirty nodes and all above them, children first, the left one before the right one."""
        wanted: set[int] = set()
        for number in self._dirty:
            while number and number not in wanted:
                wanted.add(number)
                number >>= 1
        path = [ROOT]
        while path:
            number = path[-1]
            below = next((child for child in (2 * number, 2 * number + 1) if child in wanted), None)
            if below is not None:
                path.append(below)
            else:
                wanted.discard(path.pop())
                yield number

    def _write_nodes(self, thread: Thread) -> Steps[None]:
        for number in list(self._to_write()):
            version, node = self._seal_node(number)
            yield from self._write(thread, node_offset(number, version), node.pack())

    def _seal_node(self, number: int) -> tuple[int, Node]:
        """Compute a node's hash anew, its children's being known: the version that it is to be, and the node."""
        nodes = self._nodes
        if number == ROOT:
            version = ~self._counter & 1
        else:
            parent = nodes[number >> 1]
            flag = committed_child(number & 1)
            nodes[number >> 1] = parent._replace(flags=parent.flags ^ flag)
            version = int(not parent.flags & flag)
        nodes[number] = node = nodes[number]._replace(hash=self._hash(number))
        return version, node

    def check(self) -> None:
        """Raise TeeError(CORRUPT_OBJECT) if an error has closed the file."""
        if not self._valid:
            raise TeeError(Result.CORRUPT_OBJECT)

    def _close_on_error(self) -> None:
        self._valid = False
        self._free()

    def _free(self) -> None:
        self._nodes = {}
        while self._memory:
            self._services.heap.free(self._memory.pop())

    def close(self, thread: Thread) -> Steps[None]:
        """Close the file; what is not committed is lost."""
        self._valid = False
        self._free()
        yield from close_file(thread, self.fd)
