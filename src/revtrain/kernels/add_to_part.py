"""add_to_part_: a residual is added to a part of the state, on the grid of its number format."""

from __future__ import annotations

import torch
from torch import Tensor

from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import register, runs_kernel
from revtrain.kernels.pieces import points

_WIDER = {torch.int16: torch.int32, torch.int32: torch.int64}


def add_to_part_(
    part: Tensor,
    residual: Tensor,
    factor: float = 1.0,
    *,
    step: float = 0.0,
    limit: float = 0.0,
    overflows: Tensor | None = None,
    no_numbers: Tensor | None = None,
    piece_bytes: int,
) -> None:
    """part += factor residual, rounded to the grid; in place.

    Args:
        part: (B, C, ...): floating point, or an integer state that counts steps of the grid.
        residual: of the same shape, in any floating point type and memory format.
        factor: the residual's scale, negative to take it off.
        step: of the grid, a power of two; 0: no grid, for a part in floating point.
        limit: of a floating-point grid: sums of a magnitude below it are exact.
        overflows: () int64; to it is added how many sums left the range of the part's type, or reached `limit`.
        no_numbers: () bool; set where a residual for an integer part is not finite or too large to be one: it adds
            nothing, and counts among the overflows.
        piece_bytes: bound of the specification's temporaries.
    """
    if runs_kernel(part):
        _operator(part, residual, factor, step, limit, overflows, no_numbers)
        return
    if cpu_kernels.add_to_part_(part, residual, factor, step, _is_power_of_two(factor), limit, overflows):
        return
    if part.is_floating_point() and not step:
        part.add_(residual, alpha=factor)
        return
    for piece in points(residual, piece_bytes):
        specification(part[piece], residual[piece], factor, step, limit, overflows, no_numbers)


def specification(
    part: Tensor,
    residual: Tensor,
    factor: float,
    step: float,
    limit: float,
    overflows: Tensor | None,
    no_numbers: Tensor | None,
) -> None:
    """In plain torch."""
    if part.is_floating_point() and not step:
        part.add_(residual, alpha=factor)
        return
    wide = residual if residual.dtype == torch.float64 else residual.float()
    scaled = (wide * (factor / step)).round_() if _is_power_of_two(factor) else (wide * factor).mul_(1 / step).round_()
    if part.is_floating_point():
        part.add_(scaled.mul_(step))
        if overflows is not None:
            overflows += torch.logical_not(part.abs() < limit).sum()
        return
    wider = _WIDER[part.dtype]
    beyond = ~(scaled.abs() < torch.iinfo(wider).max / 2)  # or not a number
    if no_numbers is not None:
        no_numbers |= beyond.any()
    total = scaled.masked_fill_(beyond, 0).to(wider).add_(part)
    part.copy_(total)
    if overflows is not None:
        overflows += beyond.logical_or_(total != part).sum()


def _is_power_of_two(factor: float) -> bool:
    """Whether a product with it is exact, so that factor and grid can be one number."""
    from math import frexp

    return abs(frexp(factor)[0]) == 0.5


def _fake(part, residual, factor, step, limit, overflows, no_numbers):
    return None


def _kernel(*arguments):
    from revtrain.kernels import triton_kernels

    triton_kernels.add_to_part_(*arguments)


_operator = register(
    "add_to_part_(Tensor(a!) part, Tensor residual, float factor, float step, float limit, Tensor(b!)? overflows, "
    "Tensor(c!)? no_numbers) -> ()",
    _fake,
    _kernel,
)
