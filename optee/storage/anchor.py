"""The anchor of REE FS: the root hash of dirf.db, kept where the normal world cannot roll it back.

Source: OP-TEE secure storage, section 3 (CFG_REE_FS_INTEGRITY_RPMB).
"""

from __future__ import annotations

from typing import Final

from optee.abi.results import Result
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.layout import HASH_SIZE
from optee.storage.rpmb_fs import RpmbFile, RpmbFs
from optee.threads import Thread

ANCHOR_NAME: Final = "dirfile.db.hash"


class Anchor:
    """A file of 32 bytes in RPMB. Methods raise TeeError, also those of the device.

    allow_reset: CFG_REE_FS_ALLOW_RESET: begin an empty store where there should be a dirf.db and is none.
    """

    def __init__(self, rpmb_fs: RpmbFs, *, allow_reset: bool) -> None:
        self._fs = rpmb_fs
        self._allow_reset = allow_reset
        self._file: RpmbFile

    def read(self, thread: Thread) -> Steps[bytes | None]:
        """Root hash of the only dirf.db that may be opened; None if there has been none yet."""
        try:
            self._file = yield from self._fs.open_raw(thread, ANCHOR_NAME, create=False)
        except TeeError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
            self._file = yield from self._fs.open_raw(thread, ANCHOR_NAME, create=True)
        root_hash = yield from self._fs.read(thread, self._file, 0, HASH_SIZE)
        return root_hash if len(root_hash) == HASH_SIZE else None

    def write(self, thread: Thread, root_hash: bytes) -> Steps[None]:
        """Let this dirf.db be the only one: the moment at which a change of REE FS takes effect."""
        yield from self._fs.write(thread, self._file, 0, root_hash)

    def reset(self, thread: Thread) -> Steps[None]:
        """The anchored dirf.db is gone: forget it, if that is allowed. Raises TeeError(SECURITY)."""
        if not self._allow_reset:
            raise TeeError(Result.SECURITY)
        try:
            yield from self._fs.truncate(thread, self._file, 0)
        except TeeError:
            raise TeeError(Result.SECURITY) from None
