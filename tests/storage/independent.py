"""A second reader of secure storage, written from the reference alone: nothing of `optee.storage` is used here.

It stops at the first thing that is wrong (AssertionError) and notes which bytes it needed.
"""

import hashlib
import hmac
import itertools
import struct
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from guests.rpmb import RpmbDevice

BLOCK = 4096
HUK, CHIP_ID = bytes(16), b"BEEF" * 8


@dataclass
class Object:
    owner: bytes
    id: bytes
    file: str
    index: int
    content: bytes

    @property
    def data(self) -> bytes:
        if self.owner == bytes(16):
            return self.content
        return self.content[24 + struct.unpack_from("<I", self.content)[0] :]


@dataclass
class Read:
    objects: list[Object] = field(default_factory=list)
    live: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """By file: first byte, end, and what lies there."""

    def part(self, file: str, offset: int) -> str | None:
        return next((part for start, end, part in self.live.get(file, ()) if start <= offset < end), None)

    def content(self, owner: str, object_id: bytes) -> bytes:
        import uuid

        (found,) = [o for o in self.objects if o.owner == uuid.UUID(owner).bytes_le and o.id == object_id]
        return found.data

    @property
    def by_id(self) -> dict[bytes, bytes]:
        """Data of the TAs' objects by id; of one owner."""
        return {o.id: o.data for o in self.objects if o.owner != bytes(16)}


