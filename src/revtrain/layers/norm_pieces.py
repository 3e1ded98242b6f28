"""torch's batch norms over pieces of the batch, forward and backward: no tensor of the size of the input is made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from revtrain.core.gradients import Gradients
from revtrain.core.hooks import has_hooks
from revtrain.errors import RevtrainError
from revtrain.kernels import Running, add_norm_gradient_, add_norm_rest_, norm_constants, read_part, split_sums
from revtrain.kernels.pieces import WHOLE, Index
from revtrain.kernels.shapes import add_product_, per_channel
from revtrain.layers.collective import all_sum, processes
from revtrain.layers.moments import moments


class Statistics(NamedTuple):
    """Of a source, kept from the first pass, (C,) each; u = scale x + shift."""

    mean: Tensor
    deviation: Tensor  # sqrt(biased variance + eps)
    scale: Tensor
    shift: Tensor
    of_batch: bool  # taken from the batch (training) or from the running statistics (evaluation)


def statistics_of(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, of_batch: bool, running: Running | None = None
) -> Statistics:
    """What a pass needs of mean and biased variance, (C,) each, with the weights of `norm` as they are."""
    constants = norm_constants(mean, variance, norm.weight.detach(), norm.bias.detach(), norm.eps, running=running)
    return Statistics(mean, constants.deviation, constants.scale, constants.shift, of_batch)


class NormOverPieces:
    """u = BN(x) of x = unit source, and its gradient, linear in two sums (see `revtrain.kernels.norm_gradient`).

    Piece by piece, the first part of the gradient is added to dx and the sums are gathered; the second part needs the
    sums over the whole batch and follows in a pass of its own.

    Args:
        norm: the module with weights and running statistics; its `group`, if it has one, are the processes that
            share the batch.
        source: (B, C, ...), a state or a part of one.
        unit: what one of the source's units is worth: the grid's step for integers, else 1.
        piece_bytes: bound of temporaries.
        statistics: of the first pass; None: this is the first pass, which updates the running statistics.
        channels_last: the memory format of what `normalised` returns.
    """

    def __init__(
        self,
        norm: nn.BatchNorm2d,
        source: Tensor,
        unit: float,
        piece_bytes: int,
        statistics: Statistics | None = None,
        channels_last: bool = False,
    ):
        self.norm, self.source, self.unit = norm, source, unit
        self.piece_bytes, self.channels_last = piece_bytes, channels_last
        self.group = getattr(norm, "group", None)
        self.count = source.numel() // source.shape[1] * processes(self.group)  # in all processes
        self.statistics = self._measure() if statistics is None else statistics
        self._sums: Tensor | None = None  # of du, and of du times the centred x: (2, C)

    def normalised(self, where: Index, dtype: torch.dtype | None = None) -> Tensor:
        """u of a piece, without a graph, in `dtype` or that of the statistics."""
        _, _, scale, shift, _ = self.statistics
        return read_part(
            self.source[where],
            dtype or scale.dtype,
            unit=self.unit,
            scale=scale,
            shift=shift,
            channels_last=self.channels_last,
        )

    def add_gradient_(self, dx: Tensor, du: Tensor, where: Index) -> None:
        """The first part of the gradient of a piece: dx[where] += gain du."""
        mean, _, scale, _, _ = self.statistics
        self._sums = add_norm_gradient_(dx[where], du, self.source[where], mean, scale, self._sums, unit=self.unit)

    def finish_(self, dx: Tensor, grads: Gradients) -> None:
        """The second part, for all pieces; the gradients of gamma and beta."""
        mean, deviation, scale, _, of_batch = self.statistics
        if self._sums is None:  # nothing depends on u
            return
        if of_batch:  # through the mean and the variance, too
            sums = all_sum(self._sums, self.group)
            add_norm_rest_(
                dx,
                self.source,
                mean,
                deviation,
                scale,
                sums,
                self.count,
                unit=self.unit,
                piece_bytes=self.piece_bytes,
            )
        dbias, dweight = split_sums(self._sums, divisor=deviation)
        grads.add(self.norm.bias, dbias)
        grads.add(self.norm.weight, dweight)

    def _measure(self) -> Statistics:
        """Of the whole batch, in two passes, in float32 or better."""
        norm = self.norm
        if not norm.training:
            running_mean, running_variance = running_statistics(norm)
            return statistics_of(norm, running_mean.clone(), running_variance, False)
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        mean, variance = moments(self.source, self.unit, dtype, self.piece_bytes, self.group)
        running = None  # it is a recomputation
        if norm.track_running_stats:
            running = Running(*running_statistics(norm), norm.num_batches_tracked, norm.momentum, self.count)
        return statistics_of(norm, mean, variance, True, running)


def runs_over_pieces(norm: nn.Module) -> bool:
    """Whether `NormOverPieces` computes what norm(x) does: torch's batch norms with weights and statistics.

    Not of another class, with hooks, or with weights that are made of others.
    """
    of_torch = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    usual = of_torch and (type(norm).forward is _BatchNorm.forward or getattr(norm, "is_over_pieces", False))
    return (
        usual
        and "forward" not in vars(norm)
        and not has_hooks(norm)
        and "parametrizations" not in norm._modules
        and None not in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )


def running_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(mean, variance), (C,) each. Raises `RevtrainError` where `norm` keeps none."""
    if norm.running_mean is None or norm.running_var is None:
        raise RevtrainError(
            f"{norm} was given where running statistics are needed.\nExpected one with track_running_stats=True."
        )
    return norm.running_mean, norm.running_var


