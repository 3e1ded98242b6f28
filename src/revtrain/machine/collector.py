"""Python's garbage collector, kept from what was there before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unburdened_collector() -> Iterator[None]:
    """Inside, the collector looks at new objects alone: it would walk over all of torch, time and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
