"""hotp of optee_examples: HMAC-based one-time passwords (RFC 4226), six digits."""

from __future__ import annotations

import hmac
from uuid import UUID

from optee.abi.results import Result
from optee.tee import Tee
from optee.trusted_application import (
    Memref,
    ParamKind,
    Params,
    TeeError,
    TrustedApplication,
    Value,
    command,
    expect,
)

_MIN_KEY_SIZE = 10
_MAX_KEY_SIZE = 64
_MODULO = 1_000_000


class Hotp(TrustedApplication):
    """REGISTER_SHARED_KEY and GET_HOTP; key and counter belong to the instance."""

    uuid = UUID("484d4143-2d53-4841-3120-4a6f636b6542")

    def __init__(self) -> None:
        self._key = b""
        self._counter = 0

    def open_session(self, tee: Tee, params: Params) -> None:
        """Take no parameters."""
        expect(params)

    @command(0, ParamKind.MEMREF_INPUT)
    def register_shared_key(self, tee: Tee, key: Memref) -> None:
        """Keep a key of at most 64 bytes."""
        if key.size > _MAX_KEY_SIZE:
            raise TeeError(Result.BAD_PARAMETERS)
        self._key = key.read()

    @command(1, ParamKind.VALUE_OUTPUT)
    def get_hotp(self, tee: Tee, password: Value) -> None:
        """Compute the password of the counter, then count."""
        if not _MIN_KEY_SIZE <= len(self._key) <= _MAX_KEY_SIZE:
            raise TeeError(Result.BAD_PARAMETERS)
        digest = hmac.digest(self._key, self._counter.to_bytes(8, "big"), "sha1")
        self._counter += 1
        offset = digest[-1] & 0xF
        password.a = (int.from_bytes(digest[offset : offset + 4], "big") & 0x7FFF_FFFF) % _MODULO
