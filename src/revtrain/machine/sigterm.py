"""SIGTERM: the word of a scheduler or a spot machine that the process will be killed in a few seconds.

`Terminated` is a `KeyboardInterrupt`: everything that lets Ctrl-C through, as Hydra's sweeps do, lets it through.
Within `watching` it is raised at once, wherever the program is. Within `deferred` the program asks for it
(`asked`) where its state is whole, saves, and raises it itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from revtrain.machine import torchrun


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


_asked = False
_deferring = False


def asked() -> bool:
    """Whether SIGTERM has come since `watching` was entered."""
    return _asked


@contextmanager
def watching() -> Iterator[None]:
    """Turn SIGTERM into `Terminated`, for as long as this lasts.

    Under torchrun, which ends all processes when one has failed, and outside of the main thread nothing is done; within
    another `watching` only one thing:

    Raises:
        Terminated: SIGTERM came, and was noted only, before this was entered.
    """
    global _asked
    outside = torchrun.size() > 1 or threading.current_thread() is not threading.main_thread()
    if outside or signal.getsignal(signal.SIGTERM) is _handle:
        if _asked:
            raise Terminated
        yield
        return
    _asked = False
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Only note SIGTERM, for as long as this lasts."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def _handle(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    if not _deferring:
        raise Terminated
