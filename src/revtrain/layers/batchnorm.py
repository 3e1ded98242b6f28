"""Batch normalisation and its inverse (Eqs. 14 and 23, as corrected in docs/paper.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import effective, is_rewritten
from revtrain.errors import RevtrainError
from revtrain.kernels import (
    Running,
    cpu_kernels,
    norm_activation_sums,
    norm_constants,
    normalise_activate_,
    split_sums,
    undo_norm_activation_,
)
from revtrain.kernels.channel_statistics import Moments
from revtrain.kernels.pieces import batch_pieces
from revtrain.kernels.shapes import all_but_channels, per_channel
from revtrain.layers.activation import InvertibleLeakyReLU
from revtrain.layers.collective import all_sum, processes
from revtrain.layers.moments import moments
from revtrain.layers.norm_activation import NormActivation

SIGNS = ("positive", "mixed", "negative")


class Normalisation(NamedTuple):
    """What the inverse of a BN needs besides y: (C,) each, in the statistics' precision."""

    mean: Tensor
    deviation: Tensor  # sqrt(biased variance + eps): the unbiased one caps the SNR near (2 B H W)^2
    gain: Tensor
    dgain: Tensor  # the gain's derivative by the weight
    bias: Tensor
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

    def set_signs(self, signs: Tensor | int) -> None:
        """Other signs of the gains: 1 or -1 for all channels, or one each, (C,), where they are mixed."""
        if isinstance(self.signs, Tensor):
            with torch.no_grad():
                self.signs.copy_(torch.as_tensor(signs))
        else:
            self.signs, self.sign = signs, "positive" if signs == 1 else "negative"

    def gain(self) -> Tensor:
        """sign * (|gamma| + epsilon_i), shape (C,) (Eq. 23)."""
        return self.signs * (effective(self, "weight").abs() + self.epsilon_i)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        # The operations of forward_, in the same order: both backward modes compute the same bits.
        if self.training:
            compiled = self._compiled_moments(x)
            mean = _with_bits_of(compiled and compiled.mean, channel_mean(x, self.piece_bytes, self.group))
            centred = x - mean
            variance = channel_mean_of_squares(centred, self.piece_bytes, self.group)
            variance = _with_bits_of(compiled and compiled.variance, variance)
            self._update_running_statistics(mean, variance, self._count(x))
        else:
            mean, variance = per_channel(self.running_mean, x), per_channel(self.running_var, x)
            centred = x - mean
        deviation = torch.sqrt(variance + self.eps)
        bias = per_channel(effective(self, "bias").to(mean.dtype), x)
        gain = per_channel(self.gain().to(mean.dtype), x)
        return centred * (gain / deviation) + bias

    def _compiled_moments(self, x: Tensor) -> Moments | None:
        """Those of `forward_` where compiled passes take sums in an order of their own; else None."""
        own = x.detach()
        if processes(self.group) > 1 or not cpu_kernels.serves(own):
            return None
        return moments(own, 1.0, statistics_dtype(x), self.piece_bytes)

    def forward_(self, x: Tensor) -> tuple[Tensor, Normalisation]:
        return self.run_forward_(x)

    def recompute_(self, x: Tensor, saved: Normalisation) -> Tensor:
        return self.run_again_(x, saved)[0]

    def stand_in(self, y: Tensor) -> Normalisation:
        if self.training:
            raise RevtrainError(
                f"{type(self).__name__} is in training mode: its inverse needs the statistics of the forward pass.\n"
                "Call eval() to use the running statistics, or hand over the `saved` that forward_ returned."
            )
        self._check(y)
        return self._of_running_statistics()

    def inverse_(self, y: Tensor, saved: Normalisation) -> Tensor:
        factor = per_channel(saved.deviation / saved.gain, y)
        return y.sub_(per_channel(saved.bias, y)).mul_(factor).add_(per_channel(saved.mean, y))

    def backward_(self, y: Tensor, dy: Tensor, saved: Normalisation, grads: Gradients) -> tuple[Tensor, Tensor]:
        if is_rewritten(self, "weight", "bias"):  # autograd knows what they are made of
            return super().backward_(y, dy, saved, grads)
        return self.run_back_(y, dy, saved, grads)

    def joined_with(self, following: InvertibleLayer) -> InvertibleLayer | None:
        if type(self) is not InvertibleBatchNorm2d or is_rewritten(self, "weight", "bias"):
            return None
        if not isinstance(following, InvertibleLeakyReLU) or type(following).forward is not InvertibleLeakyReLU.forward:
            return None
        return NormActivation(self, following)

    # With a LeakyReLU of slope n behind it, which takes no pass of its own; n = 1: none.

    def run_forward_(self, x: Tensor, slope: float = 1.0) -> tuple[Tensor, Normalisation]:
        """(y, saved) of x, in place."""
        self._check(x)
        if self.training:
            mean, variance = moments(x, 1.0, statistics_dtype(x), self.piece_bytes, self.group)
            running = Running(self.running_mean, self.running_var, None, self._share_of_batch(), self._count(x))
            saved = self._normalisation(mean, variance, True, running)
        else:
            saved = self._of_running_statistics()
        return self.run_again_(x, saved, slope)[0], saved

    def run_again_(
        self, x: Tensor, saved: Normalisation, slope: float = 1.0, with_signs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(y, signs of what the LeakyReLU is given) of x, in place."""
        x = x.contiguous()
        signs = normalise_activate_(
            x,
            saved.mean,
            saved.deviation,
            saved.gain,
            saved.bias,
            slope,
            with_signs=with_signs,
            piece_bytes=self.piece_bytes,
        )
        return x, signs

    def run_back_(
        self,
        y: Tensor,
        dy: Tensor,
        saved: Normalisation,
        grads: Gradients,
        slope: float = 1.0,
        signs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, dx) of (y, dy), in place."""
        y, dy = y.contiguous(), dy.contiguous()
        mean, deviation, gain, dgain, bias, of_batch = saved
        own = norm_activation_sums(y, dy, signs, gain, bias, slope, piece_bytes=self.piece_bytes)
        sums = all_sum(own, self.group) if of_batch else None  # through the mean and the variance, too
        undo_norm_activation_(
            y,
            dy,
            signs,
            mean,
            deviation,
            gain,
            bias,
            slope,
            sums,
            self._count(y),
            piece_bytes=self.piece_bytes,
        )
        dbias, dweight = split_sums(own, factor=dgain)
        grads.add(self.bias, dbias)
        grads.add(self.weight, dweight)
        return y, dy

    def _normalisation(
        self, mean: Tensor, variance: Tensor, of_batch: bool, running: Running | None = None
    ) -> Normalisation:
        weight, bias = (effective(self, name).detach() for name in ("weight", "bias"))
        constants = norm_constants(
            mean, variance, weight, bias, self.eps, epsilon_i=self.epsilon_i, signs=self.signs, running=running
        )
        return Normalisation(mean, constants.deviation, constants.gain, constants.dgain, constants.bias, of_batch)

    def _of_running_statistics(self) -> Normalisation:
        return self._normalisation(self.running_mean.clone(), self.running_var, False)

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise RevtrainError(
                f"{type(self).__name__} of {self.channels} channels was given a tensor of shape {tuple(x.shape)}.\n"
                f"Expected (B, {self.channels}, ...): {self.channels} channels in dimension 1."
            )

    def _count(self, x: Tensor) -> int:
        """Values a channel, in all processes."""
        return x.numel() // self.channels * processes(self.group)

    def _share_of_batch(self) -> float:
        """Of the batch that is seen now, in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        self.batches += 1
        return 1 / self.batches

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        share = self._share_of_batch()
        # The running variance is the unbiased one, as torch keeps it; only the inverse needs the biased one.
        unbiased = variance * (count / max(1, count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.detach().flatten().to(running.dtype), share)


InvertibleBatchNorm = InvertibleBatchNorm2d


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


class _WithBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, computed: Tensor) -> Tensor:
        return values.view_as(computed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _with_bits_of(values: Tensor | None, computed: Tensor) -> Tensor:
    """`computed`, with its gradient, where it is known to the last bit: `values`, in any shape."""
    return computed if values is None else _WithBits.apply(values, computed)


def _combine(sums: list[Tensor], x: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
    # The pieces' sums are few and small: adding them in float64 costs nothing (MPS has none).
    wide = dtype if x.device.type == "mps" else torch.float64
    count = x.numel() // x.shape[1] * processes(group)
    return (all_sum(torch.stack(sums).to(wide).sum(0), group) / count).to(dtype)
