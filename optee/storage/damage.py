"""What can be wrong with a file of secure storage, said in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """A part that is not what the live state needs."""

    file: str
    part: str
    """Such as "head slot 1", "node 3 version 0", "block 2 version 1", "entry 7", "file"."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.part}: {self.reason}"


class DamagedError(Exception):
    """What was asked for cannot be had because of the damage."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage
