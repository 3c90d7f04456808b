"""Reads a hash-tree file that lies still: the live version, and what is damaged in it.

OP-TEE stops at the first thing that does not match. This reader goes on as far as what it has read can be believed,
so that each damaged part is named. Source: OP-TEE secure storage, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from optee.storage.damage import Damage, DamagedError
from optee.storage.keys import FileCipher, NotAuthentic, StorageKeys, node_hash
from optee.storage.layout import (
    BLOCK_SIZE,
    COMMITTED_BLOCK,
    COUNTER_SIZE,
    HEAD_SIZE,
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

ROOT: Final = 1
_FLAGS: Final = 8  # values of the three flags of a node
_WRONG_KEYS: Final = "or the keys (HUK, chip id) are not this store's"


class Placed(NamedTuple):
    """A node, and in which version it was read."""

    node: Node
    version: int


class TreeReader:
    """One file. `damages` is empty if everything that the live version needs, but for data blocks, is whole.

    owner: as in `StorageKeys`. expected: root hash that the directory names; None for dirf.db, whose version is the
    one with the larger counter.
    """

    def __init__(
        self, name: str, data: bytes, keys: StorageKeys, owner: bytes | None, expected: bytes | None = None
    ) -> None:
        self.name = name
        self.damages: list[Damage] = []
        self.slot: int | None
        """Version of head and root that is live; None if that cannot be said."""
        self.half_made = False
        """Creating the file was interrupted: a directory like this is made anew, and empty."""
        self.torn = False
        """A newer version than the live one was being written when the store was left."""
        self.unknown_head: int | None = None
        """Slot whose head is neither the version before the live one nor the beginning of a newer one."""
        self.head: Head | None = None
        self.meta: Meta | None = None
        self.nodes: dict[int, Placed] = {}
        self.file_data = data
        """The whole file."""
        self._keys = keys
        self._owner = owner
        self._cipher: FileCipher | None = None
        self._doubtful: set[int] = set()  # nodes whose content is not to be believed
        if expected is None:
            self.slot = self._choose_by_counter()
        else:
            self.slot = self._choose_by_hash(expected)
        if self.slot is not None and not self.half_made and self._open_head(self.slot, expected):
            self._name_nodes(self._read_nodes())

    @property
    def root_hash(self) -> bytes | None:
        """Hash in the live root node."""
        return self.nodes[ROOT].node.hash if ROOT in self.nodes else None

    @property
    def length(self) -> int:
        """Bytes of content; 0 where the head is damaged."""
        return self.meta.length if self.meta is not None else 0

    def _note(self, part: str, reason: str) -> None:
        self.damages.append(Damage(self.name, part, reason))

    def _piece(self, offset: int, size: int) -> bytes | None:
        piece = self.file_data[offset : offset + size]
        return piece if len(piece) == size else None

    def head_at(self, slot: int) -> Head | None:
        """A version of the head; None beyond the end of the file."""
        piece = self._piece(head_offset(slot), HEAD_SIZE)
        return Head.unpack(piece) if piece is not None else None

    def node_at(self, number: int, version: int) -> Node | None:
        """A version of a node; None beyond the end of the file."""
        piece = self._piece(node_offset(number, version), NODE_SIZE)
        return Node.unpack(piece) if piece is not None else None

    def opens_with(self, slot: int, root_hash: bytes) -> bool:
        """Tell whether the head in a slot belongs to a tree with this root hash."""
        head = self.head_at(slot)
        return head is not None and self._is_sealed(head, root_hash)

    def _choose_by_counter(self) -> int | None:
        even, odd = self.head_at(0), self.head_at(1)
        if even is None or odd is None:
            self._note("file", f"ends before its heads ({len(self.file_data)} bytes)")
            return None
        slot = committed_head(even.counter, odd.counter)
        if slot is None:
            self._note("head slot 0", f"no slot has a valid counter ({even.counter} and {odd.counter})")
            return None
        live, other = (odd, even) if slot else (even, odd)
        self._look_at_other_head(live, 1 - slot, other)
        if not live.counter and live.tag == bytes(TAG_SIZE) and self.node_at(ROOT, slot) is not None:
            if len(self.file_data) > node_offset(ROOT, 1) + NODE_SIZE:
                self._note(f"head slot {slot}", "zeroed, as is the other: OP-TEE would make the file anew")
            self.half_made = not self.damages
            return slot if self.half_made else None
        return slot

    def _look_at_other_head(self, live: Head, slot: int, other: Head) -> None:
        """Find a newer head whose counter is not what it was sealed with.

        If the counter is that of the version before, or has only its first bytes, the write of the head was cut there.
        Any other counter was changed afterwards: what looks live is the version before.
        """
        root = self.node_at(ROOT, slot)
        if root is None:
            return
        found, before, after = other.counter, max(live.counter - 1, 0), (live.counter + 1) & 0xFFFFFFFF
        bytes_before, bytes_after = before.to_bytes(4, "little"), after.to_bytes(4, "little")
        cut = found in {int.from_bytes(bytes_after[:size] + bytes_before[size:], "little") for size in range(4)}
        if self._is_sealed(other._replace(counter=after), root.hash):
            self.torn = cut
            if not cut:
                reason = f"counter is {found}, but was {after}: the version before it is live"
                self._note(f"head slot {slot}", reason)
        elif live.counter and not cut and not self._is_sealed(other._replace(counter=before), root.hash):
            self.unknown_head = slot

    def with_newer_head(self) -> TreeReader:
        """The version that would be live if the counter of the head that is `torn` were whole."""
        if self.slot is None or self.head is None:
            raise ValueError("no head is torn")
        at = head_offset(1 - self.slot) + HEAD_SIZE
        counter = (self.head.counter + 1).to_bytes(COUNTER_SIZE, "little")
        data = self.file_data[: at - COUNTER_SIZE] + counter + self.file_data[at:]
        return TreeReader(self.name, data, self._keys, self._owner)

    def _is_sealed(self, head: Head, root_hash: bytes) -> bool:
        try:
            self._keys.open_file(self._owner, head.enc_fek).open_head(head, root_hash)
        except NotAuthentic:
            return False
        return True

    def _choose_by_hash(self, expected: bytes) -> int | None:
        for version in (0, 1):
            node = self.node_at(ROOT, version)
            if node is not None and node.hash == expected:
                return version
        for version in (0, 1):
            if self.opens_with(version, expected):
                node = self.node_at(ROOT, version)
                reason = "beyond the end of the file" if node is None else "hash is not the one that the directory has"
                self._note(f"node 1 version {version}", reason)
                return version
        if len(self.file_data) < node_offset(ROOT, 1) + NODE_SIZE:
            self._note("file", f"ends before its root node ({len(self.file_data)} bytes)")
        return None

    def _open_head(self, slot: int, expected: bytes | None) -> bool:
        """Decrypt the meta data and place the root."""
        head, root = self.head_at(slot), self.node_at(ROOT, slot)
        if head is None or root is None:
            if not self.damages:
                part = f"head slot {slot}" if head is None else f"node 1 version {slot}"
                self._note(part, "beyond the end of the file")
            return False
        self.head = head
        self._cipher = cipher = self._keys.open_file(self._owner, head.enc_fek)
        self.nodes[ROOT] = Placed(root, slot)
        guess = cipher.guess_meta(head)
        for root_hash in (expected or root.hash, node_hash(root, self._child_hashes(root, guess), guess.length)):
            try:
                meta = cipher.open_head(head, root_hash)
            except NotAuthentic:
                continue
            if block_count(meta.length) > max(meta.max_node_id, ROOT):
                self._note(f"head slot {slot}", f"{meta.length} bytes need more nodes than {meta.max_node_id}")
                return False
            self.meta = meta
            if root_hash[:16] != root.hash[:16] and not self.damages:
                self._note(f"node 1 version {slot}", "hash is not the one that the head was sealed with")
            return True
        hint = f" ({_WRONG_KEYS})" if expected is None else ""
        self._note(f"head slot {slot}", f"tag does not match{hint}")
        return False

    def _child_hashes(self, root: Node, meta: Meta) -> list[bytes]:
        """Hashes of the root's children as they stand in the file."""
        versions = [(2 + number, root.flags & committed_child(number)) for number in (0, 1)]
        nodes = [self.node_at(child, int(bool(bit))) for child, bit in versions if child <= meta.max_node_id]
        return [node.hash for node in nodes if node is not None]

    @property
    def _last_node(self) -> int:
        return max(self.meta.max_node_id if self.meta is not None else 0, ROOT)

    def _children(self, number: int, flags: int) -> list[bytes] | None:
        """Hashes of a node's children as these flags place them; None if one lies beyond the end of the file."""
        found = []
        for place, child in enumerate((2 * number, 2 * number + 1)):
            if child <= self._last_node:
                node = self.node_at(child, int(bool(flags & committed_child(place))))
                if node is None:
                    return None
                found.append(node.hash)
        return found

    def _hash(self, number: int, node: Node, children: Sequence[bytes]) -> bytes:
        return node_hash(node, children, self.length if number == ROOT else None)

    def _read_nodes(self) -> set[int]:
        """Read the nodes, parents first; returns those whose hash is not that of their content and children."""
        unsound = set()
        for number in range(ROOT, self._last_node + 1):
            if number != ROOT:
                parent = self.nodes.get(number >> 1)
                version = int(bool(parent.node.flags & committed_child(number & 1))) if parent is not None else 0
                found = self.node_at(number, version)
                if found is None:
                    self._note(f"node {number} version {version}", "beyond the end of the file")
                    if self.node_at(number, 0) is None:
                        break  # and so are all later ones
                    continue
                if parent is None:
                    continue
                self.nodes[number] = Placed(found, version)
            node, version = self.nodes[number]
            right = self._as_hashed(number, node)
            if right is None:
                unsound.add(number)
            elif right != node:
                reason = f"hash does not match: flags are {node.flags:#x}, but were {right.flags:#x}"
                self._note(f"node {number} version {version}", reason)
                self.nodes[number] = Placed(right, version)
        return unsound

    def _as_hashed(self, number: int, node: Node) -> Node | None:
        """The node with the flags that its hash was made with; None if it was made with other things.

        Flags that were changed would lead to the other version of a child, and to damage where there is none. There are
        few that a node can have, so they are tried.
        """
        for flags in (node.flags, *range(_FLAGS)):
            right, children = node._replace(flags=flags), self._children(number, flags)
            if children is not None and self._hash(number, right, children) == node.hash:
                return right
        return None

    def _name_nodes(self, unsound: set[int]) -> None:
        """Say of which nodes the hash is wrong, leaves first.

        A child that is damaged must not spoil its parent: nothing is wrong with the parent if its hash is right with
        the one that the child should have, or if its own block can be read.
        """
        right: dict[int, bytes] = {}
        for number in sorted(unsound, reverse=True):
            node, version = self.nodes[number]
            children = [child for child in (2 * number, 2 * number + 1) if child <= self._last_node]
            if any(child not in self.nodes for child in children):
                continue
            right[number] = self._hash(number, node, [right.get(c, self.nodes[c].node.hash) for c in children])
            if right[number] == node.hash or (unsound.intersection(children) and self._opens_block(number - 1)):
                continue
            self._doubtful.add(number)
            if not any(damage.part == f"node {number} version {version}" for damage in self.damages):
                self._note(f"node {number} version {version}", "hash does not match")

    def _opens_block(self, block: int) -> bool:
        try:
            self.read_block(block)
        except DamagedError:
            return False
        return True

    def placed_block(self, block: int) -> str:
        """Name of a data block's live version."""
        placed = self.nodes.get(block + 1)
        return f"block {block}" if placed is None else f"block {block} version {placed.node.flags & COMMITTED_BLOCK}"

    def read_block(self, block: int) -> bytes:
        """Content of a data block. Raises DamagedError."""
        placed = self.nodes.get(block + 1)
        if placed is None or self._cipher is None:
            first = self.damages[0] if self.damages else Damage(self.name, f"block {block}", "has no node")
            raise DamagedError(first)
        data = self._piece(block_offset(block, placed.node.flags & COMMITTED_BLOCK), BLOCK_SIZE)
        if data is None:
            raise DamagedError(Damage(self.name, self.placed_block(block), "beyond the end of the file"))
        try:
            return self._cipher.open_block(placed.node, data)
        except NotAuthentic:
            if block + 1 in self._doubtful:
                node = f"node {block + 1} version {placed.version}"
                raise DamagedError(next(damage for damage in self.damages if damage.part == node)) from None
            raise DamagedError(Damage(self.name, self.placed_block(block), "tag does not match")) from None

    def block_damages(self) -> list[Damage]:
        """Damage of the live data blocks."""
        found = []
        for block in range(block_count(self.length)):
            try:
                self.read_block(block)
            except DamagedError as error:
                if error.damage not in self.damages:
                    found.append(error.damage)
        return found

    def read(self, offset: int, size: int) -> bytes:
        """Content from `offset` on, at most to its end. Raises DamagedError."""
        end = min(offset + size, self.length)
        if offset >= end:
            return b""
        first = offset // BLOCK_SIZE
        blocks = b"".join(self.read_block(block) for block in range(first, block_count(end)))
        return blocks[offset - first * BLOCK_SIZE : end - first * BLOCK_SIZE]
