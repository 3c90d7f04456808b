"""What keeps the files of persistent objects: one storage id, one file system, one registry of open objects.

Source: OP-TEE secure storage, section 1 (the file operations behind tee_pobj).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from optee.steps import Steps
from optee.storage.registry import ObjectRegistry

if TYPE_CHECKING:
    from optee.threads import Thread


class OpenFile(Protocol):
    """A file of a file system that is open."""

    @property
    def length(self) -> int:
        """Bytes of content."""
        ...


F = TypeVar("F", bound=OpenFile)
D = TypeVar("D")


class FileSystem(Protocol[F, D]):
    """Files of type F and enumerations of type D. Every method raises TeeError.

    Objects are named by their owner (a UUID as a C structure) and their id. A change is committed when its method
    returns, and a power cut leaves the object wholly old or wholly new.
    """

    def open(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[F]:
        """Open an object. ITEM_NOT_FOUND, CORRUPT_OBJECT."""
        ...

    def create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[F]:
        """Create an object of these contents. ACCESS_CONFLICT if it is there already, unless `overwrite`."""
        ...

    def close(self, thread: Thread, file: F) -> Steps[None]:
        """Close an object."""
        ...

    def read(self, thread: Thread, file: F, offset: int, size: int) -> Steps[bytes]:
        """Read up to `size` bytes."""
        ...

    def write(self, thread: Thread, file: F, offset: int, data: bytes) -> Steps[None]:
        """Write; a gap behind the end is filled with zeroes."""
        ...

    def truncate(self, thread: Thread, file: F, length: int) -> Steps[None]:
        """Shorten, or lengthen with zeroes."""
        ...

    def rename(self, thread: Thread, owner: bytes, old: bytes, new: bytes) -> Steps[None]:
        """Give an object another id. ACCESS_CONFLICT if that is taken."""
        ...

    def remove(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[None]:
        """Remove an object, by its id."""
        ...

    def open_directory(self, thread: Thread, owner: bytes) -> Steps[D]:
        """Begin an enumeration. ITEM_NOT_FOUND if there is no object."""
        ...

    def read_directory(self, thread: Thread, opened: D) -> Steps[bytes | None]:
        """Id of the next object; None at the end."""
        ...

    def close_directory(self, thread: Thread, opened: D) -> Steps[None]:
        """End an enumeration."""
        ...


class Storage(NamedTuple):
    """What a storage id stands for."""

    fs: FileSystem[Any, Any]
    registry: ObjectRegistry
