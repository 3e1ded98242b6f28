"""Batch norm and LeakyReLU together, forward in place and back: (y, dy) -> (x, dx) (Eqs. 14, 21, 23, 24).

    z = (x - mean) gain / deviation + bias          y = z where z > 0, slope z elsewhere

slope=1 is a batch norm alone. All tensors are dense (B, C, ...) in the usual order; arithmetic is in float32, or
float64 for float64, whatever the states are kept in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import is_real, register, runs_kernel
from revtrain.kernels.pieces import Index, channels_of, is_large, join, points
from revtrain.kernels.shapes import all_but_channels, per_channel, wide_dtype


def normalise_activate_(
    x: Tensor,
    mean: Tensor,
    deviation: Tensor,
    gain: Tensor,
    bias: Tensor,
    slope: float,
    *,
    with_signs: bool = False,
    piece_bytes: int,
) -> Tensor | None:
    """y of x, in place.

    Args:
        x: (B, C, ...), floating point.
        mean, deviation, gain, bias: (C,), float32 or float64.
        slope: of the LeakyReLU, without unit.
        with_signs: return the signs: a bit for each value in the order of memory, 1 where z is not above zero; eight a
            byte, the lowest bit first, (ceil(n / 8),) uint8; a piece of a sample begins a byte (see `sign_pieces`).
        piece_bytes: bound of the specification's temporaries.
    """
    if runs_kernel(x):
        signs = torch.empty(-(-x.numel() // 8) if with_signs else 0, dtype=torch.uint8, device=x.device)
        _forward(x, mean, deviation, gain, bias, slope, signs)
        return signs if with_signs else None
    if cpu_kernels.serves(x):
        made = torch.empty(-(-x.numel() // 8), dtype=torch.uint8) if with_signs else None
        if cpu_kernels.normalise_activate_(x, mean, gain / deviation, bias, slope, made):
            return made
    packed = []
    for piece in sign_pieces(x, piece_bytes):
        means, deviations, gains, biases = _of(piece, mean, deviation, gain, bias)
        packed.append(forward_specification(x[piece], means, deviations, gains, biases, slope, with_signs))
    return join([each for each in packed if each is not None], -(-x.numel() // 8)) if with_signs else None


def forward_specification(x, mean, deviation, gain, bias, slope, with_signs) -> Tensor | None:
    """In plain torch."""
    z = x if x.dtype == wide_dtype(x) else x.to(wide_dtype(x))
    z = z.sub_(per_channel(mean, x)).mul_(per_channel(gain / deviation, x)).add_(per_channel(bias, x))
    signs = pack_signs(z) if with_signs else None
    y = F.leaky_relu_(z, slope) if slope != 1 else z
    if y is not x:
        x.copy_(y)
    return signs


def norm_activation_sums(
    y: Tensor, dy: Tensor, signs: Tensor | None, gain: Tensor, bias: Tensor, slope: float, *, piece_bytes: int
) -> Tensor:
    """[sum(dz), sum(dz xhat)] over all but the channels, (2, C), float32 or float64.

    Args:
        y, dy: (B, C, ...) each; dy may be of another floating point type.
        signs: of z, as `normalise_activate_` returned them; None: those of y, which are z's but for noise.
    """
    if runs_kernel(y):
        return _sums(y, dy, signs, gain, bias, slope)
    made = cpu_kernels.norm_activation_sums(y, dy, signs, gain, bias, slope)
    if made is not None:
        return made
    sums = torch.zeros(2, y.shape[1], dtype=gain.dtype, device=y.device)
    for piece, own in _with_signs(y, signs, piece_bytes):
        gains, biases = _of(piece, gain, bias)
        sums_specification(sums[:, channels_of(piece)], y[piece], dy[piece], own, gains, biases, slope)
    return sums


def sums_specification(sums, y, dy, signs, gain, bias, slope) -> None:
    """In plain torch: adds to `sums`."""
    others, wide = all_but_channels(y), wide_dtype(y)
    dz = _before_activation_(dy.to(wide, copy=True), y, signs, slope)
    sums[0] += dz.sum(others)
    sums[1] += _normalised_(y.to(wide, copy=True), gain, bias, slope).mul_(dz).sum(others)


def undo_norm_activation_(
    y: Tensor,
    dy: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    gain: Tensor,
    bias: Tensor,
    slope: float,
    sums: Tensor | None,
    count: int,
    *,
    piece_bytes: int,
) -> None:
    """(x, dx) of (y, dy), in place; arguments as above.

    `sums`, of `count` values a channel, is what `norm_activation_sums` returned, of all processes together; None: mean
    and deviation are not the batch's, and no gradient passes through them.
    """
    if runs_kernel(y):
        _undo(y, dy, signs, mean, deviation, gain, bias, slope, sums, count)
        return
    if cpu_kernels.undo_norm_activation_(
        y, dy, signs, mean, deviation, gain, bias, slope, None if sums is None else sums / count
    ):
        return
    for piece, own in _with_signs(y, signs, piece_bytes):
        means, deviations, gains, biases = _of(piece, mean, deviation, gain, bias)
        of_channels = None if sums is None else sums[:, channels_of(piece)]
        undo_specification(y[piece], dy[piece], own, means, deviations, gains, biases, slope, of_channels, count)


def undo_specification(y, dy, signs, mean, deviation, gain, bias, slope, sums, count) -> None:
    """In plain torch; in the memory of y and dy where these are wide enough."""
    wide = wide_dtype(y)
    dz = _before_activation_(dy.to(wide), y, signs, slope)
    xhat = _normalised_(y.to(wide), gain, bias, slope)
    if sums is not None:
        means = sums / count
        dz.addcmul_(xhat, per_channel(means[1], y), value=-1).sub_(per_channel(means[0], y))
    dx = dz.mul_(per_channel(gain / deviation, y))
    x = xhat.mul_(per_channel(deviation, y)).add_(per_channel(mean, y))
    for own, made in ((dy, dx), (y, x)):
        if made is not own:
            own.copy_(made)


def undo_activation_(dy: Tensor, signs: Tensor, slope: float, piece_bytes: int) -> None:
    """dz of dy (B, C, ...), in place, by the signs of z: of a LeakyReLU alone."""
    for piece, own in _with_signs(dy, signs, piece_bytes):
        _before_activation_(dy[piece], dy[piece], own, slope)


def _normalised_(y: Tensor, gain: Tensor, bias: Tensor, slope: float) -> Tensor:
    """xhat of y, in place."""
    z = F.leaky_relu_(y, 1 / slope) if slope != 1 else y
    return z.sub_(per_channel(bias, y)).div_(per_channel(gain, y))


def _before_activation_(dy: Tensor, y: Tensor, signs: Tensor | None, slope: float) -> Tensor:
    """dz of dy, in place."""
    if slope == 1:
        return dy
    if signs is None:
        above = y.to(dy.dtype)
    else:  # 1 where z was above zero, else 0
        above = unpack_signs(signs, y.numel()).view(y.shape).logical_not_().to(dy.dtype)
    return torch.ops.aten.leaky_relu_backward(dy, above, slope, True, grad_input=dy)


# ---- signs, a bit each ---------------------------------------------------------------------------


def sign_pieces(x: Tensor, piece_bytes: int) -> Iterator[Index]:
    """Pieces of x for passes with signs: slices over the batch fill whole bytes of signs, all but the last. Parts of a
    sample begin a byte each."""
    values = max(1, x[0].numel()) if len(x) else 1
    samples = next(n for n in (1, 2, 4, 8) if n * values % 8 == 0)
    piece_values = piece_bytes // wide_dtype(x).itemsize  # by the bytes of the temporaries: x itself may be narrower
    if is_large(x, piece_values * x.element_size()):
        return points(x, piece_values * x.element_size())
    rows = max(1, piece_values // (values * samples)) * samples
    return points(x, rows * values * x.element_size())


def _with_signs(x: Tensor, signs: Tensor | None, piece_bytes: int) -> Iterator[tuple[Index, Tensor | None]]:
    start = 0
    for piece in sign_pieces(x, piece_bytes):
        end = start + -(-x[piece].numel() // 8)
        yield piece, None if signs is None else signs[start:end]
        start = end


def _of(piece: Index, *values: Tensor) -> tuple[Tensor, ...]:
    """Values (C,) of the channels that a piece has."""
    own = channels_of(piece)
    return values if own == slice(None) else tuple(each[own] for each in values)


def pack_signs(z: Tensor) -> Tensor:
    """Where z is not above zero, eight a byte: any shape of n values -> (ceil(n / 8),) uint8."""
    bits = (~(z > 0)).flatten()
    if is_real(z):  # numpy has an operation for it
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    bits = bits.to(torch.uint8)
    return (F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8) << _places(z.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """The first `count` of what `pack_signs` packed, (count,) bool."""
    if is_real(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).view(torch.bool)
    return ((packed[:, None] >> _places(packed.device)) & 1).flatten()[:count].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


# ---- operators -----------------------------------------------------------------------------------


def _forward_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    triton_kernels.normalise_activate_(*arguments)


def _sums_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    return triton_kernels.norm_activation_sums(*arguments)


def _undo_kernel(*arguments):
    from revtrain.kernels import triton_kernels

    triton_kernels.undo_norm_activation_(*arguments)


_forward = register(
    "normalise_activate_(Tensor(a!) x, Tensor mean, Tensor deviation, Tensor gain, Tensor bias, float slope, "
    "Tensor(b!) signs) -> ()",
    lambda *_: None,
    _forward_kernel,
)
_sums = register(
    "norm_activation_sums(Tensor y, Tensor dy, Tensor? signs, Tensor gain, Tensor bias, float slope) -> Tensor",
    lambda y, dy, signs, gain, bias, slope: torch.empty(2, y.shape[1], dtype=gain.dtype, device=y.device),
    _sums_kernel,
    launches=2,
)
_undo = register(
    "undo_norm_activation_(Tensor(a!) y, Tensor(b!) dy, Tensor? signs, Tensor mean, Tensor deviation, Tensor gain, "
    "Tensor bias, float slope, Tensor? sums, int count) -> ()",
    lambda *_: None,
    _undo_kernel,
)
