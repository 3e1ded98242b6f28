"""The operators' passes on a CPU, compiled from C (`passes.c`): each one way through memory, without temporaries.

They serve float32. A function here returns None, or False, where it does not serve what it is given (another type,
another layout, no compiler, a mode that watches torch's operations); the specification then runs. Arguments are those
of the operators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from revtrain.kernels.cpu_kernels.build import View, library
from revtrain.kernels.operator import is_real
from revtrain.kernels.shapes import memory_format_of

_PLAIN = (Tensor, torch.nn.Parameter)


def serves(*given: Tensor | None) -> bool:
    """Whether all are plain float32 tensors with values on the CPU, and nobody asks for a graph."""
    graph = torch.is_grad_enabled()
    for each in given:
        if each is not None and (
            type(each) not in _PLAIN or each.dtype != torch.float32 or not each.is_cpu or (graph and each.requires_grad)
        ):
            return False
    return _runs(next(each for each in given if each is not None))


def serves_integers(state: Tensor) -> bool:
    """Whether this is an integer state of which `in_float32` makes what is served."""
    return state.dtype in (torch.int16, torch.int32) and _runs(state)


def in_float32(state: Tensor) -> Tensor:
    """An integer state's values, of which float32 ones are those that `backward=store` works with: to the same bits."""
    return state.to(torch.float32, memory_format=torch.contiguous_format)


def _runs(x: Tensor) -> bool:
    """Whether there are values to run on, nothing that has to see torch's operations, and a library."""
    return is_real(x) and x.numel() > 0 and not torch._C._are_functorch_transforms_active() and library() is not None


def read_part(
    part: Tensor, scale: Tensor | None, shift: Tensor | None, unit: float, dtype: torch.dtype, channels_last: bool
) -> Tensor | None:
    if dtype != torch.float32:
        return None
    part = in_float32(part) if serves_integers(part) else part
    if not serves(part, scale, shift):
        return None
    u = torch.empty(part.shape, dtype=dtype, memory_format=memory_format_of(part, channels_last))
    way = way_through(part.shape, u.stride(), part.stride())
    if way is None:
        return None
    scale, shift = (None if each is None else each.contiguous() for each in (scale, shift))
    of_u, of_part = way.views(u, part)
    _call("read", of_part, of_u, way.last, *way.shape, unit, _at(scale), _at(shift))
    return u


def add_to_part_(
    part: Tensor, residual: Tensor, factor: float, step: float, exact: bool, limit: float, overflows: Tensor | None
) -> bool:
    """`exact`: a product with `factor` is."""
    if part.shape != residual.shape or not serves(part, residual):
        return False
    way = way_through(part.shape, residual.stride(), part.stride())
    if way is None:
        return False
    before, after = (1.0, 1.0) if not step else (factor / step, 1.0) if exact else (factor, 1 / step)
    of_residual, of_part = way.views(residual, part)
    beyond = _call("add", of_part, of_residual, way.last, *way.shape, factor, step, before, after, limit)
    _written(part)
    if overflows is not None and step:
        overflows += beyond
    return True


def sums(part: Tensor, mean: Tensor | None) -> Tensor:
    """(B, C) in float64: of the values; with `mean` of the squares of what is left. Of what is served, with rows."""
    made = torch.empty(part.shape[:2], dtype=torch.float64)
    mean = None if mean is None else mean.contiguous()
    _call("sums", _at(part), part.stride(0), *_shape(part), _at(mean), _at(made))
    return made


def normalise_activate_(
    x: Tensor, mean: Tensor, factor: Tensor, bias: Tensor, slope: float, signs: Tensor | None
) -> bool:
    """y of x, and the signs of z into `signs`."""
    if not (serves(x, mean, factor, bias) and _is_dense(x) and _fits_signs(x, signs)):
        return False
    values = [each.contiguous() for each in (mean, factor, bias)]
    _call("forward", _at(x), *_shape(x), *map(_at, values), slope, _at(signs))
    _written(x)
    return True


def norm_activation_sums(
    y: Tensor, dy: Tensor, signs: Tensor | None, gain: Tensor, bias: Tensor, slope: float
) -> Tensor | None:
    """(2, C), float32."""
    if not (serves(y, dy, gain, bias) and _is_dense(y) and _is_dense(dy) and _fits_signs(y, signs)):
        return None
    made = torch.empty(2, *y.shape[:2], dtype=torch.float64)
    values = [each.contiguous() for each in (gain, bias)]
    _call("activation_sums", _at(y), _at(dy), _at(signs), *_shape(y), *map(_at, values), slope, _at(made))
    return made.sum(1).to(y.dtype)


def undo_norm_activation_(
    y: Tensor,
    dy: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    gain: Tensor,
    bias: Tensor,
    slope: float,
    means: Tensor | None,
) -> bool:
    if not (serves(y, dy, mean, deviation, gain, bias, means) and _is_dense(y) and _is_dense(dy)):
        return False
    if not _fits_signs(y, signs):
        return False
    values = [each.contiguous() for each in (mean, deviation, gain, bias)]
    means = None if means is None else means.contiguous()
    _call("undo", _at(y), _at(dy), _at(signs), *_shape(y), *map(_at, values), slope, _at(means))
    _written(y, dy)
    return True


