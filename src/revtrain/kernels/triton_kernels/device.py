"""What the kernels share: places in memory, conversions, rounding, and the sum of parts of sums."""

import triton
import triton.language as tl

# Sizes and strides differ from call to call; a kernel is compiled once for all of them.
SIZES = ["samples", "pixels", "channels"]


def sizes(*tensors: str) -> list[str]:
    """The names of the arguments that are sizes, and strides of `tensors`."""
    return SIZES + [f"{name}_{kind}" for name in tensors for kind in ("batch", "inner")]


@triton.jit
def channels_of(channels, CHANNEL_UNIT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, LARGE: tl.constexpr):
    """(the channels of a program, whether there is such a channel)."""
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if LARGE:
        c = c.to(tl.int64)
    return c, c < channels * CHANNEL_UNIT


@triton.jit
def pixels_of(
    tile,
    samples,
    pixels,
    channel_here,
    PIXEL_UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    LARGE: tl.constexpr,
):
    """(sample, pixel within it, whether there is such a value), of the pixels of a tile."""
    in_sample = pixels * PIXEL_UNIT
    if LARGE:
        tile = tile.to(tl.int64)
        in_sample = in_sample.to(tl.int64)
    p = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    return p // in_sample, p % in_sample, channel_here[:, None] & (p < samples * in_sample)[None, :]


@triton.jit
def places(
    b,
    s,
    c,
    batch_stride,
    inner_stride,
    LAST: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
):
    """Where the values of a tile lie, (channels, pixels)."""
    if LAST:
        at = (b * batch_stride * CHANNEL_UNIT + s * inner_stride * CHANNEL_UNIT)[None, :] + c[:, None]
    else:
        at = (b * batch_stride * PIXEL_UNIT + s)[None, :] + (c * inner_stride * PIXEL_UNIT)[:, None]
    return at


@triton.jit
def load(place, here, WIDE: tl.constexpr):
    """Values in float32 or float64, 0 where there are none."""
    x = tl.load(place, mask=here, other=0)
    if x.dtype == tl.bfloat16 or x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x.to(WIDE)


@triton.jit
def narrow(x, place):
    """float32 or float64, rounded to the type at `place`."""
    NARROW: tl.constexpr = place.dtype.element_ty
    if tl.bfloat16 == NARROW or tl.float16 == NARROW:
        x = x.to(tl.float32)
    return x.to(NARROW)


@triton.jit
def scalar(value, WIDE: tl.constexpr):
    """A number of Python's, which comes in float64."""
    return tl.full((), value, WIDE)


@triton.jit
def divide(x, y):
    """x / y, rounded correctly: `/` is not in float32."""
    return tl.math.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def round_half_even(x):
    """The nearest whole number of float32 or float64; its sign is that of x, also for 0."""
    magnitude = tl.abs(x)
    # From 2^52, and 2^23, on neighbours are 1 apart: adding that much rounds, and anything above is a whole number.
    whole: tl.constexpr = 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0
    rounded = tl.where(magnitude < whole, (magnitude + whole) - whole, magnitude)
    if x.dtype == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & -9223372036854775808
        rounded = (rounded.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        rounded = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def keep_part(parts_at, sums, which, c, channel_here, channels, CHANNEL_UNIT: tl.constexpr):
    """A program's sums, one a channel, as part number program_id(0) of the sum `which` in (2, C, parts)."""
    row = (which * channels * CHANNEL_UNIT + c).to(tl.int64)
    tl.store(parts_at + row * tl.num_programs(0) + tl.program_id(0), sums, mask=channel_here)


@triton.jit(do_not_specialize=["parts"])
def add_up_parts(parts_at, total_at, parts, ADD: tl.constexpr, MOST_PARTS: tl.constexpr):
    """The sum of each row of (rows, parts), in float64 and in a fixed order; a program takes a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MOST_PARTS)
    result = tl.sum(tl.load(parts_at + row * parts + i, mask=i < parts, other=0).to(tl.float64), axis=0)
    if ADD:
        result += tl.load(total_at + row).to(tl.float64)
    tl.store(total_at + row, result.to(total_at.dtype.element_ty))
