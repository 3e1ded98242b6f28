"""add_to_part_ in one pass: round, add, count."""

from contextlib import ExitStack
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revtrain.kernels.shapes import wide_dtype
from revtrain.kernels.triton_kernels.device import (
    channels_of,
    load,
    narrow,
    pixels_of,
    places,
    round_half_even,
    scalar,
    sizes,
)
from revtrain.kernels.triton_kernels.tiling import Tiles, launch, readable, triton_type, writable


def add_to_part_(
    part: Tensor,
    residual: Tensor,
    factor: float,
    step: float,
    limit: float,
    overflows: Tensor | None,
    no_numbers: Tensor | None,
) -> None:
    integer = not part.is_floating_point()
    with ExitStack() as stack:
        part, residual = stack.enter_context(writable(part)), readable(residual)
        wide = wide_dtype(residual, part)
        tiles = Tiles(wide, part=part, residual=residual)
        arguments: dict[str, Any] = dict(
            part=part,
            residual=residual,
            overflows=overflows if step or integer else None,
            no_numbers=None if no_numbers is None or not integer else no_numbers.view(torch.uint8),
            factor=factor,
            # a power of two: a product with it is exact, alone or together with the factor
            steps=1 / step if step else 1.0,
            step=step,
            limit=limit,
            GRID=bool(step),
            INTEGER=integer,
            # the residual is rounded in its own precision, and added in that of both
            WIDE=triton_type(wide_dtype(residual) if step else wide),
            SUM=(tl.int32 if part.dtype == torch.int16 else tl.int64) if integer else triton_type(wide),
        )
        # A product and a sum that are rounded once, as one instruction, would not be the specification's bits.
        launch(kernel, tiles.grid(), part.device, arguments | tiles.arguments(), enable_fp_fusion=False)


@triton.jit(do_not_specialize=sizes("part", "residual"))
def kernel(
    part,
    residual,
    overflows,
    no_numbers,
    factor: tl.float64,
    steps: tl.float64,
    step: tl.float64,
    limit: tl.float64,
    samples,
    pixels,
    channels,
    part_batch,
    part_inner,
    residual_batch,
    residual_inner,
    PART_LAST: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    GRID: tl.constexpr,
    INTEGER: tl.constexpr,
    WIDE: tl.constexpr,
    SUM: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    c, channel_here = channels_of(channels, CHANNEL_UNIT, BLOCK_CHANNELS, LARGE)
    b, s, here = pixels_of(tl.program_id(0), samples, pixels, channel_here, PIXEL_UNIT, BLOCK_PIXELS, LARGE)
    at = places(b, s, c, residual_batch, residual_inner, RESIDUAL_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    scaled = load(residual + at, here, WIDE) * scalar(factor, WIDE)
    if GRID:
        scaled = round_half_even(scaled * scalar(steps, WIDE))
    at = places(b, s, c, part_batch, part_inner, PART_LAST, PIXEL_UNIT, CHANNEL_UNIT)
    if INTEGER:
        bound: tl.constexpr = 1073741824.0 if tl.int32 == SUM else 4611686018427387904.0
        beyond = (tl.abs(scaled) < bound) == 0  # or not a number
        old = tl.load(part + at, mask=here, other=0).to(SUM)
        total = tl.where(beyond, 0.0, scaled).to(SUM) + old
        new = total.to(part.dtype.element_ty)  # wraps round
        lost = beyond | (new.to(SUM) != total)
        if no_numbers is not None:
            found = tl.sum(tl.sum((beyond & here).to(tl.int32), axis=1), axis=0)
            tl.store(no_numbers, 1, mask=found > 0)
    else:
        if GRID:
            scaled = scaled * scalar(step, WIDE)
        new = narrow(load(part + at, here, SUM) + scaled.to(SUM), part)
        lost = (tl.abs(new.to(SUM)) < scalar(limit, SUM)) == 0
    tl.store(part + at, new, mask=here)
    if overflows is not None:
        count = tl.sum(tl.sum((lost & here).to(tl.int32), axis=1), axis=0)
        tl.atomic_add(overflows, count.to(tl.int64), mask=count > 0, sem="relaxed")