def add_norm_gradient_(dpart: Tensor, du: Tensor, part: Tensor, mean: Tensor, scale: Tensor) -> Tensor | None:
    """The sums (2, C), float32, of these values alone."""
    if not serves(dpart, du, part, mean, scale):
        return None
    way = way_through(part.shape, du.stride(), dpart.stride(), part.stride())
    if way is None:
        return None
    samples, channels, rows, _ = way.shape
    parts = min(rows, SUMS)
    made = torch.zeros(2, samples * parts, channels, dtype=torch.float64)
    mean, scale = mean.contiguous(), scale.contiguous()
    of_du, of_dpart, of_part = way.views(du, dpart, part)
    _call("norm_gradient", of_dpart, of_du, way.last, of_part, *way.shape, _at(mean), _at(scale), _at(made), parts)
    _written(dpart)
    return made.sum(1).to(part.dtype)


def add_norm_rest_(dpart: Tensor, part: Tensor, slope: Tensor, shift: Tensor) -> bool:
    """dpart -= slope part + shift."""
    if not (serves(dpart, part, slope, shift) and has_rows(dpart) and has_rows(part)):
        return False
    slope, shift = slope.contiguous(), shift.contiguous()
    _call("norm_rest", _at(dpart), dpart.stride(0), _at(part), part.stride(0), *_shape(part), _at(slope), _at(shift))
    _written(dpart)
    return True


def pool_(units: Tensor, factor: int, back: bool, piece_bytes: int) -> bool:
    """The pixels of each unit (C, H, W) of `units` (B, C, H, W), of four bytes a value, as r^2 images of (C, H/r, W/r),
    r the `factor`; or `back`. Each thread copies a unit, all together `piece_bytes` or one unit."""
    if not (units.dim() == 4 and units.dtype in (torch.float32, torch.int32) and units.is_cpu and _runs(units)):
        return False
    if type(units) is not Tensor or units.requires_grad or not units.is_contiguous():
        return False
    threads = min(torch.get_num_threads(), max(1, piece_bytes // (units[0].numel() * units.element_size())))
    copies = torch.empty(threads, *units.shape[1:], dtype=units.dtype)
    _call("pool", _at(units), *units.shape, factor, back, _at(copies), threads=threads)
    _written(units)
    return True


# ---- how tensors lie ---------------------------------------------------------------------------------


LONG = 2**14  # pixels: fewer than that are one row, where they lie so; more stay rows, which threads can share
SUMS = 16  # that are made apart of the rows of a sample, however many threads there are


class Way(NamedTuple):
    """How passes go through tensors of one shape (B, C, ...): by samples, channels, and rows without gaps."""

    shape: tuple[int, int, int, int]  # samples, channels, rows, pixels of a row
    apart: tuple[tuple[int, int, int], ...]  # of each tensor: how many values samples, rows and channels lie apart
    last: bool  # whether the first of them is channels last

    def views(self, *tensors: Tensor) -> tuple[View, ...]:
        """For the compiled passes."""
        return tuple(View(each.data_ptr(), *apart) for each, apart in zip(tensors, self.apart, strict=True))


@lru_cache(maxsize=4096)
def way_through(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Way | None:
    """Through tensors of one shape (B, C, ...), which may be tiles of others, the first one perhaps channels last; None
    where one has no rows without gaps, or values that share memory."""
    if len(shape) < 2 or any(size > 1 and not step for each in strides for size, step in zip(shape, each, strict=True)):
        return None
    levels: list[tuple[int, tuple[int, ...]]] = []  # pixels of a row, rows, planes: how many, and their strides
    for dim in range(len(shape) - 1, 1, -1):
        size, steps = shape[dim], tuple(each[dim] for each in strides)
        if levels and size == 1:
            continue
        if levels:
            inner, of_inner = levels[-1]
            joins = all(step == inner * other for step, other in zip(steps, of_inner, strict=True))
            if joins and (len(levels) > 1 or inner * size <= LONG):
                levels[-1] = inner * size, of_inner
                continue
        levels.append((size, steps))
    samples = shape[0], tuple(each[0] for each in strides)
    if len(levels) == 3 and samples[0] == 1:  # the planes of a volume are as samples
        samples = levels.pop()
    levels += [(1, (0,) * len(strides))] * (2 - len(levels))
    (pixels, of_pixels), (rows, of_rows), *planes = levels
    of_channels = tuple(each[1] for each in strides)
    first, *others = (pixels == 1 or step == 1 for step in of_pixels)
    last = not first and of_pixels[0] == shape[1] and of_channels[0] == 1
    if planes or not (first or last) or not all(others):
        return None
    apart = tuple(zip(samples[1], of_rows, of_channels, strict=True))
    return Way((samples[0], shape[1], rows, pixels), apart, last)


def has_rows(x: Tensor) -> bool:
    """Whether each sample of x (B, C, ...) is dense, its channels one behind the other."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return x.dim() > 1


def _is_dense(x: Tensor) -> bool:
    return x.dim() > 1 and x.is_contiguous()


def _fits_signs(x: Tensor, signs: Tensor | None) -> bool:
    """Whether each channel, and each row of it, begins a byte of the signs: they then lie as the specification, which
    may run on the way back, has them in its pieces."""
    return signs is None or (x[0, 0].numel() % 8 == 0 and (x.dim() < 4 or x.stride(2) % 8 == 0))


def _shape(x: Tensor) -> tuple[int, int, int]:
    samples, channels = x.shape[:2]
    return samples, channels, x.numel() // (samples * channels)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _call(name: str, *arguments: object, threads: int | None = None) -> int:
    return getattr(library(), f"revtrain_{name}")(*arguments, threads or torch.get_num_threads())


def _written(*tensors: Tensor) -> None:
    """Let autograd see that values have changed."""
    for each in tensors:
        if not each.is_inference():
            torch.autograd.graph.increment_version(each)
