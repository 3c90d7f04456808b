"""acipher of optee_examples: generates an RSA key and encrypts with it (PKCS#1 v1.5).

Keys and padding are computed here and not by a library, because everything random in the model has to come
from its seed, which libraries for good reason do not offer. Nothing here is fit to protect anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import gcd
from uuid import UUID

from optee.abi.results import Result
from optee.set_ups import SetUp
from optee.tee import Tee
from optee.trusted_application import (
    WORK,
    Memref,
    ParamKind,
    Params,
    Steps,
    TeeError,
    TrustedApplication,
    Value,
    command,
)

_EXPONENT = 65537
_SMALLEST, _LARGEST = 256, 4096  # bits of a modulus that OP-TEE takes
_PADDING = 11  # bytes of PKCS#1 v1.5 padding, at least
_SMALL_PRIMES = [n for n in range(3, 2000, 2) if all(n % m for m in range(3, int(n**0.5) + 1, 2))]
_PORTIONS = 4  # of work that a prime from the list takes
_ROUNDS = 8  # of Miller and Rabin's test


@dataclass(frozen=True)
class RsaKey:
    """A key pair."""

    modulus: int
    private_exponent: int
    memory: SetUp

    @property
    def size(self) -> int:
        """Bytes of the modulus."""
        return (self.modulus.bit_length() + 7) // 8


class Acipher(TrustedApplication):
    """GEN_KEY and ENCRYPT, per session."""

    uuid = UUID("a734eed9-d6a1-4244-aa50-7c99719e7b7b")

    def open_session(self, tee: Tee, params: Params) -> None:
        """Start without a key."""
        tee.context = None

    def close_session(self, tee: Tee) -> None:
        """Free the key."""
        if tee.context is not None:
            tee.context.memory.free()

    @command(0, ParamKind.VALUE_INPUT)
    def generate_key(self, tee: Tee, size: Value) -> Steps[None]:
        """Make a key of so many bits: long work, interrupts come in."""
        if not _SMALLEST <= size.a <= _LARGEST:
            raise TeeError(Result.NOT_SUPPORTED)
        self.close_session(tee)
        tee.context = None
        memory = tee.set_up("rsa-key")
        yield from tee.lock_scratch_pool()
        while True:
            first = yield from _prime(tee, (size.a + 1) // 2)
            second = yield from _prime(tee, size.a // 2)
            totient = (first - 1) * (second - 1)
            modulus = first * second
            if first != second and gcd(totient, _EXPONENT) == 1 and modulus.bit_length() == size.a:
                break
        tee.context = RsaKey(modulus, pow(_EXPONENT, -1, totient), memory)
        yield from tee.unlock_scratch_pool()

    @command(1, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_OUTPUT)
    def encrypt(self, tee: Tee, source: Memref, target: Memref) -> Steps[None]:
        """Encrypt what fits one block; a target too short learns the size of the modulus."""
        key = tee.context
        if not isinstance(key, RsaKey):
            raise TeeError(Result.BAD_STATE)
        if target.capacity < key.size:
            target.size = key.size
            raise TeeError(Result.SHORT_BUFFER)
        plain = source.read()
        if len(plain) > key.size - _PADDING:
            raise TeeError(Result.BAD_PARAMETERS)
        operation = tee.set_up("rsa-operation")
        yield from tee.lock_scratch_pool()
        target.put(self._encrypted(tee, key, plain))
        yield from tee.unlock_scratch_pool()
        operation.free()

    @staticmethod
    def _encrypted(tee: Tee, key: RsaKey, plain: bytes) -> bytes:
        filling = bytes(byte % 255 + 1 for byte in tee.random(key.size - len(plain) - 3))
        block = b"\0\2" + filling + b"\0" + plain
        cipher = pow(int.from_bytes(block, "big"), _EXPONENT, key.modulus)
        return cipher.to_bytes(key.size, "big")


@cache
def _listed_primes() -> Mapping[int, Sequence[int]]:
    """The primes that are shipped, by their bits."""
    text = resources.files("optee.tas").joinpath("rsa_primes.txt").read_text(encoding="ascii")
    primes: dict[int, list[int]] = {}
    for line in text.split():
        prime = int(line, 16)
        primes.setdefault(prime.bit_length(), []).append(prime)
    return primes


def _prime(tee: Tee, bits: int) -> Steps[int]:
    """A prime of so many bits with its two highest bits set."""
    listed = _listed_primes().get(bits) if tee.thread.partition.world.config.listed_primes else None
    if listed is not None:
        yield from tee.work(_PORTIONS)
        return listed[tee.random(1)[0] % len(listed)]
    while True:
        candidate = int.from_bytes(tee.random((bits + 7) // 8), "big") & ((1 << bits) - 1)
        candidate |= 3 << (bits - 2) | 1
        if all(candidate % prime for prime in _SMALL_PRIMES):
            yield WORK
            if _is_prime(tee, candidate):
                return candidate


def _is_prime(tee: Tee, candidate: int) -> bool:
    odd = candidate - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    for _ in range(_ROUNDS):
        base = int.from_bytes(tee.random(8), "big") % (candidate - 3) + 2
        power = pow(base, odd, candidate)
        if power in (1, candidate - 1):
            continue
        for _ in range(twos - 1):
            power = pow(power, 2, candidate)
            if power == candidate - 1:
                break
        else:
            return False
    return True
