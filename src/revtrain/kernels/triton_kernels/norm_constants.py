"""norm_constants and split_sums: a few numbers a channel, by one program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revtrain.kernels.triton_kernels.device import divide, load, narrow, scalar
from revtrain.kernels.triton_kernels.tiling import launch, triton_type

BLOCK = 256  # channels at a time


def norm_constants(
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
    made = [torch.empty_like(mean, memory_format=torch.contiguous_format) for _ in range(6)]
    deviation, gain, dgain, own_bias, scale, shift = made
    arguments: dict[str, Any] = dict(
        mean=mean.contiguous(),
        variance=variance.contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        signs=None if signs is None else signs.contiguous(),
        running_mean=running_mean,
        running_variance=running_variance,
        batches=batches,
        deviation=deviation,
        gain=gain,
        dgain=dgain,
        own_bias=own_bias,
        scale=scale,
        shift=shift,
        eps=float(eps),
        epsilon_i=float(epsilon_i or 0.0),
        sign=float(sign),
        momentum=float(momentum or 0.0),
        unbiased=count / max(1, count - 1),
        channels=mean.numel(),
        BOUNDED=epsilon_i is not None,
        OF_ALL=momentum is None,
        WIDE=triton_type(mean.dtype),
        BLOCK_CHANNELS=BLOCK,
    )
    launch(constants, (1,), mean.device, arguments)
    return deviation, gain, dgain, own_bias, scale, shift


@triton.jit(do_not_specialize=["channels"])
def constants(
    mean,
    variance,
    weight,
    bias,
    signs,
    running_mean,
    running_variance,
    batches,
    deviation,
    gain,
    dgain,
    own_bias,
    scale,
    shift,
    eps: tl.float64,
    epsilon_i: tl.float64,
    sign: tl.float64,
    momentum: tl.float64,
    unbiased: tl.float64,
    channels,
    BOUNDED: tl.constexpr,
    OF_ALL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    share = scalar(momentum, WIDE)
    if batches is not None:
        seen = tl.load(batches) + 1
        tl.store(batches, seen)
        if OF_ALL:
            share = divide(scalar(1.0, WIDE), seen.to(WIDE))
    for start in range(0, channels, BLOCK_CHANNELS):
        c = start + tl.arange(0, BLOCK_CHANNELS)
        here = c < channels
        m, v, w = load(mean + c, here, WIDE), load(variance + c, here, WIDE), load(weight + c, here, WIDE)
        b = load(bias + c, here, WIDE)
        root = v + scalar(eps, WIDE)
        s = tl.math.sqrt_rn(root) if tl.float32 == WIDE else tl.sqrt(root)
        if BOUNDED:
            of_channels = load(signs + c, here, WIDE) if signs is not None else w * 0.0 + scalar(sign, WIDE)
            g = of_channels * (tl.abs(w) + scalar(epsilon_i, WIDE))
            derivative = of_channels * tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0)).to(WIDE)
        else:
            g = w
            derivative = w * 0.0 + 1.0
        factor = divide(g, tl.where(here, s, 1.0))
        tl.store(deviation + c, s, mask=here)
        tl.store(gain + c, g, mask=here)
        tl.store(dgain + c, derivative, mask=here)
        tl.store(own_bias + c, b, mask=here)
        tl.store(scale + c, factor, mask=here)
        tl.store(shift + c, b - m * factor, mask=here)
        if running_mean is not None:
            before = load(running_mean + c, here, WIDE)
            tl.store(running_mean + c, narrow(before + share * (m - before), running_mean), mask=here)
            before = load(running_variance + c, here, WIDE)
            new = v * scalar(unbiased, WIDE)
            tl.store(running_variance + c, narrow(before + share * (new - before), running_variance), mask=here)


def split_sums(sums: Tensor, factor: Tensor | None, divisor: Tensor | None) -> tuple[Tensor, Tensor]:
    first, second = sums.new_empty(sums.shape[1]), sums.new_empty(sums.shape[1])
    arguments: dict[str, Any] = dict(
        sums=sums.contiguous(),
        factor=None if factor is None else factor.contiguous(),
        divisor=None if divisor is None else divisor.contiguous(),
        first=first,
        second=second,
        channels=sums.shape[1],
        WIDE=triton_type(sums.dtype),
        BLOCK_CHANNELS=BLOCK,
    )
    launch(split, (-(-sums.shape[1] // BLOCK),), sums.device, arguments)
    return first, second


@triton.jit(do_not_specialize=["channels"])
def split(sums, factor, divisor, first, second, channels, WIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = c < channels
    tl.store(first + c, load(sums + c, here, WIDE), mask=here)
    other = load(sums + channels + c, here, WIDE)
    if factor is not None:
        other = other * load(factor + c, here, WIDE)
    if divisor is not None:
        other = divide(other, tl.where(here, load(divisor + c, here, WIDE), 1.0))
    tl.store(second + c, other, mask=here)
