"""The two files that OP-TEE's core itself keeps: the TA database, and the versions of loaded TAs.

Source: OP-TEE secure storage, section 6; recordings of hello_world. Both are looked into whenever a TA is loaded.
"""

from __future__ import annotations

import struct
from typing import Any, Final
from uuid import UUID

from optee.abi.results import Result
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.file_system import FileSystem, OpenFile
from optee.storage.layout import CORE_OWNER
from optee.threads import Thread
from optee.wait_queue import Mutex, while_locked

TA_DATABASE: Final = b"ta.db\0"
TA_VERSIONS: Final = b"ta_ver.db\0"

_HEADER: Final = struct.Struct("<II")  # version of the format, entries
_VERSION: Final = struct.Struct("<16sI")  # UUID in the order of its text, version of the TA


class TaDatabase:
    """What loading a TA needs of secure storage, for one guest. Methods raise TeeError."""

    def __init__(self, fs: FileSystem[Any, Any]) -> None:
        self._fs = fs
        self._database_mutex = Mutex()  # tadb_mutex
        self._versions_mutex = Mutex()  # ver_db_mutex

    def look_for_ta(self, thread: Thread) -> Steps[None]:
        """Open and close the TA database, which is always empty here."""
        return while_locked(self._database_mutex, thread, self._look_for_ta(thread))

    def check_version(self, thread: Thread, uuid: UUID, version: int) -> Steps[None]:
        """Note a loaded TA's version; an older one than before is refused: ACCESS_CONFLICT."""
        return while_locked(self._versions_mutex, thread, self._check_version(thread, uuid, version))

    def _look_for_ta(self, thread: Thread) -> Steps[None]:
        database, _ = yield from self._open_or_create(thread, TA_DATABASE, b"")
        yield from self._fs.close(thread, database)

    def _check_version(self, thread: Thread, uuid: UUID, version: int) -> Steps[None]:
        versions, created = yield from self._open_or_create(thread, TA_VERSIONS, _HEADER.pack(0, 0))
        try:
            yield from self._update(thread, versions, created, uuid, version)
        except TeeError:
            yield from self._fs.close(thread, versions)
            raise
        yield from self._fs.close(thread, versions)

    def _update(self, thread: Thread, versions: OpenFile, created: bool, uuid: UUID, version: int) -> Steps[None]:
        count = 0
        if not created:
            _, count = yield from self._read(thread, versions, 0, _HEADER)
        place = _HEADER.size
        for _ in range(count):
            ta, newest = yield from self._read(thread, versions, place, _VERSION)
            if ta == uuid.bytes:
                if version < newest:
                    raise TeeError(Result.ACCESS_CONFLICT)
                if version > newest:
                    yield from self._fs.write(thread, versions, place, _VERSION.pack(uuid.bytes, version))
                return
            place += _VERSION.size
        yield from self._fs.write(thread, versions, place, _VERSION.pack(uuid.bytes, version))
        yield from self._fs.write(thread, versions, 0, _HEADER.pack(0, count + 1))

    def _read(self, thread: Thread, file: OpenFile, offset: int, layout: struct.Struct) -> Steps[tuple[bytes, int]]:
        data = yield from self._fs.read(thread, file, offset, layout.size)
        if len(data) < layout.size:
            raise TeeError(Result.CORRUPT_OBJECT)
        first, second = layout.unpack(data)
        return first, second

    def _open_or_create(self, thread: Thread, name: bytes, content: bytes) -> Steps[tuple[OpenFile, bool]]:
        """Open a file, and tell whether it had to be created."""
        try:
            return (yield from self._fs.open(thread, CORE_OWNER, name)), False
        except TeeError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
        return (yield from self._fs.create(thread, CORE_OWNER, name, (content,), overwrite=False)), True
