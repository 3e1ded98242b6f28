"""Writing files that are either whole or not there, into a folder that one process has to itself."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a run's folder: held by the process that works there
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Replace `path` by `content` in one step; on any error the old file stays as it was.

    Args:
        path: the file.
        content: what it will hold.
        keep: a second name that the old file keeps, if there is one.

    Raises:
        OSError: the disk is full, the folder is not writable.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        if keep is not None and path.exists():
            _name_also(path, keep)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _name_also(path: Path, keep: Path) -> None:
    """Put the file `path` at `keep`, too; at each moment at least one of the two exists."""
    with suppress(FileNotFoundError):
        os.unlink(keep)
    try:
        os.link(path, keep)
    except OSError:  # a file system without hard links
        os.replace(path, keep)


@contextmanager
def claim(path: Path, patience_seconds: float = 0) -> Iterator[bool]:
    """Hold a lock file; False where another process holds it, also after `patience_seconds` (negative: for ever).

    The system lets go of it however the process ends; the file stays. On a network file system this needs `flock`,
    which NFS has since version 3 and Lustre with `-o flock`.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, timeout=patience_seconds)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
