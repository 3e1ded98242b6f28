"""How tensors lie in memory, how a pass over them is cut into tiles, and the launch of a kernel.

A pass works on tiles of channels by pixels, where the pixels of all samples follow each other: p = sample S + pixel.
Each tensor is read and written along the axis on which it is dense; where two tensors differ in that, Triton exchanges
the values through shared memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
TILE = 2048  # values that a program works on at a time, 16 a thread
MOST_PARTS = 2048  # programs that take a sum, at most: each leaves one part of it; one program adds up all of a channel

FAR = 2**30  # places from here on are counted in 64 bit: sums of 32 bit stay far from their end

_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


# ---- tensors -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Value (b, c, s) lies at b batch_stride + c inner_stride + s, or, with the channels last, + s inner_stride + c."""

    channels_last: bool
    batch_stride: int
    inner_stride: int


def layout_of(x: Tensor) -> Layout | None:
    """How (B, C, ...) lies in memory; None: neither its channels nor its pixels are next to each other."""
    samples, channels, *sides = x.shape
    pixels = prod(sides)
    if not x.numel():  # nowhere, and whatever its strides say it counts as contiguous
        return Layout(False, channels * pixels, pixels)
    pixel_stride = _stride_of_all(sides, x.stride()[2:])
    if pixel_stride is None:
        return None
    batch_stride = x.stride(0) if samples > 1 else channels * pixels
    if pixels == 1 and (channels == 1 or x.stride(1) == 1):
        return Layout(True, batch_stride, channels)
    if pixel_stride == 1:
        return Layout(False, batch_stride, x.stride(1) if channels > 1 else pixels)
    if x.stride(1) == 1 or channels == 1:
        return Layout(True, batch_stride, pixel_stride)
    return None


def _stride_of_all(sides: list[int], strides: tuple[int, ...]) -> int | None:
    """The step from one pixel to the next, if it is the same for all."""
    step = expected = None
    for side, stride in zip(reversed(sides), reversed(strides), strict=True):
        if side == 1:
            continue
        if expected is not None and stride != expected:
            return None
        step = stride if step is None else step
        expected = stride * side
    return 1 if step is None else step


def readable(x: Tensor) -> Tensor:
    """x, or a copy if its layout is none that the kernels know."""
    return x if layout_of(x) is not None else x.contiguous()


@contextmanager
def writable(x: Tensor) -> Iterator[Tensor]:
    """x, or a copy whose values return to x at the end, if its layout is none that the kernels know."""
    known = readable(x)
    yield known
    if known is not x:
        x.copy_(known)


def triton_type(dtype: torch.dtype) -> Any:
    return _TRITON_TYPES[dtype]


# ---- tiles ---------------------------------------------------------------------------------------


class Tiles:
    """A pass over tensors of one shape (B, C, ...), with arithmetic in `wide`.

    `shape` and `blocks` are arguments of every kernel. Sizes and strides are given in units of the largest power of two
    up to 16 that divides them all: so the compiler knows that a thread may read so many values at once.
    """

    def __init__(self, wide: torch.dtype, **tensors: Tensor):
        first = next(iter(tensors.values()))
        self.layouts = {name: _known_layout(x) for name, x in tensors.items()}
        self.samples, self.channels = first.shape[:2]
        self.pixels = prod(first.shape[2:])
        last = [each for each in self.layouts.values() if each.channels_last]
        others = [each for each in self.layouts.values() if not each.channels_last]
        self.pixel_unit = _common_power_of_two(self.pixels, others)
        self.channel_unit = _common_power_of_two(self.channels, last)
        tile = TILE // (2 if wide == torch.float64 else 1)  # values of twice the size take twice the registers
        self.block_channels = min(triton.next_power_of_2(self.channels), 64 if last else 8)
        self.block_pixels = tile // self.block_channels
        self.all_pixels = self.samples * self.pixels
        self.in_pixels = ceil(self.all_pixels / self.block_pixels)  # tiles
        self.in_channels = ceil(self.channels / self.block_channels)
        reach = [each.batch_stride * self.samples + each.inner_stride * max(self.channels, self.pixels)
                 for each in self.layouts.values()]  # fmt: skip
        self.large = max(self.all_pixels, *reach) >= FAR

    def arguments(self) -> dict[str, Any]:
        """The arguments of a kernel that say where values lie."""
        units = {False: self.pixel_unit, True: self.channel_unit}
        strides: dict[str, Any] = {}
        for name, (last, batch_stride, inner_stride) in self.layouts.items():
            strides[f"{name}_batch"] = batch_stride // units[last]
            strides[f"{name}_inner"] = inner_stride // units[last]
            strides[f"{name}_LAST".upper()] = last
        return strides | dict(
            samples=self.samples,
            pixels=self.pixels // self.pixel_unit,
            channels=self.channels // self.channel_unit,
            PIXEL_UNIT=self.pixel_unit,
            CHANNEL_UNIT=self.channel_unit,
            BLOCK_PIXELS=self.block_pixels,
            BLOCK_CHANNELS=self.block_channels,
            LARGE=self.large,
        )

    def grid(self) -> tuple[int, int]:
        """One program a tile."""
        return self.in_pixels, self.in_channels

    def runs(self) -> tuple[int, int]:
        """(parts, tiles a part), for sums over the pixels: a program goes through several tiles one after another.

        Their number is a power of two, so that a kernel compiled for one shape serves others.
        """
        most = max(1, MOST_PARTS // self.in_channels)
        tiles = triton.next_power_of_2(max(1, ceil(self.in_pixels / most)))
        return ceil(self.in_pixels / tiles), tiles


def _known_layout(x: Tensor) -> Layout:
    layout = layout_of(x)
    if layout is None:
        raise ValueError(f"strides {tuple(x.stride())} of shape {tuple(x.shape)} are none that the kernels know")
    return layout


def _common_power_of_two(size: int, layouts: list[Layout]) -> int:
    if not layouts:
        return 1
    numbers = [size, *(each.batch_stride for each in layouts), *(each.inner_stride for each in layouts)]
    return next(unit for unit in (16, 8, 4, 2, 1) if not any(number % unit for number in numbers))


# ---- launches ------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are written down and not made: for compilation without a GPU, on tensors without values."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any], **options: Any) -> None:
    """Run `kernel` on the current stream of `device`."""
    options = {"num_warps": WARPS} | options
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, arguments, options))
        return
    if not all(grid):
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **options)
