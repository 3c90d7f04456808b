"""Where a tee-supplicant keeps OP-TEE's files: a real directory, or memory.

OP-TEE names files like "/dirf.db" and "/1a", in the guest's own file system. A name is a path below the
root and nothing else: no part may be "..", and no link is followed.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

MAX_FILE_SIZE: Final = 1 << 26
"""Bytes of one file in memory: a made-up offset must not make the guest's process huge."""

_NAME_END: Final = b"\0"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def path_parts(name: bytes) -> tuple[str, ...]:
    """Return the parts of a zero-terminated name.

    Raises OSError (EINVAL) for a name without end, without parts, not in UTF-8, or with a part "..".
    """
    text, end, _ = name.partition(_NAME_END)
    try:
        parts = tuple(part for part in text.decode().split("/") if part not in ("", "."))
    except UnicodeDecodeError:
        parts = ()
    if not end or not parts or ".." in parts:
        raise OSError(errno.EINVAL, f"not a file name: {text!r}")
    return parts


class OpenFile(Protocol):
    """A file that was opened or created."""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes, fewer at the end of the file."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`."""
        ...

    def truncate(self, size: int) -> None:
        """Cut the file, or lengthen it with zeroes."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Files(Protocol):
    """A tree of files; every method raises OSError as the system call of its name does."""

    def open(self, parts: Sequence[str], *, create: bool) -> OpenFile:
        """Open a file; with `create` make it, or empty it, and the directories above it."""
        ...

    def remove(self, parts: Sequence[str]) -> None:
        """Remove a file, and directories above it that are empty then."""
        ...

    def rename(self, old: Sequence[str], new: Sequence[str], *, overwrite: bool) -> None:
        """Rename a file; FileExistsError if `new` is there already, unless told to overwrite it."""
        ...

    def list(self, parts: Sequence[str]) -> Sequence[str]:
        """Return the names in a directory, sorted."""
        ...


class _DirectoryFile:
    """A file of the host, by descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        os.close(self._descriptor)


class DirectoryFiles:
    """Files below a directory of the host, which is made if it does not exist.

    Every part of a path is opened on its own, relative to its parent and without following links.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def _enter(self, parts: Sequence[str], *, create: bool = False) -> int:
        """Open a directory below the root; its descriptor is the caller's to close."""
        current = os.open(self._root, _DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        for part in parts:
            try:
                if create:
                    _make_directory(part, current)
                following = os.open(part, _DIRECTORY_FLAGS, dir_fd=current)
            finally:
                os.close(current)
            current = following
        return current

    def open(self, parts: Sequence[str], *, create: bool) -> OpenFile:
        """Open a file, or make it; see `Files`."""
        flags = _FILE_FLAGS | os.O_CREAT | os.O_TRUNC if create else _FILE_FLAGS
        directory = self._enter(parts[:-1], create=create)
        try:
            return _DirectoryFile(os.open(parts[-1], flags, 0o600, dir_fd=directory))
        finally:
            os.close(directory)

    def remove(self, parts: Sequence[str]) -> None:
        """Remove a file; see `Files`."""
        directory = self._enter(parts[:-1])
        try:
            os.unlink(parts[-1], dir_fd=directory)
        finally:
            os.close(directory)
        for depth in range(len(parts) - 1, 0, -1):
            if self.list(parts[:depth]):
                break
            above = self._enter(parts[: depth - 1])
            try:
                os.rmdir(parts[depth - 1], dir_fd=above)
            finally:
                os.close(above)

    def rename(self, old: Sequence[str], new: Sequence[str], *, overwrite: bool) -> None:
        """Rename a file; see `Files`."""
        source = self._enter(old[:-1])
        try:
            target = self._enter(new[:-1], create=True)
            try:
                if not overwrite and new[-1] in _names(target):
                    raise FileExistsError(errno.EEXIST, "file exists", new[-1])
                os.rename(old[-1], new[-1], src_dir_fd=source, dst_dir_fd=target)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def list(self, parts: Sequence[str]) -> Sequence[str]:
        """List a directory; see `Files`."""
        directory = self._enter(parts)
        try:
            return _names(directory)
        finally:
            os.close(directory)


def _names(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries)


def _make_directory(name: str, parent: int) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return


class _MemoryFile:
    """A file that is a byte array; it outlives its removal while it is open, as a file does."""

    def __init__(self, content: bytearray) -> None:
        self._content = content

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self._lengthen(offset + len(data))
        self._content[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        self._lengthen(size)
        del self._content[size:]

    def _lengthen(self, size: int) -> None:
        if size > MAX_FILE_SIZE:
            raise OSError(errno.EFBIG, "file too large")
        self._content.extend(bytes(max(0, size - len(self._content))))

    def close(self) -> None:
        pass


class MemoryFiles:
    """Files in memory, gone with the guest; `content` maps a path's parts to the bytes."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, ...], bytearray] = {}

    def open(self, parts: Sequence[str], *, create: bool) -> OpenFile:
        """Open a file, or make it; see `Files`."""
        path = tuple(parts)
        if create:
            self.content[path] = bytearray()
        return _MemoryFile(self._find(path))

    def _find(self, path: tuple[str, ...]) -> bytearray:
        if path not in self.content:
            raise FileNotFoundError(errno.ENOENT, "no such file", "/".join(path))
        return self.content[path]

    def remove(self, parts: Sequence[str]) -> None:
        """Remove a file; see `Files`."""
        self._find(tuple(parts))
        del self.content[tuple(parts)]

    def rename(self, old: Sequence[str], new: Sequence[str], *, overwrite: bool) -> None:
        """Rename a file; see `Files`."""
        source = self._find(tuple(old))
        if tuple(new) in self.content and not overwrite:
            raise FileExistsError(errno.EEXIST, "file exists", "/".join(new))
        del self.content[tuple(old)]
        self.content[tuple(new)] = source

    def list(self, parts: Sequence[str]) -> Sequence[str]:
        """List a directory; see `Files`."""
        depth, path = len(parts), tuple(parts)
        names = {key[depth] for key in self.content if len(key) > depth and key[:depth] == path}
        if not names:
            raise FileNotFoundError(errno.ENOENT, "no such directory", "/".join(parts))
        return sorted(names)
