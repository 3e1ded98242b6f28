"""What the commands share: exit codes, a terminal that cannot stop them, and the ends that need no traceback."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from revtrain.errors import RevtrainError
from revtrain.machine.files import told

DONE, MENDABLE, INTERRUPTED = 0, 2, 130
CODING = "PYTHONIOENCODING"  # of the standard streams of processes that are started


class Enduring(io.TextIOWrapper):
    """A standard stream that never fails: what its encoding lacks is written as an escape, and what nobody reads any
    more (`| head -1`, a closed terminal) or no disk can take goes nowhere. `lost` is the first error."""

    lost: OSError | None = None

    def __init__(self, buffer: Any, encoding: str | None, line_buffering: bool = True):
        super().__init__(buffer, encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        """Leave the stream below open: it is not ours."""
        with suppress(ValueError):
            self.flush()
            self.detach()

    def _lose(self, error: OSError) -> None:
        if self.lost is None:
            self.lost = error
            with suppress(OSError):  # what is still buffered, and what C libraries print, goes there, too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


@contextmanager
def enduring_streams() -> Iterator[None]:
    """Standard output and error as `Enduring`, for as long as this lasts, here and in the processes started here."""
    _open_standard_descriptors()
    before, coding = (sys.stdout, sys.stderr), os.environ.get(CODING)
    streams = [_enduring(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    if sys.stdout.encoding:
        os.environ[CODING] = f"{sys.stdout.encoding}:backslashreplace"
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
        os.environ.pop(CODING, None)
        if coding is not None:
            os.environ[CODING] = coding


def _open_standard_descriptors() -> None:
    """Open /dev/null where a descriptor of 0 to 2 is closed: the next file, a checkpoint perhaps, would get that number
    and with it whatever a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(opened, True)  # as standard streams are: the processes of a sweep need them, too


def _enduring(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when Python started
        return Enduring(open(os.devnull, "wb"), "utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # of a notebook, say
        return stream
    stream.flush()
    return Enduring(stream.buffer, stream.encoding, stream.line_buffering)


def guarded(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """The exit code of `command` with the words `argv`; an error that the user can mend is told in its own words."""
    with enduring_streams():
        try:
            code = command(parser.parse_args(argv))
            sys.stdout.flush()
        except RevtrainError as error:
            print(error, file=sys.stderr)
            return MENDABLE
        except OSError as error:
            print(told(error), file=sys.stderr)
            return MENDABLE
        except KeyboardInterrupt:
            return INTERRUPTED
        lost = getattr(sys.stdout, "lost", None)
        if lost is not None and lost.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):  # nobody stopped reading
            print(f"The output could not be written: {lost.strerror}.\nSend it elsewhere.", file=sys.stderr)
            return MENDABLE
        return code
