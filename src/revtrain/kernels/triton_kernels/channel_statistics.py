"""channel_statistics in one pass over the part: mean and squares of each tile, put together by Chan's formula.

Sums of squares would cancel where a mean is far from zero; squares of what is left of a tile's own mean do not.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revtrain.kernels.shapes import wide_dtype
from revtrain.kernels.triton_kernels import tiling
from revtrain.kernels.triton_kernels.device import (
    channels_of,
    divide,
    keep_part,
    load,
    pixels_of,
    places,
    scalar,
    sizes,
)
from revtrain.kernels.triton_kernels.tiling import Tiles, launch, readable, triton_type


def channel_statistics(part: Tensor, unit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    part = readable(part)
    wide = wide_dtype(part, dtype)
    tiles = Tiles(wide, part=part)
    parts, in_part = tiles.runs()
    kept = torch.empty(2, tiles.channels, parts, dtype=wide, device=part.device)
    mean, variance = (torch.empty(tiles.channels, dtype=dtype, device=part.device) for _ in range(2))
    arguments: dict[str, Any] = dict(part=part, kept=kept, unit=unit, TILES=in_part, WIDE=triton_type(wide))
    launch(kernel, (parts, tiles.in_channels), part.device, arguments | tiles.arguments())
    arguments = dict(
        kept=kept,
        mean=mean,
        variance=variance,
        parts=parts,
        channels=tiles.channels,
        part_pixels=in_part * tiles.block_pixels,
        pixels=tiles.all_pixels,
        share=1 / tiles.all_pixels if tiles.all_pixels else float("nan"),
        MOST_PARTS=tiling.MOST_PARTS,
    )
    launch(merge, (tiles.channels,), part.device, arguments)
    return mean, variance


@triton.jit(do_not_specialize=sizes("part"))
def kernel(
    part,
    kept,
    unit: tl.float64,
    samples,
    pixels,
    channels,
    part_batch,
    part_inner,
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
    count = scalar(0.0, WIDE)
    mean = tl.zeros([BLOCK_CHANNELS], WIDE)
    squares = tl.zeros([BLOCK_CHANNELS], WIDE)
    for number in range(TILES):
        tile = tl.program_id(0) * TILES + number
        b, s, here = pixels_of(tile, samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
        at = places(b, s, c, part_batch, part_inner, PART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
        x = load(part + at, here, WIDE) * scalar(unit, WIDE)
        own_count = tl.sum((b < samples).to(tl.int32), axis=0).to(WIDE)
        own_mean = divide(tl.sum(x, axis=1), tl.maximum(own_count, 1.0))
        centred = tl.where(here, x - own_mean[:, None], 0.0)
        own_squares = tl.sum(centred * centred, axis=1)
        both = count + own_count
        share = divide(own_count, tl.maximum(both, 1.0))
        apart = own_mean - mean
        mean += apart * share
        squares += own_squares + apart * apart * (count * share)
        count = both
    keep_part(kept, mean, 0, c, channel_here, channels, CHANNEL_UNIT)
    keep_part(kept, squares, 1, c, channel_here, channels, CHANNEL_UNIT)


@triton.jit(do_not_specialize=["parts", "channels", "part_pixels", "pixels"])
def merge(kept, mean, variance, parts, channels, part_pixels, pixels, share: tl.float64, MOST_PARTS: tl.constexpr):
    """Mean and variance of all from (2, C, parts), in float64 and in a fixed order; a program takes a channel."""
    c = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MOST_PARTS)
    count = tl.minimum(part_pixels, pixels - i.to(tl.int64) * part_pixels).to(tl.float64)
    means = tl.load(kept + c * parts + i, mask=i < parts, other=0).to(tl.float64)
    squares = tl.load(kept + (channels + c) * parts + i, mask=i < parts, other=0).to(tl.float64)
    each = tl.full((), share, tl.float64)
    centre = tl.sum(tl.where(i < parts, count * means, 0.0), axis=0) * each
    apart = means - centre
    spread = tl.sum(tl.where(i < parts, squares + count * apart * apart, 0.0), axis=0) * each
    tl.store(mean + c, centre.to(mean.dtype.element_ty))
    tl.store(variance + c, spread.to(variance.dtype.element_ty))
