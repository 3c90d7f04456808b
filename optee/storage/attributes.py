"""Types of objects, and attributes of keys as they stand in an object's file.

Source: GP TEE Internal Core API, object types and attributes; OP-TEE secure storage, section 6: each attribute of the
type, in the order of its table, is a length (u32, big endian) and that many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

DATA_TYPE: Final = 0xA00000BF
USAGE_ALL: Final = 0xFFFFFFFF

_LENGTH_SIZE: Final = 4
_SECRET: Final = ("secret value",)
_RSA_PUBLIC: Final = ("modulus", "public exponent")
_RSA_KEY_PAIR: Final = (
    *_RSA_PUBLIC,
    "private exponent",
    "prime 1",
    "prime 2",
    "exponent 1",
    "exponent 2",
    "coefficient",
)

OBJECT_TYPES: Final[dict[int, tuple[str, tuple[str, ...]]]] = {
    DATA_TYPE: ("data", ()),
    0xA0000000: ("generic secret", _SECRET),
    0xA0000001: ("HMAC-MD5", _SECRET),
    0xA0000002: ("HMAC-SHA1", _SECRET),
    0xA0000003: ("HMAC-SHA224", _SECRET),
    0xA0000004: ("HMAC-SHA256", _SECRET),
    0xA0000005: ("HMAC-SHA384", _SECRET),
    0xA0000006: ("HMAC-SHA512", _SECRET),
    0xA0000010: ("AES", _SECRET),
    0xA0000030: ("RSA public key", _RSA_PUBLIC),
    0xA1000030: ("RSA key pair", _RSA_KEY_PAIR),
}
"""Name and attributes of each type whose attributes are byte strings or big numbers."""


def type_name(object_type: int) -> str:
    """Name of a type; its number where it has none here."""
    known = OBJECT_TYPES.get(object_type)
    return known[0] if known is not None else f"{object_type:#010x}"


def pack_attributes(values: Sequence[bytes]) -> bytes:
    """Serialize the attributes of a type, in its table's order; one that is not there is empty."""
    return b"".join(len(value).to_bytes(_LENGTH_SIZE, "big") + value for value in values)


def unpack_attributes(data: bytes) -> list[bytes]:
    """Attributes in the order of the type's table. Raises ValueError if the lengths do not fit."""
    values = []
    while data:
        size = int.from_bytes(data[:_LENGTH_SIZE], "big")
        value, data = data[_LENGTH_SIZE : _LENGTH_SIZE + size], data[_LENGTH_SIZE + size :]
        if len(value) != size:
            raise ValueError("attributes do not fit their lengths")
        values.append(value)
    return values
