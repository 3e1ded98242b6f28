"""normalise_activate_, norm_activation_sums and undo_norm_activation_ in one pass each.

Signs are packed in the order of memory, so the forward pass goes through memory in rows of eight values; the way back
works on tiles of channels by pixels and looks its signs up.
"""

from contextlib import ExitStack
from math import ceil, prod
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


def normalise_activate_(
    x: Tensor, mean: Tensor, deviation: Tensor, gain: Tensor, bias: Tensor, slope: float, signs: Tensor
) -> None:
    dense = x.contiguous()
    pixels = prod(x.shape[2:])
    rows = tiling.TILE // 8
    arguments: dict[str, Any] = dict(
        x=dense,
        mean=mean.contiguous(),
        deviation=deviation.contiguous(),
        gain=gain.contiguous(),
        bias=bias.contiguous(),
        signs=signs,
        slope=slope,
        values=x.numel(),
        channels=x.shape[1],
        # a row of eight values is of one channel: its number is found once, and the row channel_here or does not
        pixels=pixels // 8 if pixels % 8 == 0 else pixels,
        WHOLE_ROWS=pixels % 8 == 0,
        WITH_SIGNS=signs.numel() > 0,
        WIDE=triton_type(wide_dtype(x, mean)),
        ROWS=rows,
        LARGE=x.numel() >= tiling.FAR,
    )
    launch(forward, (ceil(x.numel() / (8 * rows)),), x.device, arguments)
    if dense is not x:
        x.copy_(dense)


