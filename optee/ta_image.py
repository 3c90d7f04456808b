"""TA images: the signed files that tee-supplicant serves for LOAD_TA.

Source of the layout: OP-TEE's signed header (shdr). Code cannot travel in them: the model runs the Python
class with the image's UUID, and the payload is a placeholder of the size that the real file has. The
signature is an HMAC with a key of the model, in place of RSA.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from optee.abi.results import Result
from optee.errors import TeeError

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

_HEADER: Final = struct.Struct("<IIIIHH")  # magic, type, payload bytes, algorithm, bytes of hash, of signature
_BOOTSTRAP: Final = struct.Struct("<16sI")  # UUID, version
_MAGIC: Final = 0x4F545348
_BOOTSTRAP_TA: Final = 1
_HMAC_SHA256: Final = 0x30000004  # TEE_ALG_HMAC_SHA256
_DIGEST_SIZE: Final = 32
_KEY: Final = b"signing key of the OP-TEE model"
_OVERHEAD: Final = _HEADER.size + 2 * _DIGEST_SIZE + _BOOTSTRAP.size


def build_image(ta: type[TrustedApplication]) -> bytes:
    """Return the image of a TA, `ta.image_size` bytes in all."""
    payload = f"\x7fELF stands for {ta.__module__}.{ta.__qualname__}".encode()
    payload = payload.ljust(ta.image_size - _OVERHEAD, b"\0")
    header = _HEADER.pack(_MAGIC, _BOOTSTRAP_TA, len(payload), _HMAC_SHA256, _DIGEST_SIZE, _DIGEST_SIZE)
    bootstrap = _BOOTSTRAP.pack(ta.uuid.bytes, ta.version)
    digest = hashlib.sha256(header + bootstrap + payload).digest()
    return header + digest + _sign(digest) + bootstrap + payload


def verify_image(image: bytes, uuid: UUID) -> int:
    """Check an image that was loaded for `uuid` and return its version. Raises TeeError(SECURITY)."""
    if len(image) < _OVERHEAD:
        raise TeeError(Result.SECURITY)
    header = image[: _HEADER.size]
    magic, kind, size, algorithm, hash_size, signature_size = _HEADER.unpack(header)
    digest, signature, bootstrap, payload = (
        image[_HEADER.size : _HEADER.size + 32],
        image[_HEADER.size + 32 : _HEADER.size + 64],
        image[_HEADER.size + 64 : _OVERHEAD],
        image[_OVERHEAD:],
    )
    sound = (magic, kind, algorithm) == (_MAGIC, _BOOTSTRAP_TA, _HMAC_SHA256)
    sound = sound and hash_size == signature_size == _DIGEST_SIZE and size == len(payload)
    sound = sound and hmac.compare_digest(signature, _sign(digest))
    sound = sound and hashlib.sha256(header + bootstrap + payload).digest() == digest
    owner, version = _BOOTSTRAP.unpack(bootstrap)
    if not sound or owner != uuid.bytes:
        raise TeeError(Result.SECURITY)
    return int(version)


def write_images(directory: Path, *tas: type[TrustedApplication]) -> None:
    """Write UUID.ta for each TA into a directory, as tee-supplicant wants to find them."""
    directory.mkdir(parents=True, exist_ok=True)
    for ta in tas:
        (directory / f"{ta.uuid}.ta").write_bytes(build_image(ta))


def _sign(digest: bytes) -> bytes:
    return hmac.digest(_KEY, digest, "sha256")
