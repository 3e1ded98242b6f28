"""channel_statistics: what a batch norm needs to know of its input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import register, runs_kernel
from revtrain.kernels.pieces import MIB, Index, channels_of, is_large, points
from revtrain.kernels.shapes import all_but_channels, per_channel, values_of


class Moments(NamedTuple):
    """Of each channel, (C,), float32 or float64."""

    mean: Tensor
    variance: Tensor  # biased


def channel_statistics(part: Tensor, *, unit: float = 1.0, dtype: torch.dtype, piece_bytes: int) -> Moments:
    """Mean and biased variance of each channel of unit part (B, C, ...), in two passes.

    Args:
        part: floating point or an integer state.
        unit: what one of a part's units is worth: the grid's step for integers.
        dtype: of the result, float32 or float64.
        piece_bytes: bound of the specification's temporaries.
    """
    if runs_kernel(part):
        return Moments(*_operator(part, unit, dtype, piece_bytes))
    compiled = _compiled(part, unit, piece_bytes) if dtype == torch.float32 else None
    return Moments(*(compiled or specification(part, unit, dtype, piece_bytes)))


def _compiled(part: Tensor, unit: float = 1.0, piece_bytes: int = 2 * MIB) -> tuple[Tensor, Tensor] | None:
    """On a CPU, each pass one way through memory; None: not served."""
    if part.is_floating_point():
        if unit != 1 or not cpu_kernels.serves(part):
            return None
        # sums depend on the order of their terms: that of a state, in which everything but a caller's tensor lies
        parts = [part if cpu_kernels.has_rows(part) else part.contiguous()]
    else:
        if is_large(part, piece_bytes) or not cpu_kernels.serves_integers(part):
            return None
        parts = [part[piece] for piece in _pieces(part, torch.float32, piece_bytes)]

    def mean_of(mean: Tensor | None) -> Tensor:
        values = (each if each.is_floating_point() else cpu_kernels.in_float32(each).mul_(unit) for each in parts)
        # of each sample on its own: pieces change no bit
        sums = torch.cat([cpu_kernels.sums(each, mean) for each in values])
        return (sums.sum(0) / (part.numel() // part.shape[1])).to(torch.float32)

    mean = mean_of(None)
    return mean, mean_of(mean)


def specification(part: Tensor, unit: float, dtype: torch.dtype, piece_bytes: int) -> tuple[Tensor, Tensor]:
    """In plain torch: the mean first, then the squares of what is left."""
    others, count = all_but_channels(part), part.numel() // max(1, part.shape[1])
    # The pieces' sums are few and small: adding them in float64 costs nothing (MPS has none).
    wide = torch.float32 if part.device.type == "mps" else torch.float64
    sums, squares = (torch.zeros(part.shape[1], dtype=wide, device=part.device) for _ in range(2))
    for piece in _pieces(part, dtype, piece_bytes):
        sums[channels_of(piece)].add_(values_of(part[piece], unit, dtype).sum(others, dtype=dtype))
    mean = (sums / count).to(dtype)
    for piece in _pieces(part, dtype, piece_bytes):
        own = channels_of(piece)
        centred = values_of(part[piece], unit, dtype) - per_channel(mean[own], part)
        squares[own].add_(centred.square_().sum(others))
    return mean, (squares / count).to(dtype)


def _pieces(part: Tensor, dtype: torch.dtype, piece_bytes: int) -> Iterator[Index]:
    # by the bytes of the temporaries: the part itself may be narrower
    return points(part, max(1, piece_bytes * part.element_size() // dtype.itemsize))


def _fake(part, unit, dtype, piece_bytes):
    return tuple(torch.empty(part.shape[1], dtype=dtype, device=part.device) for _ in range(2))


def _kernel(part, unit, dtype, piece_bytes):
    from revtrain.kernels import triton_kernels

    return triton_kernels.channel_statistics(part, unit, dtype)


_operator = register(
    "channel_statistics(Tensor part, float unit, ScalarType dtype, int piece_bytes) -> (Tensor, Tensor)",
    _fake,
    _kernel,
    launches=2,
)
