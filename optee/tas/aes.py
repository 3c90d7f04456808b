"""aes of optee_examples: AES in ECB, CBC and CTR mode, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, CTR, ECB

from optee.abi.results import Result
from optee.set_ups import SetUp
from optee.tee import Tee
from optee.trusted_application import (
    Memref,
    ParamKind,
    Params,
    TeeError,
    TrustedApplication,
    Value,
    command,
)

_ECB, _CBC, _CTR = range(3)
_DECODE, _ENCODE = range(2)
_KEY_SIZES = (16, 32)
_IV_SIZE = 16


@dataclass
class _Operation:
    """The state of one session: PREPARE sets the first three, SET_KEY the key, SET_IV starts the cipher."""

    algorithm: int
    key_size: int
    mode: int
    key: bytes
    memory: SetUp
    cipher: CipherContext | None = None


class Aes(TrustedApplication):
    """PREPARE, SET_KEY, SET_IV and CIPHER, in this order, per session."""

    uuid = UUID("5dbac793-f574-4871-8ad3-04331ec17f24")

    def open_session(self, tee: Tee, params: Params) -> None:
        """Start with nothing prepared."""
        tee.context = None

    def close_session(self, tee: Tee) -> None:
        """Free what PREPARE has set up."""
        if tee.context is not None:
            tee.context.memory.free()

    @command(0, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT)
    def prepare(self, tee: Tee, algorithm: Value, key_size: Value, mode: Value) -> None:
        """Choose algorithm (0 ECB, 1 CBC, 2 CTR), key size in bytes, and mode (1 encode, 0 decode)."""
        if algorithm.a not in (_ECB, _CBC, _CTR) or key_size.a not in _KEY_SIZES or mode.a not in (_DECODE, _ENCODE):
            raise TeeError(Result.BAD_PARAMETERS)
        self.close_session(tee)
        tee.context = None
        memory = tee.set_up("aes-ctr" if algorithm.a == _CTR else "aes-cbc")
        tee.context = _Operation(algorithm.a, key_size.a, mode.a, bytes(key_size.a), memory)

    @command(1, ParamKind.MEMREF_INPUT)
    def set_key(self, tee: Tee, key: Memref) -> None:
        """Load a key of exactly the size that was prepared."""
        operation = self._operation(tee)
        if key.size != operation.key_size:
            raise TeeError(Result.BAD_PARAMETERS)
        operation.key = key.read()
        operation.cipher = None

    @command(2, ParamKind.MEMREF_INPUT)
    def set_iv(self, tee: Tee, iv: Memref) -> None:
        """Start the cipher with this IV (ignored for ECB). A wrong size panics, as TEE_CipherInit does."""
        operation = self._operation(tee)
        mode: ECB | CBC | CTR = ECB()
        if operation.algorithm != _ECB:
            if iv.size != _IV_SIZE:
                tee.panic(Result.BAD_PARAMETERS)
            mode = CBC(iv.read()) if operation.algorithm == _CBC else CTR(iv.read())
        cipher = Cipher(AES(operation.key), mode)
        operation.cipher = cipher.encryptor() if operation.mode == _ENCODE else cipher.decryptor()

    @command(3, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_OUTPUT)
    def cipher(self, tee: Tee, source: Memref, target: Memref) -> None:
        """Encode or decode; the cipher goes on where it stopped. Panics if SET_IV has not started it."""
        if target.size < source.size:
            raise TeeError(Result.BAD_PARAMETERS)
        operation = self._operation(tee)
        if operation.cipher is None:
            tee.panic(Result.BAD_STATE)
        target.put(operation.cipher.update(source.read()))

    @staticmethod
    def _operation(tee: Tee) -> _Operation:
        """What PREPARE has set up. Raises TeeError(BAD_STATE) without it."""
        operation = tee.context
        if not isinstance(operation, _Operation):
            raise TeeError(Result.BAD_STATE)
        return operation
