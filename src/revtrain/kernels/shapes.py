"""Shapes and types that the operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) as (1, C, 1, ...), with as many dimensions as x (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x (B, C, ...) other than that of the channels."""
    return 0, *range(2, x.dim())


def memory_format_of(x: Tensor, channels_last: bool) -> torch.memory_format:
    """Channels last where that is wanted and x has pixels."""
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    return kinds.get(x.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format


def wide_dtype(*given: Tensor | torch.dtype) -> torch.dtype:
    """In which the arithmetic is done: float64 if any of the given is, else float32."""
    dtypes = [each.dtype if isinstance(each, Tensor) else each for each in given]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def values_of(part: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """unit part in floating point, integers in `dtype`; not to be written to."""
    values = part if part.is_floating_point() else part.to(dtype)
    # sums depend on the order of their terms: that of a state
    values = values if not len(values) or values[0].is_contiguous() else values.contiguous()
    return values if unit == 1 else values * unit


def add_product_(target: Tensor, values: Tensor, factor: Tensor) -> None:
    """target += factor values, in one pass where all are of one precision."""
    if target.dtype == values.dtype:
        target.addcmul_(values, factor.to(values.dtype))
    else:
        target.add_(values * factor)