def place(physical_slot: int) -> int:
    return (2 + physical_slot + physical_slot // 61) * BLOCK


def gcm(key: bytes, iv: bytes, tag: bytes, aad: bytes, text: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(key), modes.GCM(iv, tag)).decryptor()
    decryptor.authenticate_additional_data(aad)
    return decryptor.update(text) + decryptor.finalize()


def read_file(raw: bytes, tsk: bytes, root: bytes | None, live: list[tuple[int, int, str]]) -> bytes:
    """Content of one hash-tree file."""

    def node(number: int, version: int) -> tuple[bytes, bytes, bytes, int]:
        group, position = divmod(number - 1, 31)
        at = (1 + 62 * group) * BLOCK + 132 * position + 66 * version
        live.append((at, at + 66, f"node {number} version {version}"))
        assert at + 66 <= len(raw)
        return struct.unpack_from("<32s16s16sH", raw, at)

    counters = [struct.unpack_from("<I", raw, 68 * slot + 64)[0] for slot in (0, 1)]
    if root is None:
        valid = [slot for slot in (0, 1) if counters[slot] & 1 == slot]
        slot = max(valid, key=lambda each: counters[each])
    else:
        slots = [v for v in (0, 1) if raw[4096 + 66 * v :][:32] == root]
        assert slots, "no root"
        slot = slots[0]
    head = raw[68 * slot :][:68]
    live.append((68 * slot, 68 * slot + 68, f"head slot {slot}"))
    iv, tag, wrapped, sealed, counter = head[:16], head[16:32], head[32:48], head[48:64], head[64:]
    fek = Cipher(algorithms.AES(tsk), modes.ECB()).decryptor().update(wrapped)
    nodes = {1: node(1, slot)}
    length, last = struct.unpack("<QI4x", gcm(fek, iv, tag, nodes[1][0][:16] + counter + wrapped + iv, sealed))
    for number in range(2, last + 1):
        nodes[number] = node(number, nodes[number // 2][3] >> (1 + number % 2) & 1)
    for number, (digest, block_iv, block_tag, flags) in nodes.items():
        text = block_iv + block_tag + struct.pack("<H", flags)
        if number == 1:
            text += struct.pack("<Q", length)
        text += b"".join(nodes[child][0] for child in (2 * number, 2 * number + 1) if child in nodes)
        assert hashlib.sha256(text).digest() == digest, f"hash of node {number}"
    content = b""
    for block in range((length + BLOCK - 1) // BLOCK):
        _, block_iv, block_tag, flags = nodes[block + 1]
        at = place(2 * block + (flags & 1))
        live.append((at, at + BLOCK, f"block {block} version {flags & 1}"))
        content += gcm(fek, block_iv, block_tag, wrapped + block_iv, raw[at : at + BLOCK])
    return content[:length]


def anchor(device: RpmbDevice | None) -> bytes | None:
    """The root hash of dirf.db that RPMB holds."""
    return read_rpmb(bytes(device.content))["/dirfile.db.hash"] if device is not None else None


def read(directory: Path | dict[str, bytes], anchored: bytes | None = None) -> Read:
    """A whole store, from a directory or from a dictionary of its files."""
    files = directory if isinstance(directory, dict) else {path.name: path.read_bytes() for path in directory.iterdir()}
    ssk = hmac.new(HUK, CHIP_ID + b"ONLY_FOR_tee_fs_ssk\0", hashlib.sha256).digest()
    result = Read()
    entries = read_file(
        files["dirf.db"], hmac.new(ssk, b"\0", hashlib.sha256).digest(), anchored, result.live.setdefault("dirf.db", [])
    )
    for index in range(len(entries) // 120):
        owner, field_, size, root, number = struct.unpack_from("<16s64sI32sI", entries, 120 * index)
        if not size and not field_[0]:
            assert not any(entries[120 * index :][:120]), "a free entry is wholly zero"
            continue
        name = f"{number:x}"
        tsk = hmac.new(ssk, owner, hashlib.sha256).digest()
        content = read_file(files[name], tsk, root, result.live.setdefault(name, []))
        result.objects.append(Object(owner, field_[:size], name, index, content))
    return result


def root_hashes(raw: bytes) -> list[bytes]:
    """Root hashes of both versions of a hash-tree file, the one with the larger counter last."""
    counters = {struct.unpack_from("<I", raw, 68 * slot + 64)[0]: slot for slot in (0, 1)}
    return [raw[4096 + 66 * slot :][:32] for _, slot in sorted(counters.items())]


def read_rpmb(content: bytes) -> dict[str, bytes]:
    """Files of an RPMB device with OP-TEE's file system, by the names that it gave them."""
    magic, version, _, at = struct.unpack_from("<4I", content)
    assert (magic, version, at) == (0x52504D42, 2, 512)
    ssk = hmac.new(HUK, CHIP_ID + b"ONLY_FOR_tee_fs_ssk\0", hashlib.sha256).digest()
    files: dict[str, bytes] = {}
    taken: list[tuple[int, int]] = []
    while True:
        start, size, flags, unused, wrapped, name = struct.unpack_from("<4I16s224s", content, at)
        at += 256
        if flags & 1:
            text = name.rstrip(b"\0").decode()
            assert text not in files and not unused and not start % 256 and any(wrapped)
            owner = bytes.fromhex(text[1:33]) if text.count("/") == 2 else bytes(16)
            tsk = hmac.new(ssk, owner, hashlib.sha256).digest()
            fek = Cipher(algorithms.AES(tsk), modes.ECB()).decryptor().update(wrapped)
            data = b""
            for block in range(start // 256, (start + size + 255) // 256):
                number = struct.pack("<H14x", block)
                iv = Cipher(algorithms.AES(hashlib.sha256(fek).digest()[:16]), modes.ECB()).encryptor().update(number)
                decryptor = Cipher(algorithms.AES(fek), modes.CBC(iv)).decryptor()
                data += decryptor.update(content[256 * block :][:256])
            files[text] = data[:size]
            taken.append((start, start + size))
        else:
            assert not any(name) and not size
        if flags & 2:
            break
    for (_, end), (start, _) in itertools.pairwise(sorted([(0, at), *taken, (len(content) - 256, len(content))])):
        assert end <= start or start == end, "files, FAT and the last block lie apart"
    return files


def rpmb_objects(content: bytes, owner: bytes) -> dict[bytes, bytes]:
    """Data of one TA's objects in RPMB by id."""
    prefix = f"/{owner.hex().upper()}/"
    found = {name.removeprefix(prefix): data for name, data in read_rpmb(content).items() if name.startswith(prefix)}
    return {
        bytes.fromhex(name): data[24 + struct.unpack_from("<I", data)[0] :]
        for name, data in found.items()
        if not name.startswith(".")
    }
