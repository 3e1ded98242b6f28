"""read_part: a part of the state becomes the input of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import register, runs_kernel
from revtrain.kernels.shapes import memory_format_of, per_channel, wide_dtype


def read_part(
    part: Tensor,
    dtype: torch.dtype,
    *,
    unit: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    """u = unit part scale + shift: a dense tensor of its own.

    Args:
        part: (B, C, ...), floating point or an integer state.
        dtype: of the result.
        unit: what one of a part's units is worth: the grid's step for integers, a residual scale for gradients.
        scale, shift: (C,) each, float32 or float64, of a normalisation; both or none.
        channels_last: the memory format of the result, for (B, C, H, W) and (B, C, D, H, W).

    The arithmetic is in float32, or in float64 where `dtype` or the part is; `dtype` is rounded to at the end.
    """
    if runs_kernel(part):
        return _operator(part, scale, shift, unit, dtype, channels_last)
    u = cpu_kernels.read_part(part, scale, shift, unit, dtype, channels_last)
    return specification(part, scale, shift, unit, dtype, channels_last) if u is None else u


def specification(
    part: Tensor, scale: Tensor | None, shift: Tensor | None, unit: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """In plain torch."""
    memory_format = memory_format_of(part, channels_last)
    # a product with a power of two is exact in 16 bit, too, but whole numbers of 32 bit have no place there
    direct = scale is None and (dtype.itemsize >= 4 or part.dtype in (dtype, torch.int16) or unit == 1)
    u = part.to(dtype if direct else wide_dtype(part, dtype), copy=True, memory_format=memory_format)
    if unit != 1:
        u.mul_(unit)
    if scale is not None and shift is not None:
        torch.addcmul(per_channel(shift, u), u, per_channel(scale, u), out=u)
    return u.to(dtype)


def _fake(part, scale, shift, unit, dtype, channels_last):
    return torch.empty(part.shape, dtype=dtype, device=part.device, memory_format=memory_format_of(part, channels_last))


def _kernel(*arguments):
    from revtrain.kernels import triton_kernels

    return triton_kernels.read_part(*arguments)


_operator = register(
    "read_part(Tensor part, Tensor? scale, Tensor? shift, float unit, ScalarType dtype, bool channels_last) -> Tensor",
    _fake,
    _kernel,
)
