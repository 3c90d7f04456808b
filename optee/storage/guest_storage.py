"""All that OP-TEE keeps of secure storage for one guest.

Source: OP-TEE secure storage, introduction: with virtualization every guest has its own copy of all state, and files
in its own file system; the keys are the machine's. The RPMB device is the machine's too: of several guests that ask for
it only one may be answered, which the mediator sees to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from optee.abi.results import StorageId
from optee.memory.heap import Heap
from optee.storage.anchor import Anchor
from optee.storage.file_system import Storage
from optee.storage.hash_tree import Services
from optee.storage.keys import StorageKeys
from optee.storage.memory.files import CachedFiles
from optee.storage.memory.manager import MemoryManager
from optee.storage.memory.rpmb import CachedRpmb
from optee.storage.options import StorageMemory
from optee.storage.ree_fs import ReeFs
from optee.storage.registry import ObjectRegistry
from optee.storage.rpmb import Rpmb
from optee.storage.rpmb_fs import RpmbFs
from optee.storage.ta_database import TaDatabase
from optee.storage.tree_files import TreeFiles

if TYPE_CHECKING:
    from optee.config import Config

_MANAGED: Final = StorageMemory.MANAGED


class GuestStorage:
    """What each storage id stands for, and the core's own files."""

    def __init__(self, config: Config, random: Callable[[int], bytes], heap: Heap, guest: int) -> None:
        keys = StorageKeys(config.huk, config.chip_id, guest if config.guest_storage_keys else None)
        self.memory = MemoryManager(config.storage, heap, guest) if config.storage.memory is _MANAGED else None
        """What keeps files in the core's heap; None as in OP-TEE."""
        self.storages: dict[int, Storage] = {}
        anchor = None
        if config.rpmb_fs:
            rpmb_fs = RpmbFs(self._device(keys, random, config.rpmb_write_key), keys, random)
            self.storages[StorageId.PRIVATE_RPMB] = Storage(rpmb_fs, ObjectRegistry(heap, guest))
            if config.is_anchored:
                anchor = Anchor(rpmb_fs, allow_reset=config.ree_fs_allow_reset)
        services = Services(keys, random, heap, guest)
        files = TreeFiles(services) if self.memory is None else CachedFiles(services, self.memory)
        ree_fs = ReeFs(files, anchor)
        ree = Storage(ree_fs, ObjectRegistry(heap, guest))
        self.storages |= {StorageId.PRIVATE: ree, StorageId.PRIVATE_REE: ree}
        self.ta_database = TaDatabase(ree_fs)

    def _device(self, keys: StorageKeys, random: Callable[[int], bytes], write_key: bool) -> Rpmb:
        if self.memory is None:
            return Rpmb(keys, random, write_key=write_key)
        return CachedRpmb(keys, random, self.memory.rpmb, write_key=write_key)
