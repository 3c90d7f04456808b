"""A TA as far as its memory goes, and the cryptographic set-ups that its sessions hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

from optee.memory import structures
from optee.memory.address_space import FIRST_VA, REGIONS, USER_VA, private_regions
from optee.memory.build import KIB, MIB, up

_RSA: Final = structures.rsa_keypair
_RSA_PUBLIC: Final = structures.rsa_public_key


@cache
def set_ups(bignum_bits: int = 4096) -> Mapping[str, tuple[int, ...]]:
    """What one set-up of each kind allocates of the core's heap: its key objects, its operation, its state.

    Of an RSA key TEE_AllocateOperation makes a copy of its own.
    """
    pair, public = _RSA(bignum_bits), _RSA_PUBLIC(bignum_bits)
    return MappingProxyType(
        {
            "rsa-key": pair,
            "rsa-public-key": public,
            "rsa-operation": (structures.OPERATION, *pair),
            "rsa-sign": (*pair, structures.OPERATION, *pair),
            "rsa-verify": (*public, structures.OPERATION, *public),
            "hash": (structures.OPERATION, structures.HASH_STATE),
            "hmac": (structures.OPERATION, structures.HMAC_STATE),
            "aes-cbc": (structures.OPERATION, structures.CBC_STATE),
            "aes-ctr": (structures.OPERATION, structures.CTR_STATE),
            "aes-gcm": (structures.OPERATION, structures.GCM_STATE),
        }
    )


SET_UPS: Final = tuple(set_ups())


@dataclass(frozen=True, slots=True)
class TaProfile:
    """Sizes in bytes."""

    name: str
    code: int = 0x13000
    """Code and constants, libraries too."""
    stack: int = 2 * KIB
    """TA_STACK_SIZE."""
    heap: int | None = 32 * KIB
    """TA_DATA_SIZE; None asks how large it may be."""
    parameters: tuple[int, ...] = ()
    """Memory references of one call."""
    sessions: int = 1
    """That are open at once in a guest."""
    single_instance: bool = False
    """TA_FLAG_SINGLE_INSTANCE: all sessions share one instance."""
    set_ups: tuple[tuple[str, int], ...] = ()
    """Kind and number of the cryptographic set-ups that each session holds."""

    @property
    def instances(self) -> int:
        """Instances for all the sessions."""
        return min(self.sessions, 1) if self.single_instance else self.sessions

    def regions(self, heap: int | None = None) -> tuple[int, ...]:
        """Sizes of the regions of an instance, with another heap if one is given."""
        chosen = self.heap if heap is None else heap
        return tuple(region.size for region in private_regions(self.stack, self.code, chosen or 0))

    @property
    def own(self) -> int:
        """TA RAM of an instance."""
        return sum(self.regions())

    @property
    def parameter_size(self) -> int:
        """Virtual memory that the parameters of a call take."""
        return sum(map(up, self.parameters))

    @property
    def beside_heap(self) -> int:
        """Virtual memory of an instance beside its heap, parameters included."""
        return FIRST_VA - USER_VA + sum(self.regions(0)) + self.parameter_size

    def instance_heap(self) -> tuple[int, ...]:
        """Allocations of an instance in the core's heap."""
        return structures.ta_context(REGIONS)


_STACK: Final = 30 * MIB + 4 * KIB
_PARAMETERS: Final = 0x54A000  # 5.29 MiB
_REST: Final = 36 * MIB
"""Calibrated on the row of 32 threads of OP-TEE/optee_os #6596: 128 MiB of tables, of which 92 could be had."""
_OWN: Final = FIRST_VA - USER_VA + sum(region.size for region in private_regions(_STACK, 0, 0)) - 4 * KIB

TEST_PROGRAM: Final = TaProfile(
    "test program of #6596",
    code=_REST - _OWN - _PARAMETERS,
    stack=_STACK,
    heap=None,
    parameters=(_PARAMETERS,),
)
"""Needs 36 MiB beside its heap. Stack and parameters are those of a TA of this kind in OP-TEE/optee_os #7077, whose map
holds 35.95 MiB beside the heap; code and libraries are what is left."""

MAP_OF_7077: Final = TaProfile(
    "map of #7077",
    code=0xEBF_9000 - 200 * MIB - _OWN - _PARAMETERS + FIRST_VA - USER_VA,
    stack=_STACK,
    heap=200 * MIB,
    parameters=(_PARAMETERS,),
)
"""The dump in OP-TEE/optee_os #7077: 0xebf9000 bytes from its first region to its last, 200 MiB of heap among them."""

SMALL_TA: Final = TaProfile("small TA")
"""As those of optee_examples."""
