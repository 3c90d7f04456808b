"""Boards as OP-TEE's own platform configurations describe them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from optee.memory.build import KIB, MIB, Build


@dataclass(frozen=True, slots=True)
class Board:
    """A preset, and where its numbers come from."""

    name: str
    build: Build
    source: str


BOARDS: Final = MappingProxyType(
    {
        board.name: board
        for board in (
            Board(
                "qemu_armv8a",
                Build(threads=2, heap=192 * KIB, nexus_heap=31776, secure_ram=15 * MIB),
                "a build for QEMU (vexpress-qemu_armv8a, CFG_NS_VIRTUALIZATION=y), measured; its nexus heap of 16 KiB "
                "holds 31776 bytes because of alignment",
            ),
            Board(
                "hikey",
                Build(heap=72 * KIB, secure_ram=16 * MIB, cores=8),
                "core/arch/arm/plat-hikey/conf.mk; heap: memory sizing reference",
            ),
            Board(
                "hikey960",
                Build(heap=72 * KIB, secure_ram=16 * MIB, cores=8, best_fit=True),
                "core/arch/arm/plat-hikey/conf.mk (CFG_CORE_BGET_BESTFIT=y); heap as hikey's",
            ),
            Board(
                "rk3399",
                Build(threads=4, secure_ram=32 * MIB, cores=6),
                "core/arch/arm/plat-rockchip/conf.mk; heap: mk/config.mk",
            ),
            Board(
                "rk322x",
                Build(threads=4, secure_ram=2 * MIB, tee_ram=MIB, lpae=False, virtualization=False),
                "core/arch/arm/plat-rockchip/conf.mk; heap: mk/config.mk; 1 MiB for the core without LPAE",
            ),
        )
    }
)
