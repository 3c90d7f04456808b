"""Says what a store holds, as documents made of plain values."""

from __future__ import annotations

import hashlib
from typing import Any, Final, TypeAlias

from optee.storage.attributes import OBJECT_TYPES, unpack_attributes
from optee.storage.damage import Damage, DamagedError
from optee.storage.layout import COMMITTED_BLOCK, MAX_OBJECT_ID, block_count, block_offset, head_offset, node_offset
from optee.storage.store_reader import StoredObject, StoreReader
from optee.storage.tree_reader import TreeReader

Document: TypeAlias = dict[str, Any]

HEX_ID: Final = "hex:"
NO_ANCHOR: Final = (
    "an old copy of the whole store cannot be told from a good one: "
    "REE FS has no anchor against rollback outside this directory"
)


def id_text(object_id: bytes) -> str:
    """An object id as text where it is printable ASCII, else as hex:..."""
    text = object_id.decode("ascii", "replace")
    if object_id and text.isascii() and text.isprintable() and not text.startswith(HEX_ID):
        return text
    return HEX_ID + object_id.hex()


def parse_id(text: str) -> bytes:
    """The object id that `id_text` writes so. Raises ValueError."""
    object_id = bytes.fromhex(text.removeprefix(HEX_ID)) if text.startswith(HEX_ID) else text.encode()
    if len(object_id) > MAX_OBJECT_ID:
        raise ValueError(f"an object id has at most {MAX_OBJECT_ID} bytes")
    return object_id


def describe_damage(damage: Damage) -> Document:
    """Where and what."""
    return {"file": damage.file, "part": damage.part, "reason": damage.reason}


def describe_object(stored: StoredObject) -> Document:
    """An object with its sizes and hashes; of a corrupt one, what its directory entry says and what is wrong."""
    entry, tree = stored.entry, stored.tree
    document: Document = {
        "ta": str(entry.uuid),
        "id": id_text(entry.object_id),
        "id_hex": entry.object_id.hex(),
        "status": "corrupt" if stored.damages else "ok",
        "raw": stored.is_raw,
        "file": entry.file_name,
        "dirent_index": stored.index,
        "root_hash": entry.root_hash.hex(),
    }
    if tree is not None and tree.head is not None:
        document |= {"head_counter": tree.head.counter, "head_slot": tree.slot}
    if tree is not None and tree.meta is not None:
        document |= {"max_node_id": tree.meta.max_node_id}
    if stored.damages:
        document |= {"damages": [describe_damage(damage) for damage in stored.damages]}
    else:
        document |= {"sha256": hashlib.sha256(stored.data).hexdigest(), "attr_hex": stored.attributes.hex()}
    try:
        header, document["size"] = stored.header, stored.size
    except DamagedError:
        return document
    if header is not None:
        document |= {
            "attr_size": header.attr_size,
            "objectType": header.object_type,
            "objectUsage": header.object_usage,
            "objectSize": header.object_size,
            "maxObjectSize": header.max_object_size,
            "have_attrs": header.have_attrs,
        }
    return document


def describe_store(store: StoreReader) -> Document:
    """All objects, and the state of the directory."""
    tree = store.tree
    directory: Document = {"counter": 0, "slot": 0, "length": 0, "max_node_id": 0}
    if tree is not None and tree.head is not None:
        directory |= {"counter": tree.head.counter, "slot": tree.slot}
    if tree is not None and tree.meta is not None:
        directory |= tree.meta._asdict()
    return {
        "objects": [describe_object(stored) for stored in store.objects],
        "free_entries": store.opened.free,
        "orphans": store.orphans,
        "dirf": directory,
        "half_made": store.is_half_made,
        "damages": [describe_damage(damage) for damage in store.damages],
        "notes": notes(store),
    }


def notes(store: StoreReader) -> list[str]:
    """What is no damage, but worth knowing."""
    found = []
    if store.is_empty:
        found.append("the directory is empty: nothing was stored yet; OP-TEE makes dirf.db at the first need")
    if store.is_half_made:
        found.append("the creation of dirf.db was interrupted: OP-TEE makes it anew, without objects")
    if store.tree is not None and store.tree.torn:
        found.append(
            "dirf.db: the last commit was interrupted just before its head was whole: the version before is live"
        )
    if store.tree is not None and store.tree.unknown_head is not None:
        found.append(
            f"dirf.db: head slot {store.tree.unknown_head} is no head of the version before, nor the beginning of a "
            "newer one: if it was the newest, this is the state before it"
        )
    if store.orphans and not store.opened.damages:
        files = ", ".join(store.orphans)
        found.append(f"files without an entry, left by interrupted operations, their numbers are free: {files}")
    if store.opened.free:
        found.append(f"free entries of dirf.db: {', '.join(map(str, store.opened.free))}")
    if store.strangers:
        found.append(f"not of secure storage: {', '.join(map(ascii_name, store.strangers))}")
    return [*found, NO_ANCHOR] if store.anchor is None else found


def ascii_name(name: str) -> str:
    """A file's name as it can be printed anywhere."""
    return name if name.isascii() and name.isprintable() else ascii(name)


def dump_tree(tree: TreeReader) -> Document:
    """Heads, live nodes and live blocks of a file, each with its place in bytes."""
    heads = []
    for slot in (0, 1):
        head = tree.head_at(slot)
        if head is not None:
            fields = {key: value.hex() if isinstance(value, bytes) else value for key, value in head._asdict().items()}
            heads.append({"slot": slot, "offset": head_offset(slot), "live": slot == tree.slot, **fields})
    nodes = []
    for number, (node, version) in sorted(tree.nodes.items()):
        fields = {key: value.hex() if isinstance(value, bytes) else value for key, value in node._asdict().items()}
        nodes.append({"id": number, "version": version, "offset": node_offset(number, version), **fields})
    blocks = []
    for block in range(block_count(tree.length)):
        placed = tree.nodes.get(block + 1)
        if placed is not None:
            version = placed.node.flags & COMMITTED_BLOCK
            blocks.append({"block": block, "version": version, "offset": block_offset(block, version)})
    return {
        "file": tree.name,
        "bytes": len(tree.file_data),
        "heads": heads,
        "meta": tree.meta._asdict() if tree.meta is not None else None,
        "nodes": nodes,
        "blocks": blocks,
    }


def dump_store(store: StoreReader) -> Document:
    """The structures of all files that the live state consists of."""
    document = describe_store(store)
    files = [store.tree, *(stored.tree for stored in store.objects)]
    document["files"] = [dump_tree(tree) for tree in files if tree is not None]
    for stored, described in zip(store.objects, document["objects"], strict=True):
        described["attributes"] = attribute_names(stored)
    return document


def attribute_names(stored: StoredObject) -> list[Document]:
    """Attributes of a key by name, where its type is known."""
    try:
        header, data = stored.header, stored.attributes
        known = OBJECT_TYPES.get(header.object_type) if header is not None else None
        values = unpack_attributes(data)
    except (DamagedError, ValueError):
        return []
    names = known[1] if known is not None else ()
    if len(names) != len(values):
        names = tuple(f"attribute {index}" for index in range(len(values)))
    return [{"name": name, "hex": value.hex()} for name, value in zip(names, values, strict=True)]