@triton.jit(do_not_specialize=["values", "channels", "pixels"])
def forward(
    x,
    mean,
    deviation,
    gain,
    bias,
    signs,
    slope: tl.float64,
    values,
    channels,
    pixels,
    WHOLE_ROWS: tl.constexpr,
    WITH_SIGNS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LARGE: tl.constexpr,
):
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, 8)
    i = row[:, None] * 8 + place[None, :]
    if WHOLE_ROWS:
        c = ((row // pixels) % channels)[:, None]
        c_here = (row < values // 8)[:, None]
        here = c_here & (place < 8)[None, :]
    else:
        c = (i // pixels) % channels
        here = i < values
        c_here = here
    centre = load(mean + c, c_here, WIDE)
    width = tl.where(c_here, load(deviation + c, c_here, WIDE), 1.0)
    factor = divide(load(gain + c, c_here, WIDE), width)
    z = (load(x + i, here, WIDE) - centre) * factor + load(bias + c, c_here, WIDE)
    positive = z > 0
    if WITH_SIGNS:
        packed = tl.sum(tl.where(positive | (here == 0), 0, 1 << place[None, :]), axis=1)
        tl.store(signs + row, packed.to(tl.uint8), mask=row < (values + 7) // 8)
    tl.store(x + i, narrow(tl.where(positive, z, z * scalar(slope, WIDE)), x), mask=here)


def norm_activation_sums(
    y: Tensor, dy: Tensor, signs: Tensor | None, gain: Tensor, bias: Tensor, slope: float
) -> Tensor:
    y, dy = readable(y), readable(dy)
    wide = wide_dtype(y, gain)
    tiles = Tiles(wide, y=y, dy=dy)
    parts, in_part = tiles.runs()
    kept = torch.empty(2, tiles.channels, parts, dtype=wide, device=y.device)
    result = torch.empty(2, tiles.channels, dtype=gain.dtype, device=y.device)
    arguments: dict[str, Any] = dict(
        y=y,
        dy=dy,
        signs=signs,
        gain=gain.contiguous(),
        bias=bias.contiguous(),
        kept=kept,
        slope=slope,
        TILES=in_part,
        WIDE=triton_type(wide),
    )
    launch(sums, (parts, tiles.in_channels), y.device, arguments | tiles.arguments())
    arguments = dict(parts_at=kept, total_at=result, parts=parts, ADD=False, MOST_PARTS=tiling.MOST_PARTS)
    launch(add_up_parts, (2 * tiles.channels,), y.device, arguments)
    return result


@triton.jit
def before_activation(
    y,
    dy,
    signs,
    b,
    s,
    c,
    here,
    pixels,
    channels,
    slope,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(z, dz) of (y, dy)."""
    slope = scalar(slope, WIDE)
    if signs is None:
        positive = y > 0
    else:
        in_sample = pixels * PIXEL_UNIT
        i = (b * channels * CHANNEL_UNIT * in_sample + s)[None, :] + (c * in_sample)[:, None]
        bits = tl.load(signs + (i >> 3), mask=here, other=0).to(tl.int32)
        positive = ((bits >> (i & 7).to(tl.int32)) & 1) == 0
    z = tl.where(y > 0, y, y * divide(scalar(1.0, WIDE), slope))
    return z, tl.where(positive, dy, dy * slope)


@triton.jit(do_not_specialize=sizes("y", "dy"))
def sums(
    y,
    dy,
    signs,
    gain,
    bias,
    kept,
    slope: tl.float64,
    samples,
    pixels,
    channels,
    y_batch,
    y_inner,
    dy_batch,
    dy_inner,
    Y_LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    factor = tl.where(channel_here, load(gain + c, channel_here, WIDE), 1.0)[:, None]
    offset = load(bias + c, channel_here, WIDE)[:, None]
    sum_dz = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], WIDE)
    sum_product = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], WIDE)
    for number in range(TILES):
        tile = tl.program_id(0) * TILES + number
        b, s, here = pixels_of(tile, samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
        own = load(y + places(b, s, c, y_batch, y_inner, Y_LAST, PIXEL_UNIT, CHANNEL_UNIT), here, WIDE)
        above = load(dy + places(b, s, c, dy_batch, dy_inner, DY_LAST, PIXEL_UNIT, CHANNEL_UNIT), here, WIDE)
        z, dz = before_activation(
            own, above, signs, b, s, c, here, pixels, channels, slope, PIXEL_UNIT, CHANNEL_UNIT, WIDE
        )
        sum_dz += dz
        sum_product += tl.where(here, dz * divide(z - offset, factor), 0.0)
    keep_part(kept, tl.sum(sum_dz, axis=1), 0, c, channel_here, channels, CHANNEL_UNIT)
    keep_part(kept, tl.sum(sum_product, axis=1), 1, c, channel_here, channels, CHANNEL_UNIT)


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
) -> None:
    with ExitStack() as stack:
        y, dy = stack.enter_context(writable(y)), stack.enter_context(writable(dy))
        wide = wide_dtype(y, gain)
        tiles = Tiles(wide, y=y, dy=dy)
        arguments: dict[str, Any] = dict(
            y=y,
            dy=dy,
            signs=signs,
            mean=mean.contiguous(),
            deviation=deviation.contiguous(),
            gain=gain.contiguous(),
            bias=bias.contiguous(),
            sums=None if sums is None else sums.contiguous(),
            slope=slope,
            count=float(count),
            WIDE=triton_type(wide),
        )
        launch(undo, tiles.grid(), y.device, arguments | tiles.arguments())


@triton.jit(do_not_specialize=sizes("y", "dy"))
def undo(
    y,
    dy,
    signs,
    mean,
    deviation,
    gain,
    bias,
    sums,
    slope: tl.float64,
    count: tl.float64,
    samples,
    pixels,
    channels,
    y_batch,
    y_inner,
    dy_batch,
    dy_inner,
    Y_LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    b, s, here = pixels_of(tl.program_id(0), samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
    y_at = y + places(b, s, c, y_batch, y_inner, Y_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    dy_at = dy + places(b, s, c, dy_batch, dy_inner, DY_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    z, dz = before_activation(
        load(y_at, here, WIDE),
        load(dy_at, here, WIDE),
        signs,
        b,
        s,
        c,
        here,
        pixels,
        channels,
        slope,
        PIXEL_UNIT,
        CHANNEL_UNIT,
        WIDE,
    )
    width = tl.where(channel_here, load(deviation + c, channel_here, WIDE), 1.0)
    factor = tl.where(channel_here, load(gain + c, channel_here, WIDE), 1.0)
    xhat = divide(z - load(bias + c, channel_here, WIDE)[:, None], factor[:, None])
    if sums is not None:
        number = width * 0.0 + scalar(count, WIDE)
        of_dz = divide(load(sums + c, channel_here, WIDE), number)
        of_product = divide(load(sums + channels * CHANNEL_UNIT + c, channel_here, WIDE), number)
        dz = dz - xhat * of_product[:, None] - of_dz[:, None]
    x = xhat * width[:, None] + load(mean + c, channel_here, WIDE)[:, None]
    tl.store(dy_at, narrow(dz * divide(factor, width)[:, None], dy), mask=here)
    tl.store(y_at, narrow(x, y), mask=here)
