"""Writing files that are either whole or not there, into a folder that one process has to itself."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from revtrain.errors import RevtrainError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, content: bytes, keep: Path | None = None) -> None:
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
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it against other processes; a lock that leaves no file and ends with the process.

    Raises:
        RevtrainError: another process holds it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RevtrainError(
                f"{folder}: another run is writing there right now; nothing of it was changed.\n"
                "Choose another folder, or leave hydra.run.dir out: each run then gets a new one."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
