"""The content of a hash-tree file as a sequence of bytes: read, write, truncate; `sync` of the tree commits.

Source: OP-TEE secure storage, section 3. Blocks are read and written one by one, each with an RPC of its own.
"""

from __future__ import annotations

from optee.steps import Steps
from optee.storage.hash_tree import HashTree
from optee.storage.layout import BLOCK_SIZE, block_count
from optee.threads import Thread


def read_content(thread: Thread, tree: HashTree, offset: int, size: int) -> Steps[bytes]:
    """Read up to `size` bytes; beyond the end there are none, and no RPC is made."""
    tree.check()
    end = min(offset + size, tree.length)
    pieces = []
    while offset < end:
        block, start = divmod(offset, BLOCK_SIZE)
        piece = yield from tree.read_block(thread, block, start, min(start + end - offset, BLOCK_SIZE))
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def write_content(thread: Thread, tree: HashTree, offset: int, data: bytes) -> Steps[None]:
    """Write `data`; a gap behind the end is filled with zeroes."""
    if not data:
        return
    tree.check()
    if offset > tree.length:
        yield from _fill(thread, tree, offset)
    yield from _write(thread, tree, offset, memoryview(data))


def truncate_content(thread: Thread, tree: HashTree, length: int) -> Steps[None]:
    """Shorten, or lengthen with zeroes."""
    tree.check()
    if length > tree.length:
        yield from _fill(thread, tree, length)
    else:
        tree.truncate(length)


def _fill(thread: Thread, tree: HashTree, length: int) -> Steps[None]:
    while tree.length < length:  # in portions, so that a far position costs no memory of ours
        portion = min(length - tree.length, BLOCK_SIZE - tree.length % BLOCK_SIZE)
        yield from _write(thread, tree, tree.length, memoryview(bytes(portion)))


def _write(thread: Thread, tree: HashTree, offset: int, data: memoryview) -> Steps[None]:
    written = block_count(tree.length)
    while data:
        block, start = divmod(offset, BLOCK_SIZE)
        piece = data[: BLOCK_SIZE - start]
        yield from tree.write_block(thread, block, start, piece, fresh=block >= written)
        offset += len(piece)
        data = data[len(piece) :]
    if offset > tree.length:
        tree.set_length(offset)
