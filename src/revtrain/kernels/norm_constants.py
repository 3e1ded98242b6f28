"""norm_constants: the few numbers a channel that the passes of a batch norm work with, all in one operation.

On a GPU a dozen operations on a handful of numbers cost a dozen launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from revtrain.kernels.operator import register, runs_kernel


class NormConstants(NamedTuple):
    """Of each channel, (C,), in the type of the mean; u = scale x + shift."""

    deviation: Tensor  # sqrt(variance + eps)
    gain: Tensor  # weight, or sign (|weight| + epsilon_i) (Eq. 23)
    dgain: Tensor  # its derivative by the weight
    bias: Tensor
    scale: Tensor  # gain / deviation
    shift: Tensor  # bias - mean scale


class Running(NamedTuple):
    """Running statistics, which are brought up to date."""

    mean: Tensor
    variance: Tensor  # unbiased, as torch keeps it
    batches: Tensor | None  # () int64: how many were seen, one more with this one
    momentum: float | None  # share of the new batch; None: all batches count the same
    values: int  # a channel of this batch


def norm_constants(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    epsilon_i: float | None = None,
    signs: Tensor | int = 1,
    running: Running | None = None,
) -> NormConstants:
    """What follows from mean and biased variance, (C,) each, and the weights; takes them into `running`.

    Args:
        mean, variance: float32 or float64.
        weight, bias: (C,).
        eps: added to the variance.
        epsilon_i, signs: of Eq. 23's gain; signs is a tensor (C,) of 1 and -1, or one of the two for all. None: the
            weight is the gain.
        running: None: nothing is brought up to date.
    """
    if running is not None and running.momentum is None and running.batches is None:
        raise ValueError("a mean over all batches needs their number")
    tensor, one = (signs, 1) if isinstance(signs, Tensor) else (None, signs)
    running_mean, running_variance, batches, momentum, count = running or (None, None, None, 0.0, 0)
    form = _operator if runs_kernel(mean) else specification
    of_running = (running_mean, running_variance, batches, momentum, count)
    return NormConstants(*form(mean, variance, weight, bias, eps, epsilon_i, tensor, one, *of_running))


def specification(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    epsilon_i: float | None,
    signs: Tensor | None,
    sign: int,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In plain torch."""
    deviation = torch.sqrt(variance + eps)
    wide, own_bias = weight.to(mean.dtype), bias.to(mean.dtype, copy=True)
    if epsilon_i is None:
        gain, dgain = wide.clone(), torch.ones_like(wide)
    else:
        of_channels = sign if signs is None else signs
        gain, dgain = of_channels * (wide.abs() + epsilon_i), of_channels * torch.sign(wide)
    scale = gain / deviation
    if running_mean is not None and running_variance is not None:
        if batches is not None:
            batches.add_(1)
        share: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and batches is not None:
            share = batches.to(running_mean.dtype).reciprocal()
        unbiased = variance * (count / max(1, count - 1))
        for running, new in ((running_mean, mean), (running_variance, unbiased)):
            running.lerp_(new.to(running.dtype), share)
    return deviation, gain, dgain, own_bias, scale, own_bias - mean * scale


def _fake(mean, *_):
    return tuple(torch.empty_like(mean) for _ in range(6))


def _kernel(*arguments):
    from revtrain.kernels import triton_kernels

    return triton_kernels.norm_constants(*arguments)


_operator = register(
    "norm_constants(Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, float? epsilon_i, "
    "Tensor? signs, int sign, Tensor(a!)? running_mean, Tensor(b!)? running_variance, Tensor(c!)? batches, "
    "float? momentum, int count) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _kernel,
)
