"""add_norm_gradient_ and add_norm_rest_ in one pass each."""

from contextlib import ExitStack
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revtrain.kernels.shapes import wide_dtype
from revtrain.kernels.triton_kernels import tiling
from revtrain.kernels.triton_kernels.device import (
    add_up_parts,
    channels_of,
    divide,
    keep_part,
    load,
    narrow,
    pixels_of,
    places,
    scalar,
    sizes,
)
from revtrain.kernels.triton_kernels.tiling import Tiles, launch, readable, triton_type, writable


def add_norm_gradient_(
    dpart: Tensor, du: Tensor, part: Tensor, mean: Tensor, scale: Tensor, sums: Tensor, adds: bool, unit: float
) -> None:
    with ExitStack() as stack:
        dpart, sums_of_all = stack.enter_context(writable(dpart)), sums.contiguous()
        du, part = readable(du), readable(part)
        wide = wide_dtype(dpart, du, part, mean)
        tiles = Tiles(wide, dpart=dpart, du=du, part=part)
        parts, in_part = tiles.runs()
        kept = torch.empty(2, tiles.channels, parts, dtype=wide, device=part.device)
        arguments: dict[str, Any] = dict(
            dpart=dpart,
            du=du,
            part=part,
            mean=mean.contiguous(),
            scale=scale.contiguous(),
            kept=kept,
            unit=unit,
            TILES=in_part,
            WIDE=triton_type(wide),
        )
        launch(gradient, (parts, tiles.in_channels), part.device, arguments | tiles.arguments())
        arguments = dict(parts_at=kept, total_at=sums_of_all, parts=parts, ADD=adds, MOST_PARTS=tiling.MOST_PARTS)
        launch(add_up_parts, (2 * tiles.channels,), part.device, arguments)
    if sums_of_all is not sums:
        sums.copy_(sums_of_all)


@triton.jit(do_not_specialize=sizes("dpart", "du", "part"))
def gradient(
    dpart,
    du,
    part,
    mean,
    scale,
    kept,
    unit: tl.float64,
    samples,
    pixels,
    channels,
    dpart_batch,
    dpart_inner,
    du_batch,
    du_inner,
    part_batch,
    part_inner,
    DPART_LAST: tl.constexpr,
    DU_LAST: tl.constexpr,
    PART_LAST: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    centre = load(mean + c, channel_here, WIDE)[:, None]
    factor = load(scale + c, channel_here, WIDE)[:, None]
    sum_du = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], WIDE)
    sum_product = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], WIDE)
    for number in range(TILES):
        tile = tl.program_id(0) * TILES + number
        b, s, here = pixels_of(tile, samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
        d = load(du + places(b, s, c, du_batch, du_inner, DU_LAST, PIXEL_UNIT, CHANNEL_UNIT), here, WIDE)
        x = load(part + places(b, s, c, part_batch, part_inner, PART_LAST, PIXEL_UNIT, CHANNEL_UNIT), here, WIDE)
        sum_du += d
        sum_product += tl.where(here, d * (x * scalar(unit, WIDE) - centre), 0.0)
        at = places(b, s, c, dpart_batch, dpart_inner, DPART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
        tl.store(dpart + at, narrow(load(dpart + at, here, WIDE) + factor * d, dpart), mask=here)
    keep_part(kept, tl.sum(sum_du, axis=1), 0, c, channel_here, channels, CHANNEL_UNIT)
    keep_part(kept, tl.sum(sum_product, axis=1), 1, c, channel_here, channels, CHANNEL_UNIT)


def add_norm_rest_(
    dpart: Tensor,
    part: Tensor,
    mean: Tensor,
    deviation: Tensor,
    scale: Tensor,
    sums: Tensor,
    count: int,
    unit: float,
) -> None:
    with ExitStack() as stack:
        dpart, part = stack.enter_context(writable(dpart)), readable(part)
        wide = wide_dtype(dpart, part, mean)
        tiles = Tiles(wide, dpart=dpart, part=part)
        arguments: dict[str, Any] = dict(
            dpart=dpart,
            part=part,
            mean=mean.contiguous(),
            deviation=deviation.contiguous(),
            scale=scale.contiguous(),
            sums=sums.contiguous(),
            count=float(count),
            unit=unit,
            WIDE=triton_type(wide),
        )
        launch(rest, tiles.grid(), part.device, arguments | tiles.arguments())


@triton.jit(do_not_specialize=sizes("dpart", "part"))
def rest(
    dpart,
    part,
    mean,
    deviation,
    scale,
    sums,
    count: tl.float64,
    unit: tl.float64,
    samples,
    pixels,
    channels,
    dpart_batch,
    dpart_inner,
    part_batch,
    part_inner,
    DPART_LAST: tl.constexpr,
    PART_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    b, s, here = pixels_of(tl.program_id(0), samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
    width = load(deviation + c, channel_here, WIDE)
    factor = divide(load(scale + c, channel_here, WIDE), width * 0.0 + scalar(count, WIDE))
    sum_du = load(sums + c, channel_here, WIDE)
    sum_product = load(sums + channels * CHANNEL_UNIT + c, channel_here, WIDE)
    slope = divide(factor * sum_product, tl.where(channel_here, width * width, 1.0))[:, None]
    shift = (factor * sum_du)[:, None]
    at = places(b, s, c, part_batch, part_inner, PART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    x = load(part + at, here, WIDE) * scalar(unit, WIDE) - load(mean + c, channel_here, WIDE)[:, None]
    at = places(b, s, c, dpart_batch, dpart_inner, DPART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    tl.store(dpart + at, narrow(load(dpart + at, here, WIDE) - (slope * x + shift), dpart), mask=here)
