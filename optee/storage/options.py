"""Options of secure storage's memory. They are ours: a real OP-TEE has none of them and keeps nothing.

Names are those of the build options that such a design would have, so that they can stand in a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final


class StorageMemory(StrEnum):
    """`storage.memory`: who keeps what was read."""

    OPTEE = "optee"
    """Nobody, as in OP-TEE: each access is an RPC."""
    MANAGED = "managed"
    """The memory manager of `optee.storage.memory`."""


_LARGEST: Final = 1 << 20


def _option(name: str, default: int, largest: int = _LARGEST) -> int:
    return field(default=default, metadata={"option": name, "largest": largest})


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Size of each level of the memory manager; 0 switches a level off. Raises ValueError for a size out of range.

    The defaults hold an object of 1 MiB whole, in 1.6 MiB of the core's heap: a smaller block cache keeps nothing
    of an object that is read from end to end again and again, since the least recently used block goes first.
    """

    memory: StorageMemory = StorageMemory.OPTEE
    object_cache_size: int = _option("CFG_TEE_POBJ_CACHE_SIZE", 32)
    """Files, open or closed, whose key, length and counter are kept."""
    block_cache_size: int = _option("CFG_BLOCK_CACHE_SIZE", 320)
    """Blocks of 4 KiB that are kept decrypted."""
    htree_node_count: int = _option("CFG_HTREE_NODE_COUNT", 1024)
    """Nodes of hash trees, of open files and of closed ones."""
    rpmb_fs_cache_entries: int = _option("CFG_RPMB_FS_CACHE_ENTRIES", 16)
    """Blocks of 256 bytes of the RPMB file system."""
    rpc_buffer_count: int = _option("CFG_RPC_BUFFER_COUNT", 2, 64)
    """Payload buffers of the normal world that outlive a call."""
    gc_interval_ms: int = _option("CFG_GC_INTERVAL_MS", 1000)
    """Milliseconds between two collections; 0: under pressure only."""
    gc_memory_threshold: int = _option("CFG_GC_MEMORY_THRESHOLD", 10, 100)
    """Percent of the core's heap that caches leave free; with less the collector runs at once."""
    leak_detection: int = _option("CFG_MEMORY_LEAK_DETECTION", 0, 1)
    """1: note where each piece of memory was allocated."""

    def __post_init__(self) -> None:
        for name, (key, largest) in _NUMBERS.items():
            number = getattr(self, key)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= largest:
                raise ValueError(f"{name} is a number from 0 to {largest}, not {number!r}")

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> StorageOptions:
        """Options by the names that they have in a configuration: `memory`, CFG_... Raises ValueError."""
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name == "memory":
                try:
                    values["memory"] = StorageMemory(str(value))
                except ValueError:
                    known = " or ".join(StorageMemory)
                    raise ValueError(f"memory is {known}, not {value!r}") from None
            elif name in _NUMBERS:
                values[_NUMBERS[name][0]] = value
            else:
                raise ValueError(f"no option is called {name!r}; there are memory, {', '.join(_NUMBERS)}")
        return cls(**values)

    def as_data(self) -> dict[str, int | str]:
        """The same by those names."""
        return {"memory": str(self.memory)} | {name: getattr(self, key) for name, (key, _) in _NUMBERS.items()}


_NUMBERS: Final = {
    each.metadata["option"]: (each.name, each.metadata["largest"])
    for each in fields(StorageOptions)
    if "option" in each.metadata
}

OPTEE: Final = StorageOptions()
"""As a real OP-TEE: no memory manager."""
