"""The coupling in hidden chunks: wide residual functions of which a few hidden channels are alive at a time.

F = conv -> BN -> activation -> conv mixes channels only at its two ends: a hidden channel depends on all of
the input but on no other hidden channel, and the output is a sum over hidden channels. So both passes run
in chunks of k hidden channels, with the batch normalisation of each over the whole batch:

    forward    z = conv1_k(x);  a = act(BN(z));  target += s conv2_k(a)
    backward   z, a again;      target -= s conv2_k(a);  da, dW2 from s dtarget;  du = act'(u) da
               dz = BN backward of du, over the whole batch;  dsource += conv1_k^T dz, dW1

Alive besides the two states: z and du of one chunk, 2 k values a pixel. The cost is one more forward pass in
all, as in any reversible block, since a chunk's reconstruction and its gradient share it. No layer
inside F is inverted, so there is no noise of such inverses, and the activation may be any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.hooks import has_hooks
from revtrain.core.names import former_names
from revtrain.core.precision import autocast_dtype
from revtrain.core.recompute import is_rewritten
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import Piece, channels_of, join, pieces, points, rounds
from revtrain.layers.batchnorm import statistics_dtype
from revtrain.layers.collective import all_sum, processes
from revtrain.layers.coupling import AdditiveCoupling
from revtrain.layers.moments import moments
from revtrain.layers.norm_pieces import (
    count_batch,
    running_statistics,
    runs_over_pieces,
    stand_in_statistics,
    update_running_statistics,
)
from revtrain.layers.residual_pass import ResidualPass, ResidualSum

REACH = (1,)  # of each convolution, in pixels
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
}


class Activation(nn.Module):
    """One of `ACTIVATIONS` by name, element by element; `inplace` where that is possible.

    Raises `RevtrainError` for an unknown name.
    """

    draws_nothing = True  # random numbers
    reach = 0  # it looks at no neighbours

    def __init__(self, name: str = "relu", inplace: bool = False):
        super().__init__()
        if name not in ACTIVATIONS:
            raise RevtrainError(f"activation={name} is unknown.\nExpected one of: {', '.join(ACTIVATIONS)}.")
        self.name, self.inplace = name, inplace

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x) if self.inplace and self.name == "relu" else ACTIVATIONS[self.name](x)


class WideResidual(nn.Module):
    """conv3x3 -> BN -> activation -> conv3x3, (B, C, H, W) -> (B, C, H, W) through `hidden` channels.

    An ordinary module; `HiddenChunkCoupling` runs it in chunks of hidden channels.
    Raises `RevtrainError` for an unknown activation.
    """

    def __init__(self, channels: int, hidden: int, activation: str = "relu"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.activation = Activation(activation)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.norm(self.conv1(x))))


class HiddenChunkCoupling(AdditiveCoupling):
    """Coupling of two `WideResidual`s, x (B, C, H, W) -> (B, C, H, W), C even.

    Args:
        channels: C; each half has C / 2.
        hidden: hidden channels of F and of G; wide costs time, not memory.
        hidden_chunk: k, hidden channels alive at a time in the backward pass (2 k values a pixel).
        activation: relu, gelu, silu or leaky_relu.
        scale, state_format: see `AdditiveCoupling`. On a grid, the contribution of each chunk is rounded on its own.

    Raises `RevtrainError` for odd channels, fewer than one hidden channel or an unknown activation.
    """

    @former_names(stream="state_format")
    def __init__(
        self,
        channels: int,
        hidden: int,
        hidden_chunk: int = 2,
        activation: str = "relu",
        scale: float = 1.0,
        state_format: StateFormat = PLAIN,
    ):
        if hidden < 1 or hidden_chunk < 1:
            raise RevtrainError(
                f"hidden={hidden}, hidden_chunk={hidden_chunk} leave no hidden channel.\nExpected 1 or more of each."
            )
        half = max(1, channels // 2)
        f, g = (WideResidual(half, hidden, activation) for _ in range(2))
        super().__init__(channels, f, g, scale=scale, state_format=state_format)
        self.hidden_chunk = hidden_chunk

    def _pass_through(self, which: str, x: Tensor, context: tuple[Tensor, ...] = (), saved: Any = None) -> ResidualPass:
        function = getattr(self, which)
        if not (_runs_in_chunks(function) if saved is None else isinstance(saved, _Statistics)):
            return super()._pass_through(which, x, context, saved)
        overflows = getattr(self, "overflows", None)
        return _HiddenChunksPass(
            cast(WideResidual, function), self.residual_sum, self.hidden_chunk, self.piece_bytes, overflows
        )


def _runs_in_chunks(function: nn.Module) -> bool:
    """Whether nothing is attached to a `WideResidual` or its parts, so that its weights say all."""
    if type(function) is not WideResidual or "forward" in vars(function) or not runs_over_pieces(function.norm):
        return False
    rewritten = is_rewritten(function.norm, "weight", "bias") or any(
        is_rewritten(each, "weight") for each in (function.conv1, function.conv2)
    )
    parts = [part for part in function.modules() if not isinstance(part, nn.BatchNorm2d)]
    return not rewritten and not any(has_hooks(part) for part in parts)


class _Statistics(NamedTuple):
    """Of the hidden channels, kept from the first pass; shapes (1, hidden, 1, 1)."""

    mean: Tensor
    inverse_deviation: Tensor
    of_batch: bool


class _HiddenChunksPass(ResidualPass):
    """`target` +/- s F(`source`), a few hidden channels at a time; other temporaries hold a piece of the batch."""

    function: WideResidual

    def __init__(
        self,
        function: WideResidual,
        residual_sum: ResidualSum,
        hidden_chunk: int,
        piece_bytes: int,
        overflows: Tensor | None = None,
    ):
        super().__init__(function, residual_sum, piece_bytes, overflows)
        self.group = getattr(function.norm, "group", None)  # the processes that share the batch
        self.hidden = hidden = function.conv1.out_channels
        self.chunks = [slice(k, min(k + hidden_chunk, hidden)) for k in range(0, hidden, hidden_chunk)]

    def add_(self, source: Tensor, target: Tensor) -> _Statistics:
        norm = self.function.norm
        if not norm.training:
            mean, variance = running_statistics(norm)
            saved = _Statistics(_per_channel(mean.clone()), _per_channel((variance + norm.eps).rsqrt()), False)
            self.recompute_(source, target, saved, sign=1)
            return saved
        count_batch(norm)
        means, inverse_deviations = [], []
        for k in rounds(self.chunks):
            z = self._hidden(source, k)
            mean, variance = map(_per_channel, moments(z, 1.0, statistics_dtype(z), self.piece_bytes, self.group))
            statistics = _Statistics(mean, (variance + norm.eps).rsqrt(), True)
            update_running_statistics(norm, mean.flatten(), variance.flatten(), _count(z, self.group), k)
            self._add_output(z, target, k, statistics, 1, self.overflows)
            means.append(mean)
            inverse_deviations.append(statistics.inverse_deviation)
        return _Statistics(join(means, self.hidden, 1), join(inverse_deviations, self.hidden, 1), True)

    def recompute_(self, source: Tensor, target: Tensor, saved: _Statistics, sign: int) -> None:
        for k in rounds(self.chunks):
            self._add_output(self._hidden(source, k), target, k, _of(saved, k), sign)

    def stand_in(self, source: Tensor) -> _Statistics:
        norm = self.function.norm
        mean, deviation, *_ = stand_in_statistics(norm, self.name)
        return _Statistics(_per_channel(mean), _per_channel(deviation.reciprocal()), False)

    def undo_(self, source, target, dsource, dtarget, saved, grads: Gradients) -> None:
        gamma, dgamma = self.function.norm.weight, torch.empty_like(self.function.norm.weight)
        dbeta = torch.empty_like(gamma)
        dweight1 = torch.zeros_like(self.function.conv1.weight)
        dweight2 = torch.zeros_like(self.function.conv2.weight)
        for k in rounds(self.chunks):
            statistics = _of(saved, k)
            z, du = self._undo_output(source, target, dtarget, k, statistics, dweight2)
            s1, s2 = _sums(z, du, statistics, self.piece_bytes)
            dbeta[k], dgamma[k] = s1.flatten().to(dbeta.dtype), s2.flatten().to(dgamma.dtype)
            s1, s2 = all_sum(torch.stack([s1, s2]), self.group)
            self._undo_hidden(source, dsource, z, du, k, statistics, s1, s2, dweight1)
            del z, du
        for parameter, gradient in (
            (self.function.conv1.weight, dweight1),
            (gamma, dgamma),
            (self.function.norm.bias, dbeta),
            (self.function.conv2.weight, dweight2),
        ):
            grads.add(parameter, gradient)

    def _hidden(self, source: Tensor, k: slice) -> Tensor:
        """z = conv1_k(source): (B, k, H, W), in the precision that the convolution computes in."""
        b, _, h, w = source.shape
        weight = self.function.conv1.weight[k]
        z = weight.new_empty((b, weight.shape[0], h, w), dtype=_compute_dtype(weight))
        for piece in self._pieces(source):
            z[piece.own] = piece.crop(F.conv2d(self.read(source[piece.read]), weight, padding=1))
        return z

    def _pieces(self, part: Tensor) -> Iterator[Piece]:
        return pieces(part, self.piece_bytes, REACH)

    def _activated(self, z: Tensor, k: slice, statistics: _Statistics) -> Tensor:
        return self.function.activation(self._normalised(z, k, statistics))

    def _normalised(self, z: Tensor, k: slice, statistics: _Statistics) -> Tensor:
        """u = gamma (z - mean) / deviation + beta of a few hidden channels, in the precision of z."""
        gamma, beta = _per_channel(self.function.norm.weight[k]), _per_channel(self.function.norm.bias[k])
        u = (z - statistics.mean).mul_(statistics.inverse_deviation * gamma).add_(beta)
        return u.to(z.dtype)

    def _add_output(self, z, target, k: slice, statistics: _Statistics, sign: int, overflows=None) -> None:
        weight = self.function.conv2.weight[:, k]
        for piece in self._pieces(target):
            residual = F.conv2d(self._activated(z[piece.read], k, statistics), weight, padding=1)
            self.residual_sum.add_(target[piece.own], piece.crop(residual), sign, self.piece_bytes, overflows)

    def _undo_output(self, source, target, dtarget, k, statistics, dweight2) -> tuple[Tensor, Tensor]:
        """Take the chunk's contribution off `target`; (z, du), and the gradient of conv2's weights."""
        weight = self.function.conv2.weight[:, k].detach()
        z = self._hidden(source, k)
        du = torch.zeros_like(z)
        for piece in self._pieces(target):
            u = self._normalised(z[piece.read], k, statistics).requires_grad_()
            with torch.enable_grad():
                a = self.function.activation(u)
            held = a.detach()
            residual = piece.crop(F.conv2d(held, weight, padding=1))
            self.residual_sum.add_(target[piece.own], residual, -1, self.piece_bytes)
            dresidual = piece.pad(dtarget[piece.own] * self.residual_sum.scale)
            da, dweight = _conv_backward(dresidual, held, weight)
            du[piece.read] += torch.autograd.grad(a, u, da.to(a.dtype))[0]  # halos overlap
            dweight2[:, k] += dweight
        return z, du

    def _undo_hidden(self, source, dsource, z, du, k, statistics, s1, s2, dweight1) -> None:
        """dz from du through the whole batch's statistics; then the gradients of conv1."""
        weight = self.function.conv1.weight[k].detach()
        gain = _per_channel(self.function.norm.weight[k].detach()) * statistics.inverse_deviation
        count = _count(z, self.group)
        for piece in self._pieces(source):
            dz = du[piece.own] * gain
            if statistics.of_batch:
                zhat = (z[piece.own] - statistics.mean).mul_(statistics.inverse_deviation)
                dz = dz.sub_(zhat.mul_(s2 / count).add_(s1 / count).mul_(gain))
            dx, dweight = _conv_backward(piece.pad(dz), self.read(source[piece.read]), weight)
            dsource[piece.read].add_(dx)
            dweight1[k] += dweight


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _of(saved: _Statistics, k: slice) -> _Statistics:
    return _Statistics(saved.mean[:, k], saved.inverse_deviation[:, k], saved.of_batch)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` returns under the present autocast state."""
    return autocast_dtype(x.device.type) or x.dtype


def _conv_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of the padded 3x3 convolution y = weight * x; autocast does not reach this operation."""
    dtype = _compute_dtype(x)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy.to(dtype), x.to(dtype), weight.to(dtype), None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    return dx, dweight


def _count(z: Tensor, group: Any) -> int:
    """Values a channel, in all processes."""
    return z.numel() // z.shape[1] * processes(group)


def _sums(z: Tensor, du: Tensor, statistics: _Statistics, piece_bytes: int) -> tuple[Tensor, Tensor]:
    """(sum of du, sum of du zhat) over B, H, W: the gradients of beta and gamma, (1, k, 1, 1) each."""
    s1, s2 = torch.zeros_like(statistics.mean), torch.zeros_like(statistics.mean)
    for index in points(du, piece_bytes):
        own = channels_of(index)
        s1[:, own] += du[index].sum((0, 2, 3), keepdim=True, dtype=s1.dtype)
        zhat = (z[index] - statistics.mean[:, own]).mul_(statistics.inverse_deviation[:, own])
        s2[:, own] += zhat.mul_(du[index]).sum((0, 2, 3), keepdim=True)
    return s1, s2
