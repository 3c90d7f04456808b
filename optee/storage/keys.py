"""Keys of secure storage: HUK -> SSK -> TSK -> FEK, and what a file's key seals.

Source: OP-TEE secure storage, sections 2 to 4, with CFG_CORE_HUK_SUBKEY_COMPAT=y and
CFG_REE_FS_HTREE_HASH_SIZE_COMPAT=y, the defaults. The hardware unique key belongs to the machine: guests have no keys
of their own.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB, GCM

from optee.storage.layout import IV_SIZE, TAG_SIZE, Head, Meta, Node

HUK_SIZE: Final = 16
CHIP_ID_SIZE: Final = 32
DEFAULT_HUK: Final = bytes(HUK_SIZE)
"""tee_otp_get_hw_unique_key of a platform that has none of its own."""
DEFAULT_CHIP_ID: Final = b"BEEF" * 8
"""tee_otp_get_die_id of a platform that has none of its own."""

_CID_CHANGING: Final = (9, 15)  # product revision and checksum: a firmware update of the card changes them
_ESSIV_KEY_SIZE: Final = 16
_SSK_USAGE: Final = b"ONLY_FOR_tee_fs_ssk\0"
_GUEST_USAGE: Final = b"guest "
_NO_OWNER: Final = b"\0"
_ROOT_HASH_IN_HEAD: Final = 16  # bytes: CFG_REE_FS_HTREE_HASH_SIZE_COMPAT


class NotAuthentic(Exception):
    """A tag does not match what it seals."""


def node_hash(node: Node, children: Sequence[bytes], length: int | None = None) -> bytes:
    """Hash of a node over itself and its children's hashes; the root's (`length` given) also over the length."""
    digest = sha256(node.iv + node.tag + node.flags.to_bytes(2, "little"))
    if length is not None:
        digest.update(length.to_bytes(8, "little"))
    for child in children:
        digest.update(child)
    return digest.digest()


class FileCipher:
    """The key of one file (FEK)."""

    def __init__(self, fek: bytes, enc_fek: bytes) -> None:
        self._fek = fek
        self._gcm = AESGCM(fek)
        self.enc_fek = enc_fek
        """The key as it stands in the head."""

    def seal_block(self, iv: bytes, block: bytes | bytearray | memoryview) -> tuple[bytes, bytes]:
        """Encrypt a data block: what to write, and the tag."""
        sealed = self._gcm.encrypt(iv, block, self.enc_fek + iv)
        return sealed[:-TAG_SIZE], sealed[-TAG_SIZE:]

    def open_block(self, node: Node, data: bytes) -> bytes:
        """Decrypt the data block of a node. Raises NotAuthentic."""
        try:
            return self._gcm.decrypt(node.iv, data + node.tag, self.enc_fek + node.iv)
        except InvalidTag:
            raise NotAuthentic from None

    def open_block_into(self, node: Node, sealed: memoryview, target: memoryview) -> None:
        """Decrypt the data block of a node, its tag behind it, into `target`. Raises NotAuthentic."""
        try:
            self._gcm.decrypt_into(node.iv, sealed, self.enc_fek + node.iv, target)
        except InvalidTag:
            raise NotAuthentic from None

    def seal_head(self, iv: bytes, meta: Meta, root_hash: bytes, counter: int) -> Head:
        """Make the head that commits a tree."""
        aad = root_hash[:_ROOT_HASH_IN_HEAD] + counter.to_bytes(4, "little") + self.enc_fek + iv
        sealed = self._gcm.encrypt(iv, meta.pack(), aad)
        return Head(iv, sealed[-TAG_SIZE:], self.enc_fek, sealed[:-TAG_SIZE], counter)

    def open_head(self, head: Head, root_hash: bytes) -> Meta:
        """Decrypt the meta data. Raises NotAuthentic."""
        aad = root_hash[:_ROOT_HASH_IN_HEAD] + head.counter.to_bytes(4, "little") + head.enc_fek + head.iv
        try:
            return Meta.unpack(self._gcm.decrypt(head.iv, head.imeta + head.tag, aad))
        except InvalidTag:
            raise NotAuthentic from None

    def guess_meta(self, head: Head) -> Meta:
        """Decrypt the meta data of a head without believing it: only to say what is damaged."""
        return Meta.unpack(Cipher(AES(self._fek), GCM(head.iv, head.tag)).decryptor().update(head.imeta))


class RpmbFileCipher:
    """The key of one file in RPMB: AES-CBC, block by block; the MAC of the frames is what authenticates."""

    def __init__(self, fek: bytes) -> None:
        self._fek = AES(fek)
        self._essiv = AES(sha256(fek).digest()[:_ESSIV_KEY_SIZE])

    def _cipher(self, index: int) -> Cipher[CBC]:
        number = index.to_bytes(2, "little").ljust(IV_SIZE, b"\0")
        return Cipher(self._fek, CBC(Cipher(self._essiv, ECB()).encryptor().update(number)))

    def seal(self, index: int, block: bytes) -> bytes:
        """Encrypt the block with that index in the device."""
        return self._cipher(index).encryptor().update(block)

    def open(self, index: int, block: bytes) -> bytes:
        """Decrypt the block with that index in the device."""
        return self._cipher(index).decryptor().update(block)


class StorageKeys:
    """All keys that follow from the machine's hardware unique key.

    huk: any number of bytes, 16 as a rule. chip_id: 32 bytes. guest: client id of a guest whose keys are to be its own;
    OP-TEE has no such keys, so this is ours.
    """

    def __init__(self, huk: bytes = DEFAULT_HUK, chip_id: bytes = DEFAULT_CHIP_ID, guest: int | None = None) -> None:
        if len(chip_id) != CHIP_ID_SIZE:
            raise ValueError(f"the chip id has {CHIP_ID_SIZE} bytes")
        self._huk = huk
        self._ssk = hmac.digest(huk, chip_id + _SSK_USAGE, "sha256")
        if guest is not None:
            self._ssk = hmac.digest(self._ssk, _GUEST_USAGE + guest.to_bytes(2, "little"), "sha256")
        self._tsks: dict[bytes, AES] = {}

    def _tsk(self, owner: bytes | None) -> AES:
        """Key of a TA, by its UUID as a C structure; None for dirf.db."""
        label = _NO_OWNER if owner is None else owner
        if label not in self._tsks:
            self._tsks[label] = AES(hmac.digest(self._ssk, label, "sha256"))
        return self._tsks[label]

    def decrypt_fek(self, owner: bytes | None, enc_fek: bytes) -> bytes:
        """Key of a file, as it is stored, in clear."""
        return Cipher(self._tsk(owner), ECB()).decryptor().update(enc_fek)

    def encrypt_fek(self, owner: bytes | None, fek: bytes) -> bytes:
        """Key of a file as it is stored."""
        return Cipher(self._tsk(owner), ECB()).encryptor().update(fek)

    def open_file(self, owner: bytes | None, enc_fek: bytes) -> FileCipher:
        """Key of an existing file, from its head."""
        return FileCipher(self.decrypt_fek(owner, enc_fek), enc_fek)

    def new_file(self, owner: bytes | None, fek: bytes) -> FileCipher:
        """Key of a new file, from 16 random bytes."""
        return FileCipher(fek, self.encrypt_fek(owner, fek))

    def open_rpmb_file(self, owner: bytes, enc_fek: bytes) -> RpmbFileCipher:
        """Key of a file in RPMB, from its FAT entry."""
        return RpmbFileCipher(self.decrypt_fek(owner, enc_fek))

    def rpmb_key(self, cid: bytes) -> bytes:
        """Key of the RPMB of the card with this CID: 32 bytes."""
        lasting = bytes(0 if index in _CID_CHANGING else byte for index, byte in enumerate(cid))
        return hmac.digest(self._huk, lasting, "sha256")
