"""Batch normalisation and its inverse (Eqs. 14 and 23, as corrected in docs/paper.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.pieces import batch_pieces
from revtrain.errors import RevtrainError
from revtrain.layers.collective import all_sum, processes

SIGNS = ("positive", "mixed", "negative")


class Normalisation(NamedTuple):
    """What the inverse of a BN needs besides y: shapes (1, C, 1, ...), in the statistics' precision."""

    mean: Tensor
    deviation: Tensor  # sqrt(biased variance + eps): the unbiased one caps the SNR near (2 B H W)^2
    of_batch: bool  # taken from the batch (training) or from the running statistics (evaluation)


class InvertibleBatchNorm2d(InvertibleLayer, _BatchNorm):
    """y = sign * (|gamma| + epsilon_i) (x - mean) / sqrt(var + eps) + beta, per channel of x.

    x is (B, C), (B, C, L), (B, C, H, W) or (B, C, D, H, W); `InvertibleBatchNorm` is another name of this class.

    Eq. 14 with the gain of Eq. 23: the draft's |gamma + epsilon_i| vanishes at gamma = -epsilon_i, while
    |gamma| + epsilon_i never falls below epsilon_i. The inverse (Eq. 21) multiplies the noise of channel i
    by sqrt(var_i + eps) / |gain_i|, so a gain near zero would destroy the signal.

    A LeakyReLU shrinks negative values. In a row of BNs and LeakyReLUs with positive gains it is the same values that
    each shrinks again; with negative gains it is those that the LeakyReLU before left at full size. That is worth
    several dB of SNR a layer (docs/numerics.md).

    Args:
        channels: C.
        epsilon_i: least gain of a channel, without unit, >= 0.
        sign: of the gains: positive (the paper's), negative, or mixed, drawn for each channel and then fixed.
        eps: added to the variance, in squared units of x.
        momentum: share of the new batch in the running statistics; None: their mean over all batches since
            `reset_running_stats`, as in torch (`torch.optim.swa_utils.update_bn` uses that).

    In training mode the running statistics are updated once per forward pass and never by a recomputation. `group`:
    the processes that share a batch, see `synchronise_batch_norms`; torch's convert_sync_batchnorm is refused.
    Raises `RevtrainError` for a negative epsilon_i or eps, fewer than one channel, another sign, or an x of other
    channels.
    """

    is_pointwise = True
    affine = track_running_stats = True
    num_batches_tracked = None  # torch's count; ours is `batches`
    group: Any = None
    running_mean: Tensor
    running_var: Tensor
    signs: Tensor | int

    def __init__(
        self,
        channels: int,
        epsilon_i: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sign: str = "positive",
    ):
        nn.Module.__init__(self)  # a batch norm by its class, for tools that look for some, with tensors of its own
        if sign not in SIGNS:
            raise RevtrainError(f"norm_sign={sign} was given.\nExpected one of: {', '.join(SIGNS)}.")
        if epsilon_i < 0:
            raise RevtrainError(f"epsilon_i={epsilon_i} is negative.\nExpected 0 or more; 0.1 to 0.2 serve well.")
        if channels < 1 or eps < 0:
            raise RevtrainError(
                f"{type(self).__name__}: channels={channels}, eps={eps} was given.\n"
                "Expected 1 channel or more and an eps that is not negative."
            )
        self.channels, self.epsilon_i, self.eps, self.momentum, self.sign = channels, epsilon_i, eps, momentum, sign
        self.batches = 0  # of the cumulative average; a number, not a tensor: reading it must not wait for a GPU
        # |gamma| + epsilon_i starts at 1, as in an ordinary BN.
        self.weight = nn.Parameter(torch.full((channels,), max(0.0, 1.0 - epsilon_i)))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        if sign == "mixed":
            self.register_buffer("signs", torch.randint(0, 2, (channels,), dtype=torch.int8) * 2 - 1)
        else:
            self.signs = 1 if sign == "positive" else -1

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, epsilon_i={self.epsilon_i}, eps={self.eps}, momentum={self.momentum}, sign={self.sign}"
        )

    @property
    def num_features(self) -> int:  # what convert_sync_batchnorm reads first
        raise RevtrainError(
            f"{type(self).__name__} cannot be converted to a SyncBatchNorm: it computes something else, and has an "
            "inverse.\nUse revtrain.layers.synchronise_batch_norms(model, group), before DistributedDataParallel; "
            "the number of channels is `channels`."
        )

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget all batches."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches = 0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As new: a gain of 1, no shift, no batches."""
        self.reset_running_stats()
        self.weight.fill_(max(0.0, 1.0 - self.epsilon_i))
        self.bias.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # torch's batch norm would look for its count of batches

    def gain(self) -> Tensor:
        """sign * (|gamma| + epsilon_i), shape (C,) (Eq. 23)."""
        return self.signs * (self.weight.abs() + self.epsilon_i)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        # The operations of forward_, in the same order: both backward modes compute the same bits.
        if self.training:
            mean = channel_mean(x, self.piece_bytes, self.group)
            centred = x - mean
            variance = channel_mean_of_squares(centred, self.piece_bytes, self.group)
            self._update_running_statistics(mean, variance, self._count(x))
        else:
            mean, variance = per_channel(self.running_mean, x), per_channel(self.running_var, x)
            centred = x - mean
        deviation = torch.sqrt(variance + self.eps)
        gain, bias = per_channel(self.gain().to(mean.dtype), x), per_channel(self.bias.to(mean.dtype), x)
        return centred * (gain / deviation) + bias

    def forward_(self, x: Tensor) -> tuple[Tensor, Normalisation]:
        self._check(x)
        if not self.training:
            saved = self._of_running_statistics(x)
            return self.recompute_(x, saved), saved
        mean = channel_mean(x, self.piece_bytes, self.group)
        x.sub_(mean)
        variance = channel_mean_of_squares(x, self.piece_bytes, self.group)
        self._update_running_statistics(mean, variance, self._count(x))
        saved = Normalisation(mean, torch.sqrt(variance + self.eps), True)
        return self._scale_(x, saved), saved

    def recompute_(self, x: Tensor, saved: Normalisation) -> Tensor:
        return self._scale_(x.sub_(saved.mean), saved)

    def stand_in(self, y: Tensor) -> Normalisation:
        if self.training:
            raise RevtrainError(
                f"{type(self).__name__} is in training mode: its inverse needs the statistics of the forward pass.\n"
                "Call eval() to use the running statistics, or hand over the `saved` that forward_ returned."
            )
        self._check(y)
        return self._of_running_statistics(y)

    def inverse_(self, y: Tensor, saved: Normalisation) -> Tensor:
        gain, bias = self._gain_and_bias(saved)
        return y.sub_(bias).mul_(saved.deviation / gain).add_(saved.mean)

    def backward_(self, y: Tensor, dy: Tensor, saved: Normalisation, grads: Gradients) -> tuple[Tensor, Tensor]:
        gain, bias = self._gain_and_bias(saved)
        xhat = y.sub_(bias).div_(gain)
        dbias, dgain = _sums_for_affine(xhat, dy, self.piece_bytes)
        if saved.of_batch:  # through the mean and the variance, too
            count = self._count(y)
            sum_dy, sum_dy_xhat = all_sum(torch.stack([dbias, dgain]), self.group)
            for sl in batch_pieces(dy, self.piece_bytes):
                dy[sl].sub_(xhat[sl] * (sum_dy_xhat / count)).sub_(sum_dy / count)
        dy.mul_(gain / saved.deviation)
        grads.add(self.bias, dbias.flatten())
        grads.add(self.weight, dgain.flatten() * torch.sign(self.weight) * self.signs)
        return xhat.mul_(saved.deviation).add_(saved.mean), dy

    def _scale_(self, centred: Tensor, saved: Normalisation) -> Tensor:
        gain, bias = self._gain_and_bias(saved)
        return centred.mul_(gain / saved.deviation).add_(bias)

    def _gain_and_bias(self, saved: Normalisation) -> tuple[Tensor, Tensor]:
        dtype = saved.mean.dtype
        gain, bias = self.gain().detach().to(dtype), self.bias.detach().to(dtype)
        return gain.view_as(saved.mean), bias.view_as(saved.mean)

    def _of_running_statistics(self, x: Tensor) -> Normalisation:
        deviation = torch.sqrt(self.running_var + self.eps)
        return Normalisation(per_channel(self.running_mean.clone(), x), per_channel(deviation, x), False)

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise RevtrainError(
                f"{type(self).__name__} of {self.channels} channels was given a tensor of shape {tuple(x.shape)}.\n"
                f"Expected (B, {self.channels}, ...): {self.channels} channels in dimension 1."
            )

    def _count(self, x: Tensor) -> int:
        """Values a channel, in all processes."""
        return x.numel() // self.channels * processes(self.group)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        share = self.momentum
        if share is None:
            self.batches += 1
            share = 1 / self.batches
        # The running variance is the unbiased one, as torch keeps it; only the inverse needs the biased one.
        unbiased = variance * (count / max(1, count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.detach().flatten().to(running.dtype), share)


InvertibleBatchNorm = InvertibleBatchNorm2d


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) as (1, C, 1, ...), with as many dimensions as x (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x (B, C, ...) other than that of the channels."""
    return 0, *range(2, x.dim())


def statistics_dtype(x: Tensor) -> torch.dtype:
    """In which sums over many values of x are taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channel_mean(x: Tensor, piece_bytes: int, group: Any = None) -> Tensor:
    """Mean over all but the channels of x (B, C, ...) and the processes of `group`: (1, C, 1, ...).

    In float32 or better, piece by piece of the batch.
    """
    dtype = statistics_dtype(x)
    sums = [x[sl].sum(all_but_channels(x), keepdim=True, dtype=dtype) for sl in batch_pieces(x, piece_bytes)]
    return _combine(sums, x, dtype, group)


def channel_mean_of_squares(x: Tensor, piece_bytes: int, group: Any = None) -> Tensor:
    """Mean of x^2 over all but the channels and `group`: (1, C, 1, ...). Of a centred x this is the biased variance."""
    dtype = statistics_dtype(x)
    sums = [x[sl].to(dtype).square().sum(all_but_channels(x), keepdim=True) for sl in batch_pieces(x, piece_bytes)]
    return _combine(sums, x, dtype, group)


def _combine(sums: list[Tensor], x: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
    # The pieces' sums are few and small: adding them in float64 costs nothing (MPS has none).
    wide = dtype if x.device.type == "mps" else torch.float64
    count = x.numel() // x.shape[1] * processes(group)
    return (all_sum(torch.stack(sums).to(wide).sum(0), group) / count).to(dtype)


def _sums_for_affine(xhat: Tensor, dy: Tensor, piece_bytes: int) -> tuple[Tensor, Tensor]:
    """(sum of dy, sum of dy * xhat) over all but the channels, each (1, C, 1, ...): the gradients of bias and gain."""
    dtype = statistics_dtype(dy)
    others = all_but_channels(dy)
    dbias = per_channel(torch.zeros(dy.shape[1], dtype=dtype, device=dy.device), dy)
    dgain = torch.zeros_like(dbias)
    for sl in batch_pieces(dy, piece_bytes):
        dbias += dy[sl].sum(others, keepdim=True, dtype=dtype)
        dgain += (dy[sl] * xhat[sl]).sum(others, keepdim=True, dtype=dtype)
    return dbias, dgain
