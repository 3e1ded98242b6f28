"""Signals that ask a process to end: a scheduler or a spot machine will kill it soon, or its terminal closes.

SIGTERM is what most send; SIGUSR1, SIGUSR2 and SIGXCPU are warnings of SLURM, Grid Engine and others before their time
limits; SIGHUP comes when the terminal is closed. All are treated alike. One that is ignored already, as SIGHUP under
nohup, stays ignored, and one that a host program has taken stays with that.

`Terminated` is a `KeyboardInterrupt`: everything that lets Ctrl-C through, as Hydra's sweeps do, lets it through.
Within `watching` it is raised at once, wherever the program is. Within `deferred` the program asks for it
(`asked`) where its state is whole, saves, and raises it itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by the signal `number`."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """As a shell reports the end by this signal."""
        return 128 + self.number


_asked: int | None = None  # the signal that came first
_deferring = False


def asked() -> bool:
    """Whether a signal has come since `watching` was entered."""
    return _asked is not None


def terminated() -> Terminated:
    """What to raise after the signal that has come; SIGTERM where another process has got it."""
    return Terminated(_asked or signal.SIGTERM)


@contextmanager
def watching() -> Iterator[None]:
    """Turn the signals into `Terminated`, for as long as this lasts.

    Outside of the main thread nothing is done; within another `watching` only one thing:

    Raises:
        Terminated: a signal came, and was noted only, before this was entered.
    """
    global _asked
    outside = threading.current_thread() is not threading.main_thread()
    if outside or signal.getsignal(signal.SIGTERM) is _handle:
        if _asked is not None:
            raise terminated()
        yield
        return
    _asked = None
    taken = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    free = [each for each in taken if each == signal.SIGTERM or signal.getsignal(each) == signal.SIG_DFL]
    before = {each: signal.signal(each, _handle) for each in free}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Only note the signals, for as long as this lasts."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def _handle(number: int, frame: Any) -> None:
    global _asked
    if _asked is None:
        _asked = number
    if number == getattr(signal, "SIGHUP", None):
        _leave_dead_terminal()
    if not _deferring:
        raise Terminated(number)


def _leave_dead_terminal() -> None:
    """What is said to a terminal that was closed goes nowhere, in the place of an error in the middle of saving."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