def stand_in_statistics(norm: nn.BatchNorm2d, name: str) -> Statistics:
    """The running statistics, for an inverse without a forward pass. Raises `RevtrainError` in training mode."""
    if norm.training:
        raise RevtrainError(
            f"{name}: its {type(norm).__name__} is in training mode, and the inverse needs the statistics of the "
            "forward pass.\nCall eval() to use the running statistics, or hand over the `saved` that forward_ returned."
        )
    mean, variance = running_statistics(norm)
    return statistics_of(norm, mean.clone(), variance, False)


@torch.no_grad()
def update_running_statistics(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int, channels: slice = slice(None)
) -> None:
    """Take a batch of `count` values a channel into the running statistics of some `channels`, as torch does.

    `mean` and `variance` (biased; torch keeps the unbiased one) are of these channels, (k,) each. `count_batch` comes
    first: without a momentum, the statistics are means over all batches so far.
    """
    running_mean, running_variance = running_statistics(norm)
    unbiased = variance * (count / max(1, count - 1))
    share: Tensor | float = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and norm.num_batches_tracked is not None:
        share = norm.num_batches_tracked.to(running_mean.dtype).reciprocal()
    for running, new in ((running_mean, mean), (running_variance, unbiased)):
        running[channels].lerp_(new.to(running.dtype), share)


@torch.no_grad()
def count_batch(norm: nn.BatchNorm2d) -> None:
    """One batch more was seen by `norm`."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def normalise(x: Tensor, norm: nn.BatchNorm2d, piece_bytes: int) -> Tensor:
    """`norm(x)` by ordinary autograd, to the bit what a `NormOverPieces` over pieces of `piece_bytes` computes.

    The two backward modes are then one function to the last bit: one of a different rounding would cross other kinks of
    the activations, which changes gradients by more than rounding does.
    """
    # a graph for inference has no pieces, nor a number of images; tangents and torch.func go through torch's own norm
    if torch.compiler.is_exporting() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return norm(x)
    return _Normalise.apply(x, norm.weight, norm.bias, norm, piece_bytes)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, piece_bytes: int) -> Tensor:
        over_pieces = NormOverPieces(norm, x, 1.0, piece_bytes, channels_last=not x.is_contiguous())
        ctx.statistics, ctx.eps, ctx.group = over_pieces.statistics, norm.eps, over_pieces.group
        ctx.save_for_backward(x, weight)
        return over_pieces.normalised(WHOLE.read, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, du: Tensor):
        (x, weight), (mean, deviation, _, _, of_batch) = ctx.saved_tensors, ctx.statistics
        inverse_deviation, is_shared = deviation.reciprocal(), of_batch and ctx.group is not None
        if not x.numel() and not is_shared:  # torch divides by the number of values
            return (
                torch.empty_like(x),
                torch.zeros_like(weight) * inverse_deviation,
                torch.zeros_like(weight),
                None,
                None,
            )
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            du,
            x,
            weight,
            mean,
            deviation.square() - ctx.eps,
            mean,
            inverse_deviation,
            of_batch and not is_shared,
            ctx.eps,
            [True] * 3,
        )
        if is_shared:  # what goes through the mean and the variance depends on the sums of all processes
            count = x.numel() // x.shape[1] * processes(ctx.group)
            sum_du, sum_du_xhat = all_sum(torch.stack([dbias, dweight]), ctx.group)
            slope = weight * inverse_deviation.square() * sum_du_xhat / count
            shift = weight * inverse_deviation * sum_du / count - slope * mean
            add_product_(dx, x, per_channel(-slope, dx))
            dx.sub_(per_channel(shift, dx))
        return dx, dweight, dbias, None, None
