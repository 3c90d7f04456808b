"""All that OP-TEE keeps of secure storage for one guest.

Source: OP-TEE secure storage, introduction: with virtualization every guest has its own copy of all state, and files
in its own file system; the keys are the machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from optee.memory.heap import Heap
from optee.storage.hash_tree import Services
from optee.storage.keys import StorageKeys
from optee.storage.ree_fs import ReeFs
from optee.storage.registry import ObjectRegistry
from optee.storage.ta_database import TaDatabase
from optee.storage.tree_files import TreeFiles

if TYPE_CHECKING:
    from optee.config import Config


class GuestStorage:
    """File system, registry of open objects, and the core's own files."""

    def __init__(self, config: Config, random: Callable[[int], bytes], heap: Heap, guest: int) -> None:
        services = Services(StorageKeys(config.huk, config.chip_id), random, heap, guest)
        self.ree_fs = ReeFs(TreeFiles(services))
        self.registry = ObjectRegistry()
        self.ta_database = TaDatabase(self.ree_fs)
