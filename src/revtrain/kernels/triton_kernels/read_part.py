"""read_part in one pass: unit, normalisation, cast and layout."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revtrain.kernels.shapes import memory_format_of, wide_dtype
from revtrain.kernels.triton_kernels.device import channels_of, load, narrow, pixels_of, places, scalar, sizes
from revtrain.kernels.triton_kernels.tiling import Tiles, launch, readable, triton_type


def read_part(
    part: Tensor, scale: Tensor | None, shift: Tensor | None, unit: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    result = torch.empty(
        part.shape, dtype=dtype, device=part.device, memory_format=memory_format_of(part, channels_last)
    )
    part = readable(part)
    wide = wide_dtype(part, dtype)
    tiles = Tiles(wide, part=part, result=result)
    arguments: dict[str, Any] = dict(
        part=part,
        result=result,
        scale=None if scale is None else scale.contiguous(),
        shift=None if shift is None else shift.contiguous(),
        unit=unit,
        WIDE=triton_type(wide),
    )
    launch(kernel, tiles.grid(), part.device, arguments | tiles.arguments())
    return result


@triton.jit(do_not_specialize=sizes("part", "result"))
def kernel(
    part,
    result,
    scale,
    shift,
    unit: tl.float64,
    samples,
    pixels,
    channels,
    part_batch,
    part_inner,
    result_batch,
    result_inner,
    PART_LAST: tl.constexpr,
    RESULT_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    b, s, here = pixels_of(tl.program_id(0), samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
    at = places(b, s, c, part_batch, part_inner, PART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    u = load(part + at, here, WIDE) * scalar(unit, WIDE)
    if scale is not None:
        u = u * load(scale + c, channel_here, WIDE)[:, None] + load(shift + c, channel_here, WIDE)[:, None]
    at = places(b, s, c, result_batch, result_inner, RESULT_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    tl.store(result + at, narrow(u, result), mask=here)
