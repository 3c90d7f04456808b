"""Hardware random number pseudo TA: the device that enumeration announces to Linux."""

from __future__ import annotations

from uuid import UUID

from optee.abi.results import TaFlag
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, PseudoTa, Value, command

_BYTES_PER_SECOND = 1_000_000
_QUALITY = 1024  # bits of entropy per 1024 bits


class RandomNumberGenerator(PseudoTa):
    """GET_ENTROPY and GET_RNG_INFO."""

    uuid = UUID("ab7a617c-b8e7-4d8f-8301-d09b61036b64")
    flags = PseudoTa.flags | TaFlag.DEVICE_ENUM

    @command(0, ParamKind.MEMREF_INOUT)
    def get_entropy(self, tee: Tee, entropy: Memref) -> None:
        """Fill the buffer."""
        entropy.put(tee.random(entropy.capacity))

    @command(1, ParamKind.VALUE_OUTPUT)
    def get_info(self, tee: Tee, info: Value) -> None:
        """Rate in bytes per second and quality."""
        info.a, info.b = _BYTES_PER_SECOND, _QUALITY
