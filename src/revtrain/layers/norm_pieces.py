"""torch's batch norms over pieces of the batch, forward and backward: no tensor of the size of the input is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from revtrain.core.gradients import Gradients
from revtrain.core.hooks import has_hooks
from revtrain.core.pieces import batch_pieces
from revtrain.errors import RevtrainError
from revtrain.layers.batchnorm import all_but_channels, per_channel, statistics_dtype
from revtrain.layers.collective import all_sum, processes


class Statistics(NamedTuple):
    """Of a source, kept from the first pass; (C,) each."""

    mean: Tensor
    variance: Tensor  # biased
    of_batch: bool  # taken from the batch (training) or from the running statistics (evaluation)


class NormOverPieces:
    """u = BN(x) of x = read(source), and its gradient.

    With du the gradient of u, xhat the normalised x, N values a channel and gain = gamma / sqrt(var + eps),

        dx = gain du  -  gain (sum(du) + xhat sum(du xhat)) / N

    is linear in two sums. Piece by piece, the first part is added to dx and the sums are gathered; the second part
    needs the sums over the whole batch and follows in a pass of its own.

    Args:
        norm: the module with weights and running statistics; its `group`, if it has one, are the processes that
            share the batch.
        source: (B, C, ...), a state or a part of one.
        read: a part of the source -> its values in floating point; not written to.
        pieces: slices over the batch.
        statistics: of the first pass; None: this is the first pass, which updates the running statistics.
        memory_format: of what `normalised` returns.
    """

    def __init__(
        self,
        norm: nn.BatchNorm2d,
        source: Tensor,
        read: Callable[[Tensor], Tensor],
        pieces: Iterable[slice],
        statistics: Statistics | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.memory_format = memory_format
        self.norm, self.source, self.read, self.pieces = norm, source, read, list(pieces)
        self.group = getattr(norm, "group", None)
        self.count = source.numel() // source.shape[1] * processes(self.group)  # in all processes
        self.statistics = self._measure() if statistics is None else statistics
        self._sum_du: Tensor | None = None
        self._sum_du_x: Tensor | None = None  # of the centred x

    def normalised(self, sl: slice) -> Tensor:
        """u of a piece, without a graph: one multiplication and one addition a value."""
        mean, variance, _ = self.statistics
        with torch.no_grad():
            scale = self.norm.weight * (variance + self.norm.eps).rsqrt()
            shift = self.norm.bias - mean * scale
            x = self.read(self.source[sl])
            if self.memory_format is torch.channels_last:  # a copy, then one pass: faster than a pass over both formats
                x = x.clone(memory_format=self.memory_format)
                return torch.addcmul(self._per_channel(shift), x, self._per_channel(scale), out=x)
            return torch.addcmul(self._per_channel(shift), x, self._per_channel(scale))

    def add_gradient_(self, dx: Tensor, du: Tensor, sl: slice) -> None:
        """The first part of the gradient of a piece: dx[sl] += gain du."""
        du = du.contiguous()
        sums = du.sum(all_but_channels(du), dtype=self.statistics.mean.dtype)
        sums_x = (
            (self.read(self.source[sl]) - self._per_channel(self.statistics.mean)).mul_(du).sum(all_but_channels(du))
        )
        self._sum_du = sums if self._sum_du is None else self._sum_du + sums
        self._sum_du_x = sums_x if self._sum_du_x is None else self._sum_du_x + sums_x
        add_product_(dx[sl], du, self._per_channel(self._gain()))

    def finish_(self, dx: Tensor, grads: Gradients) -> None:
        """The second part, for all pieces; the gradients of gamma and beta."""
        mean, variance = self.statistics.mean, self.statistics.variance + self.norm.eps
        if self._sum_du is None or self._sum_du_x is None:  # nothing depends on u
            return
        if self.statistics.of_batch:  # through the mean and the variance, too
            sum_du, sum_du_x = all_sum(torch.stack([self._sum_du, self._sum_du_x]), self.group)
            slope = self._gain() * sum_du_x / (self.count * variance)
            shift = self._gain() * sum_du / self.count - slope * mean
            for sl in self.pieces:
                add_product_(dx[sl], self.read(self.source[sl]), self._per_channel(-slope))
                dx[sl].sub_(self._per_channel(shift))
        grads.add(self.norm.bias, self._sum_du)
        grads.add(self.norm.weight, self._sum_du_x * variance.rsqrt())

    def _per_channel(self, values: Tensor) -> Tensor:
        return per_channel(values, self.source)

    def _gain(self) -> Tensor:
        return self.norm.weight.detach() * (self.statistics.variance + self.norm.eps).rsqrt()

    def _measure(self) -> Statistics:
        """Of the whole batch, in two passes, in float32 or better."""
        norm = self.norm
        if not norm.training:
            running_mean, running_variance = running_statistics(norm)
            return Statistics(running_mean.clone(), running_variance.clone(), False)
        others = all_but_channels(self.source)
        mean = _add_up([_sum(self.read(self.source[sl])) for sl in self.pieces], self.group) / self.count
        squares = [(self.read(self.source[sl]) - self._per_channel(mean)).square_().sum(others) for sl in self.pieces]
        variance = _add_up(squares, self.group) / self.count
        if not norm.track_running_stats:  # a recomputation
            return Statistics(mean, variance, True)
        count_batch(norm)
        update_running_statistics(norm, mean, variance, self.count)
        return Statistics(mean, variance, True)


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
    return Statistics(mean.clone(), variance.clone(), False)


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
        # Sums depend on the order of their terms: the states of a chain, which it stands for, are always contiguous.
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        over_pieces = NormOverPieces(
            norm, x, lambda part: part.contiguous(), batch_pieces(x, piece_bytes), memory_format=memory_format
        )
        ctx.statistics, ctx.eps, ctx.group = over_pieces.statistics, norm.eps, over_pieces.group
        ctx.save_for_backward(x, weight)
        return over_pieces.normalised(slice(None)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, du: Tensor):
        (x, weight), (mean, variance, of_batch) = ctx.saved_tensors, ctx.statistics
        inverse_deviation, is_shared = (variance + ctx.eps).rsqrt(), of_batch and ctx.group is not None
        if not x.numel() and not is_shared:  # torch divides by the number of values
            return (
                torch.empty_like(x),
                torch.zeros_like(weight) * inverse_deviation,
                torch.zeros_like(weight),
                None,
                None,
            )
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            du, x, weight, mean, variance, mean, inverse_deviation, of_batch and not is_shared, ctx.eps, [True] * 3
        )
        if is_shared:  # what goes through the mean and the variance depends on the sums of all processes
            count = x.numel() // x.shape[1] * processes(ctx.group)
            sum_du, sum_du_xhat = all_sum(torch.stack([dbias, dweight]), ctx.group)
            slope = weight * inverse_deviation.square() * sum_du_xhat / count
            shift = weight * inverse_deviation * sum_du / count - slope * mean
            add_product_(dx, x, per_channel(-slope, dx))
            dx.sub_(per_channel(shift, dx))
        return dx, dweight, dbias, None, None


def add_product_(target: Tensor, values: Tensor, factor: Tensor) -> None:
    """target += factor values, in one pass where all are of one precision."""
    if target.dtype == values.dtype:
        target.addcmul_(values, factor.to(values.dtype))
    else:
        target.add_(values * factor)


def _sum(x: Tensor) -> Tensor:
    return x.sum(all_but_channels(x), dtype=statistics_dtype(x))


def _add_up(parts: list[Tensor], group: Any) -> Tensor:
    # The pieces' sums are few and small: adding them in float64 costs nothing (MPS has none).
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    return all_sum(torch.stack(parts).to(wide).sum(0), group).to(parts[0].dtype)
