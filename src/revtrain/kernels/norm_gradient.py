"""The gradient of a batch norm in front of a function, in two passes over the part that it reads.

With x = unit part, du the gradient of u = BN(x), xhat the normalised x, N values a channel, scale = gamma / deviation,

    dx = scale du  -  scale (sum(du) + xhat sum(du xhat)) / N

Piece by piece, `add_norm_gradient_` adds the first part and gathers the sums; `add_norm_rest_` follows.
"""

from __future__ import annotations

from torch import Tensor

from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import register, runs_kernel
from revtrain.kernels.pieces import channels_of, points
from revtrain.kernels.shapes import add_product_, all_but_channels, per_channel, values_of


def add_norm_gradient_(
    dpart: Tensor, du: Tensor, part: Tensor, mean: Tensor, scale: Tensor, sums: Tensor | None, *, unit: float = 1.0
) -> Tensor:
    """dpart += scale du; returns `sums`, with [sum(du), sum(du (x - mean))] added.

    Args:
        dpart: (B, C, ...), the gradient of the part, floating point.
        du: of the same shape, in any floating point type and memory format.
        part: of the same shape, floating point or an integer state.
        mean, scale: (C,), float32 or float64.
        sums: (2, C), of the same type, of the pieces so far; None: this is the first.
        unit: what one of a part's units is worth.
    """
    if not runs_kernel(part) and unit == 1:
        made = cpu_kernels.add_norm_gradient_(dpart, du, part, mean, scale)
        if made is not None:
            return made if sums is None else sums.add_(made)
    adds = sums is not None
    sums = sums if sums is not None else mean.new_empty(2, len(mean))
    form = _gradient if runs_kernel(part) else gradient_specification
    form(dpart, du, part, mean, scale, sums, adds, unit)
    return sums


def gradient_specification(dpart, du, part, mean, scale, sums, adds, unit) -> None:
    """In plain torch; without `adds`, what is in `sums` is overwritten."""
    if not adds:
        sums.zero_()
    du, others = du.contiguous(), all_but_channels(du)
    sums[0] += du.sum(others, dtype=sums.dtype)
    centred = values_of(part, unit, sums.dtype) - per_channel(mean, part)
    sums[1] += centred.mul_(du).sum(others)
    add_product_(dpart, du, per_channel(scale, part))


def add_norm_rest_(
    dpart: Tensor,
    part: Tensor,
    mean: Tensor,
    deviation: Tensor,
    scale: Tensor,
    sums: Tensor,
    count: int,
    *,
    unit: float = 1.0,
    piece_bytes: int,
) -> None:
    """dpart -= scale (sums[0] + (x - mean) / deviation^2 sums[1]) / count; arguments as above."""
    if runs_kernel(part):
        _rest(dpart, part, mean, deviation, scale, sums, count, unit)
        return
    slope, shift = rest_line(mean, deviation, scale, sums, count)
    if unit == 1 and cpu_kernels.add_norm_rest_(dpart, part, slope, shift):
        return
    for piece in points(part, piece_bytes):
        own = channels_of(piece)
        rest_specification(dpart[piece], part[piece], slope[own], shift[own], unit)


def split_sums(sums: Tensor, *, factor: Tensor | None = None, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sums[0], sums[1] factor / divisor): the gradients of bias and weight, (C,), each a tensor of its own."""
    return (_split if runs_kernel(sums) else split_specification)(sums, factor, divisor)


def split_specification(sums: Tensor, factor: Tensor | None, divisor: Tensor | None) -> tuple[Tensor, Tensor]:
    """In plain torch."""
    second = sums[1].clone() if factor is None else sums[1] * factor
    return sums[0].clone(), second if divisor is None else second.div_(divisor)


def rest_line(mean, deviation, scale, sums, count) -> tuple[Tensor, Tensor]:
    """(slope, shift), (C,) each: what is taken off is slope x + shift."""
    slope = scale * sums[1] / (count * deviation.square())
    return slope, scale * sums[0] / count - slope * mean


def rest_specification(dpart, part, slope, shift, unit) -> None:
    """In plain torch."""
    add_product_(dpart, values_of(part, unit, slope.dtype), per_channel(-slope, part))
    dpart.sub_(per_channel(shift, part))


def _gradient_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    triton_kernels.add_norm_gradient_(*arguments)


def _rest_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    triton_kernels.add_norm_rest_(*arguments)


def _split_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    return triton_kernels.split_sums(*arguments)


_split = register(
    "split_sums(Tensor sums, Tensor? factor, Tensor? divisor) -> (Tensor, Tensor)",
    lambda sums, *_: (sums.new_empty(sums.shape[1]), sums.new_empty(sums.shape[1])),
    _split_kernel,
)
_gradient = register(
    "add_norm_gradient_(Tensor(a!) dpart, Tensor du, Tensor part, Tensor mean, Tensor scale, Tensor(b!) sums, "
    "bool adds, float unit) -> ()",
    lambda *_: None,
    _gradient_kernel,
    launches=2,
)
_rest = register(
    "add_norm_rest_(Tensor(a!) dpart, Tensor part, Tensor mean, Tensor deviation, Tensor scale, Tensor sums, "
    "int count, float unit) -> ()",
    lambda *_: None,
    _rest_kernel,
)
