"""Number types of a pass: autocast as it was, the caller's 16 bit, and values that are no numbers.

A chain's states are in float32 at least, since their sums have to be undone. What F and G read is in the type that the
caller's own tensors have, as in plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)


@dataclass
class Pass:
    """What is known of the pass that a chain is in: the caller's type, and whether any value was no number."""

    dtype: torch.dtype
    no_numbers: Tensor | None = None  # () boolean; None: nobody asks
    observed: bool = False  # an observer measures what the inverse gives: it is not refused
    noise: float = 0.0  # the largest that was seen of what was rebuilt so far, relative

    def saw(self, noise: float) -> float:
        """The largest noise so far, this one included. A sample of a few values may agree by chance; many hardly do."""
        self.noise = max(self.noise, noise)
        return self.noise


_current: ContextVar[Pass | None] = ContextVar("current_pass", default=None)


@contextmanager
def pass_of(dtype: torch.dtype, no_numbers: Tensor | None = None, observed: bool = False) -> Iterator[None]:
    """The block is a pass of a chain that was given `dtype`; integer states set the flag `no_numbers`."""
    token = _current.set(Pass(dtype, no_numbers, observed))
    try:
        yield
    finally:
        _current.reset(token)


def current_pass() -> Pass | None:
    """The pass of the innermost chain that this thread is in."""
    return _current.get()


def read_dtype(x: Tensor) -> torch.dtype:
    """In what type a function of the user's reads x, a part of a state in floating point.

    In 16 bit if the caller's tensor is, as is the chain's result. Not under autocast, which narrows x where it should.
    """
    current = _current.get()
    if current is None or current.dtype not in NARROW or autocast_dtype(x.device.type) is not None:
        return x.dtype
    return current.dtype


# ---- autocast ------------------------------------------------------------------------------------


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast uses on this kind of device now; None where it is off, or unknown there (meta)."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_as_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Enters the present autocast state again, later.

    Its cache stays off: a weight cast without a graph in one pass must not be found where a graph is wanted in another.
    """
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)
