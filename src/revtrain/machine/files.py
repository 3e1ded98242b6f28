"""Writing files that are either whole or not there, into a folder that one process has to itself.

What not every file system can do (sync, lock, give a file a second name) is done where it can be; where it cannot, the
program goes on and says once what is less safe. Files get the rights that the user's umask leaves.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import FileLock, Timeout

from revtrain.errors import RevtrainError, printable

LOCK = ".lock"  # in a run's folder: held by the process that works there
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of fsync and flock

log = logging.getLogger(__name__)
_said: set[str] = set()


# ---- places ------------------------------------------------------------------------------------------------


def place(path: str | Path, key: str) -> Path:
    """The path with `~` and `~user` resolved; `key` is how it was given, as in "data.root".

    Raises:
        RevtrainError: there is no such user, or no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = str(path).split(os.sep)[0]
        raise RevtrainError(
            f"{key}={printable(path)} was given; the home directory of {printable(user)} is not known here.\n"
            "Give the folder without ~, from its root on."
        ) from error


def working_folder() -> Path:
    """Where this process is.

    Raises:
        RevtrainError: that folder was deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise RevtrainError(
            "The working folder, where this was started, does not exist any more.\nChange to one that does: cd FOLDER."
        ) from error


# ---- what the system refused -------------------------------------------------------------------------------


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an error of the system carry the name of the file that it is about: a write, for one, knows a number only."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def refused(error: OSError) -> str:
    """What the system refused, on one line: `/a/b: Permission denied`."""
    why = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return printable(why)
    name = f"file descriptor {error.filename}" if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"{printable(name)}: {printable(why)}"


ADVICE = {
    errno.EACCES: "Give yourself the right to it, or choose another file or folder.",
    errno.EPERM: "Give yourself the right to it, or choose another file or folder.",
    errno.EROFS: "Choose another folder, on a disk that can be written to.",
    errno.ENOENT: "It is not there, or not there any more: put it in place, or choose another file or folder.",
    errno.ENOTDIR: "Something on the way to it is a file: choose another folder.",
    errno.EISDIR: "It is a folder: name a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "A link on the way to it leads to itself: mend the link.",
    errno.EMFILE: "Too many files are open: allow more of them, as in ulimit -n 4096.",
    errno.ENFILE: "Too many files are open on this machine: close some programs.",
    errno.ENOMEM: "The machine has no memory left: close some programs, or take a smaller batch.",
    errno.EIO: "The disk or the network failed: look at the system's log before you go on.",
    errno.ESTALE: "The network disk forgot this file: mount it anew, then run the same command again.",
    **dict.fromkeys(DISK_FULL, "The disk is full: make room, then run the same command again."),
}


def told(error: OSError) -> str:
    """Two or three lines for an error of the system that nothing nearer to it has explained."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            working_folder()
        except RevtrainError as reason:
            return str(reason)
    lines = [f"The system refused: {refused(error)}."]
    if error.filename is None:
        lines.append(f"It did not say which file; {_origin(error)} was at work.")
    lines.append(ADVICE.get(error.errno or 0, "Mend that, then run the same command again."))
    return "\n".join(lines)


def _origin(error: BaseException) -> str:
    """The innermost of our own lines that an error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "revtrain" in frame.filename]
    if not frames:
        return "another library"
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno},"


def is_about(error: OSError, folder: Path) -> bool:
    """Whether an error of the system is about this folder, something in it, or a folder on the way to it. It is, too,
    where a full disk did not say which file it could not take: nothing else is written for long."""
    if not isinstance(error.filename, str | bytes):
        return error.errno in DISK_FULL
    at = Path(os.path.abspath(os.fsdecode(error.filename)))
    return at == folder or at in folder.parents or folder in at.parents


def is_folder(path: Path) -> bool:
    """Whether this is a folder.

    Raises:
        RevtrainError: the system does not let us see it.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RevtrainError(told(error)) from error


def _less_safe(what: str, error: BaseException | str) -> None:
    """Say once in this process what the file system cannot do."""
    if what not in _said:
        _said.add(what)
        log.warning("files      %s (%s)", what, refused(error) if isinstance(error, OSError) else error)


# ---- writing -----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write into; when the block ends it takes the place of `path` in one step. On any error the old file
    stays as it was.

    Args:
        path: the file.
        keep: a second name that the old file keeps, if there is one.

    Raises:
        OSError: the disk is full, the folder is not writable; it names `path`.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        with naming(path):
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                sync(file)
            if keep is not None and path.exists():
                _name_also(path, keep)
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename = os.fspath(path)
        raise


def write_atomic(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Replace `path` by `content` in one step, as `replacing` does."""
    with replacing(path, keep) as file:
        file.write(content)


def write_result_file(path: Path, content: bytes) -> None:
    """Write what a command was asked to write: in one step where `path` is a file or nothing yet, into it where it is a
    pipe or a device (/dev/stdout, /dev/null), which must not be replaced; where it is a link, to what that leads to.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_bytes(content)
    else:
        write_atomic(path.resolve(), content)


def sync(file: IO[Any]) -> None:
    """Wait until the disk has what was written, where the file system can say so.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        _less_safe("this file system cannot sync: after a power cut the newest files may be damaged", error)


def _name_also(path: Path, keep: Path) -> None:
    """Put the file `path` at `keep`, too; at each moment at least one of the two exists."""
    with suppress(FileNotFoundError):
        os.unlink(keep)
    try:
        os.link(path, keep)
    except OSError:  # a file system without hard links
        os.replace(path, keep)


# ---- one process a folder ----------------------------------------------------------------------------------


@contextmanager
def claim(path: Path, patience_seconds: float = 0) -> Iterator[bool]:
    """Hold a lock file; False where another process holds it, also after `patience_seconds` (negative: for ever).

    The system lets go of it however the process ends; the file stays. On a network file system this needs `flock`,
    which NFS has since version 3 and Lustre with `-o flock`; without, nothing is held and that is said.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, timeout=patience_seconds)
    try:
        with naming(path), warnings.catch_warnings(record=True) as said:
            lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        _less_safe("this file system has no locks: start no two runs in one folder", error)
        yield True
        return
    if said:  # filelock found a way of its own
        _less_safe("this file system has no flock: start no two runs in one folder", str(said[0].message))
    try:
        yield True
    finally:
        lock.release()
