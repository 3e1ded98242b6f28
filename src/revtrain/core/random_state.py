"""Random numbers: dropout inside a function must draw the same mask again when the function is recomputed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RandomState = tuple[Tensor, Tensor | None]


def run_noting_random_state(function: nn.Module, x: Tensor) -> tuple[Tensor, RandomState | None]:
    """function(x), and the state of the generators before it; None where it drew nothing."""
    before = _random_state(x.device)
    result = function(x)
    return result, before if _differs(before, _random_state(x.device)) else None


@contextmanager
def random_state(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Run the block with the random numbers of `state`; leave the generators as they were."""
    if state is None:
        yield
        return
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _differs(a: RandomState, b: RandomState) -> bool:
    # Read the bytes themselves: a tensor operation here would be seen, and refused, under fake tensors.
    pairs = zip(a, b, strict=True)
    return any(x is not None and y is not None and _bytes(x) != _bytes(y) for x, y in pairs)


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.numel())
