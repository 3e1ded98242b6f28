"""Run by tests/test_kernels.py in a process of its own with TRITON_INTERPRET=1: each operator's kernel, in Triton's
interpreter on the CPU, against its specification over random cases.

    python tests/kernel_worker.py CASES [OPERATOR ...]

One line of JSON for each operator: {"operator", "cases", "seconds", "failures": [...], "seen": {what: cases}}.
Grids are compared bit for bit. Elsewhere both are held against the specification in float64: the distance may be one
rounding of the result's type and a few roundings of the arithmetic's, relative to the magnitudes of the terms.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections import Counter
from math import prod
from typing import Any

import torch
from torch import Tensor

from revtrain.kernels import norm_activation, norm_gradient
from revtrain.kernels import triton_kernels as kernels
from revtrain.kernels.add_to_part import specification as add_to_part_specification
from revtrain.kernels.channel_statistics import specification as statistics_specification
from revtrain.kernels.norm_constants import specification as norm_constants_specification
from revtrain.kernels.read_part import specification as read_part_specification
from revtrain.kernels.shapes import all_but_channels, memory_format_of, per_channel, wide_dtype
from revtrain.kernels.triton_kernels import tiling

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int16, torch.int32]
SPECIAL = [float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 65504.0, -3e38, 2.0**30, -(2.0**62), 1e-45, 127.998]
EVERYTHING = 2**40  # bytes of a piece: specifications work in one


class Case:
    """One random case: `pick` and tensors come from its seed alone; `expect` notes what differs."""

    def __init__(self, seed: int, seen: Counter):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.failures: list[str] = []
        self.seen = seen
        # tiles smaller than the shapes, and larger; sums in one part and in many
        tiling.TILE = self.pick([256, 512, 2048])
        tiling.MOST_PARTS = self.pick([1, 2, 4, 2048])
        tiling.FAR = self.pick([2**30, 2**30, 0])  # places in 64 bit
        self.shape = self._shape()
        self.channels = self.shape[1]
        self.unusual = self.random.random() < 0.25  # strides that no kernel knows, once in a while
        self.extreme = self.random.random() < 0.3

    def pick(self, choices: list) -> Any:
        chosen = self.random.choice(choices)
        if isinstance(chosen, torch.dtype):
            self.seen[str(chosen)] += 1
        return chosen

    def _shape(self) -> tuple[int, ...]:
        kind = self.pick([0, 1, 2, 2, 2, 2, 3, 3])
        sides = [self.pick([1, 2, 3, 4, 5, 7, 8, 9, 16]) for _ in range(kind)]
        channels = self.pick([1, 2, 3, 4, 5, 8, 16, 17, 24]) if self.random.random() < 0.9 else self.pick([33, 64, 70])
        samples = self.pick([1, 1, 2, 3, 5]) if self.random.random() < 0.97 else 0
        most = 4500 if tiling.TILE == 2048 else 700  # the interpreter takes milliseconds for each program
        while samples * channels * prod(sides) > most:
            channels = max(1, channels // 2)
            sides = [max(1, side // 2) for side in sides] if channels == 1 else sides
        self.seen["one image"] += samples == 1
        self.seen["no image"] += samples == 0
        self.seen["64 bit"] += tiling.FAR == 0
        self.seen["3-D"] += kind == 3
        self.seen["odd"] += prod(sides) % 8 != 0
        self.seen["several tiles"] += samples * channels * prod(sides) > tiling.TILE
        return samples, channels, *sides

    def values(self, shape: tuple[int, ...], dtype: torch.dtype, extreme: bool | None = None) -> Tensor:
        """Dense values in the usual order."""
        if not dtype.is_floating_point:
            limits = torch.iinfo(dtype)
            x = torch.randint(-3000, 3000, shape, generator=self.generator)
            edge = torch.randint(0, 50, shape, generator=self.generator)
            x = torch.where(
                edge == 0, limits.max - x.abs() % 300, torch.where(edge == 1, limits.min + x.abs() % 300, x)
            )
            return x.to(dtype)
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * self.random.choice([0.1, 1.0, 30.0])
        if self.extreme if extreme is None else extreme:
            at = torch.rand(shape, generator=self.generator) < 0.05
            which = torch.randint(0, len(SPECIAL), shape, generator=self.generator)
            x = torch.where(at, torch.tensor(SPECIAL, dtype=torch.float64)[which], x)
        return x.to(dtype)

    def part(self, dtype: torch.dtype, extreme: bool | None = None) -> Tensor:
        """A part of a state: dense, or a slice along the channels, samples further apart; also channels last."""
        samples, channels, *sides = self.shape
        before, behind = self.random.choice([(0, 0), (0, 3), (channels, 0), (2, 1)])
        state = self.values((samples, before + channels + behind, *sides), dtype, extreme)
        state = state.contiguous(memory_format=memory_format_of(state, self.random.random() < 0.3))
        part = state[:, before : before + channels]
        self.seen["strided"] += not part.is_contiguous()
        return self._unusual(part)

    def dense(self, dtype: torch.dtype, extreme: bool | None = None) -> Tensor:
        """A dense tensor of either memory format."""
        x = self.values(self.shape, dtype, extreme)
        last = self.random.random() < 0.5
        self.seen["channels last"] += last and x.dim() > 3
        return self._unusual(x.contiguous(memory_format=memory_format_of(x, last)))

    def _unusual(self, x: Tensor) -> Tensor:
        if self.unusual and x.dim() > 3 and self.random.random() < 0.5:
            self.seen["unusual strides"] += 1
            if self.random.random() < 0.5:
                return x.transpose(2, 3).contiguous().transpose(2, 3)
            wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + 2)
            wider[..., : x.shape[-1]] = x
            return wider[..., : x.shape[-1]]
        return x

    def per_channel(self, dtype: torch.dtype, least: float | None = None) -> Tensor:
        x = torch.randn(self.channels, generator=self.generator, dtype=torch.float64)
        return (x if least is None else x.abs() + least).to(dtype)

    # ---- what must hold ----

    def same_bits(self, what: str, got: Tensor, expected: Tensor) -> None:
        same = (got == expected) & ((got != 0) | (got.sign() == expected.sign()))
        if got.is_floating_point():
            same = (same & (torch.signbit(got) == torch.signbit(expected))) | (got.isnan() & expected.isnan())
        self._note(what, same, got, expected)

    def near(
        self, what: str, got: Tensor, expected: Tensor, exact: Tensor, magnitude: Tensor, wide: torch.dtype
    ) -> None:
        """got is `exact` but for one rounding to its own type and a few in `wide`; or what the specification says."""
        if got.dtype != expected.dtype or got.shape != expected.shape:
            self.failures.append(f"{what}: {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}")
            return
        own = torch.finfo(got.dtype)
        bound = own.eps * exact.abs() + own.smallest_normal * own.eps + 8 * torch.finfo(wide).eps * magnitude
        good = (got.double() - exact).abs() <= bound
        same = (got == expected) | (got.isnan() & expected.isnan())
        # an overflow on the edge of the range may go either way
        beyond = (exact.abs() + bound > own.max) | (magnitude > own.max) | (magnitude > torch.finfo(wide).max)
        self._note(what, good | same | beyond, got, expected)

    def _note(self, what: str, good: Tensor, got: Tensor, expected: Tensor) -> None:
        if not good.all():
            place = tuple((~good).nonzero()[0].tolist())
            self.failures.append(
                f"{what} of shape {self.shape}, tile {tiling.TILE}: {int((~good).sum())} differ, at {place} "
                f"{got[place].item()!r} and not {expected[place].item()!r} ({got.dtype})"
            )


# ---- operators -----------------------------------------------------------------------------------


def case_read_part(case: Case) -> None:
    part, dtype = case.part(case.pick(FLOATS + INTEGERS)), case.pick(FLOATS)
    unit = case.pick([1.0, 2.0**-8, 2.0**-16, 0.3])
    wide = wide_dtype(part, dtype)
    normalised = case.pick([True, False])
    scale, shift = (case.per_channel(wide), case.per_channel(wide)) if normalised else (None, None)
    last = case.pick([True, False])
    got = kernels.read_part(part, scale, shift, unit, dtype, last)
    expected = read_part_specification(part, scale, shift, unit, dtype, last)
    case.seen["two layouts"] += got.dim() > 3 and got.is_contiguous() != part.is_contiguous()
    if got.stride() != expected.stride():
        case.failures.append(f"strides {got.stride()}, expected {expected.stride()}")
    u = part.double() * unit
    exact, magnitude = u, u.abs()
    if normalised:
        exact = u * per_channel(scale, u).double() + per_channel(shift, u).double()
        magnitude = (u * per_channel(scale, u)).abs() + per_channel(shift, u).abs()
    case.near("u", got, expected, exact, magnitude, wide)


def case_add_to_part_(case: Case) -> None:
    kind = case.pick(["integer", "integer", "grid", "plain"])
    part = case.part(
        case.pick(
            INTEGERS if kind == "integer" else FLOATS if kind == "plain" else [torch.float32] * 3 + [torch.float64]
        )
    )
    residual = case.dense(case.pick(FLOATS))
    factor = case.pick([1.0, -1.0, 0.5, -0.25, 0.3, -0.7])
    step = 0.0 if kind == "plain" else case.pick([2.0**-8, 2.0**-16, 0.5])
    if step:
        ties = torch.rand(case.shape, generator=case.generator) < 0.3
        half = ((residual.double() / step).clamp(-1e6, 1e6).nan_to_num().floor() + 0.5) * step
        residual = torch.where(ties, half.to(residual.dtype), residual).contiguous(
            memory_format=memory_format_of(residual, not residual.is_contiguous())
        )
        residual = residual * case.pick([1.0, 1.0, 1000.0])
        if case.extreme:  # around the numbers that are too large for the sums' type
            edges = torch.tensor([2.0**29, 2.0**30 - 64, 2.0**30, 1.5 * 2**30, 2.0**31, 2.0**61, 2.0**62, 2.0**63])
            which = torch.randint(0, len(edges), case.shape, generator=case.generator)
            at = torch.rand(case.shape, generator=case.generator) < 0.1
            residual = torch.where(at, (edges[which] * step / factor).to(residual.dtype), residual)
    if kind == "grid":
        part.copy_((part.double() / step).round().mul(step))
        zeros = torch.rand(case.shape, generator=case.generator) < 0.1
        part.masked_fill_(zeros, -0.0)
        residual = residual.masked_fill(zeros, -0.0 if factor > 0 else 0.0)
    limit = case.pick([2.0**8, 3.0]) if kind == "grid" else 0.0
    counters = case.pick([True, True, False])
    results = []
    for form in (kernels.add_to_part_, add_to_part_specification):
        own = _clone(part)
        lost, none = (torch.tensor(7), torch.tensor(False)) if counters else (None, None)
        form(own, residual, factor, step, limit, lost, none)
        results.append((own, lost, none))
    (got, lost, none), (expected, expected_lost, expected_none) = results
    case.seen[kind] += 1
    case.seen["overflow"] += bool(counters and expected_lost > 7)
    case.seen["not a number"] += bool(counters and expected_none)
    if counters and (lost != expected_lost or none != expected_none):
        case.failures.append(f"{kind}: counted {lost}, {none} and not {expected_lost}, {expected_none}")
    if kind == "plain":
        exact, term = part.double() + factor * residual.double(), (factor * residual.double()).abs()
        case.near("part", got, expected, exact, part.double().abs() + term, wide_dtype(part, residual))
    else:
        case.same_bits(f"part ({kind})", got, expected)


def case_channel_statistics(case: Case) -> None:
    part = case.part(case.pick(FLOATS + INTEGERS))
    dtype = torch.float64 if part.dtype == torch.float64 else case.pick([torch.float32, torch.float64])
    unit = case.pick([1.0, 2.0**-8, 0.3])
    if part.is_floating_point() and case.pick([True, False]):
        part.add_(case.pick([1e2, 1e4]))  # far from zero
        case.seen["far mean"] += 1
    got = kernels.channel_statistics(part, unit, dtype)
    expected = statistics_specification(part, unit, dtype, EVERYTHING)
    exact = statistics_specification(part.double(), unit, torch.float64, EVERYTHING)
    size = (part.double() * unit).abs().mean(all_but_channels(part))
    case.near("mean", got[0], expected[0], exact[0], size, dtype)
    spread = size * torch.finfo(dtype).eps
    case.near(
        "variance", got[1], expected[1], exact[1], 2 * exact[1] + exact[1].sqrt() * size + 8 * spread * size, dtype
    )


def case_add_norm_gradient_(case: Case) -> None:
    part, du = case.part(case.pick(FLOATS + INTEGERS)), case.dense(case.pick(FLOATS))
    dpart = case.part(case.pick(FLOATS), extreme=False)
    wide = wide_dtype(part, du, dpart)
    unit = case.pick([1.0, 2.0**-8]) if part.is_floating_point() else 2.0**-8
    mean, scale = case.per_channel(wide), case.per_channel(wide)
    start = torch.randn(2, case.channels, generator=case.generator).to(wide)
    adds = case.pick([True, False])
    results = []
    for form in (kernels.add_norm_gradient_, norm_gradient.gradient_specification):
        own, sums = _clone(dpart), start.clone()
        form(own, du, part, mean, scale, sums, adds, unit)
        results.append((own, sums))
    (got, sums), (expected, expected_sums) = results
    d, x, others = du.double(), part.double() * unit, all_but_channels(part)
    centre, factor = per_channel(mean, x).double(), per_channel(scale, x).double()
    exact = dpart.double() + factor * d
    case.near("dpart", got, expected, exact, dpart.double().abs() + (factor * d).abs(), wide)
    start = start if adds else torch.zeros_like(start)
    exact = start.double() + torch.stack([d.sum(others), (d * (x - centre)).sum(others)])
    terms = [d.abs().sum(others), (d.abs() * (x.abs() + centre.abs())).sum(others)]
    case.near("sums", sums, expected_sums, exact, start.double().abs() + torch.stack(terms), wide)


def case_add_norm_rest_(case: Case) -> None:
    part, dpart = case.part(case.pick(FLOATS + INTEGERS)), case.part(case.pick(FLOATS))
    wide = wide_dtype(part, dpart)
    unit = case.pick([1.0, 2.0**-8]) if part.is_floating_point() else 2.0**-8
    mean, deviation, scale = case.per_channel(wide), case.per_channel(wide, 0.3), case.per_channel(wide)
    sums, count = torch.randn(2, case.channels, generator=case.generator).to(wide), case.pick([1, 7, 50_000])
    got, expected = _clone(dpart), _clone(dpart)
    kernels.add_norm_rest_(got, part, mean, deviation, scale, sums, count, unit)
    slope, shift = norm_gradient.rest_line(mean, deviation, scale, sums, count)
    norm_gradient.rest_specification(expected, part, slope, shift, unit)
    x = part.double() * unit
    slope = per_channel(scale.double() * sums[1].double() / (count * deviation.double().square()), x)
    shift = per_channel(scale.double() * sums[0].double() / count, x)
    centre = per_channel(mean.double(), x)
    exact = dpart.double() - slope * (x - centre) - shift
    magnitude = dpart.double().abs() + slope.abs() * (x.abs() + centre.abs()) + shift.abs()
    case.near("dpart", got, expected, exact, magnitude, wide)


def case_norm_constants(case: Case) -> None:
    wide = case.pick([torch.float32, torch.float64])
    case.channels = case.pick([1, 3, 16, 70, 255, 256, 257, 600])
    mean, variance = case.per_channel(wide), case.per_channel(wide, 0.0)
    weight, bias = case.per_channel(case.pick([wide, torch.float32])), case.per_channel(wide)
    weight[0] = 0.0
    epsilon_i = case.pick([None, 0.0, 0.1])
    signs = case.pick([None, torch.where(case.per_channel(wide) > 0, 1, -1).to(torch.int8)])
    takes, momentum = case.pick([True, False]), case.pick([0.1, 0.7, None])
    running, count = (case.per_channel(torch.float32), case.per_channel(torch.float32, 0.1)), case.pick([1, 2, 5000])
    results = []
    for form in (kernels.norm_constants, norm_constants_specification):
        own = [each.clone() for each in running] if takes else [None, None]
        batches = torch.tensor(4) if takes else None
        made = form(mean, variance, weight, bias, 1e-5, epsilon_i, signs, -1, *own, batches, momentum, count)
        results.append((*made, *(own if takes else []), *([batches.double()] if takes else [])))
    case.seen["running"] += takes
    size = 4 * (mean.abs().max() + variance.max() + weight.abs().max() + bias.abs().max() + 1).double() * 1e3
    for place, (got, expected) in enumerate(zip(*results, strict=True)):
        exact = expected.double()
        shift = place == 5  # a difference of terms that the deviation, which may be small, has made large
        bound = (size if shift else 1) * torch.ones_like(exact) * (1e-3 if shift else 1) + exact.abs()
        case.near(f"number {place}", got, expected, exact, bound, got.dtype)


def case_split_sums(case: Case) -> None:
    wide = case.pick([torch.float32, torch.float64])
    case.channels = case.pick([1, 3, 16, 255, 256, 257, 600])
    sums = torch.stack([case.per_channel(wide), case.per_channel(wide)])
    factor, divisor = case.pick([None, case.per_channel(wide)]), case.pick([None, case.per_channel(wide, 0.3)])
    results = [form(sums, factor, divisor) for form in (kernels.split_sums, norm_gradient.split_specification)]
    for got, expected in zip(*results, strict=True):
        case.near("sums", got, expected, expected.double(), expected.double().abs(), wide)


def _norm_case(case: Case):
    dtype = case.pick(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, bias = case.per_channel(wide), case.per_channel(wide)
    deviation = case.per_channel(wide, 0.3)
    gain = case.per_channel(wide, 0.3) * torch.where(case.per_channel(wide) > 0, 1, -1)
    return dtype, wide, mean, deviation, gain, bias, case.pick([1.0, 0.5, 0.1])


def case_normalise_activate_(case: Case) -> None:
    dtype, wide, mean, deviation, gain, bias, slope = _norm_case(case)
    x = case.values(case.shape, dtype)
    with_signs = case.pick([True, False])
    got, expected = x.clone(), x.clone()
    signs = torch.full((-(-x.numel() // 8) if with_signs else 0,), 255, dtype=torch.uint8)
    kernels.normalise_activate_(got, mean, deviation, gain, bias, slope, signs)
    expected_signs = norm_activation.forward_specification(expected, mean, deviation, gain, bias, slope, with_signs)
    factor = per_channel(gain.double() / deviation.double(), x)
    z = (x.double() - per_channel(mean, x).double()) * factor + per_channel(bias, x).double()
    magnitude = (x.double().abs() + per_channel(mean, x).abs()) * factor.abs() + per_channel(bias, x).abs()
    case.near("y", got, expected, torch.where(z > 0, z, z * slope), magnitude, wide)
    if with_signs:
        count = x.numel()
        bits, expected_bits = (norm_activation.unpack_signs(each, count) for each in (signs, expected_signs))
        unsure = (z.abs() <= 8 * torch.finfo(wide).eps * magnitude).flatten()
        case._note("signs", (bits == expected_bits) | unsure, bits, expected_bits)
        if count % 8:  # bits behind the end are zero, in both
            case._note("rest", (signs[-1:] ^ expected_signs[-1:]) >> (count % 8) == 0, signs[-1:], expected_signs[-1:])


def _backward_case(case: Case):
    dtype, wide, mean, deviation, gain, bias, slope = _norm_case(case)
    y, dy = case.values(case.shape, dtype), case.values(case.shape, case.pick(FLOATS))
    signs = case.pick([None, norm_activation.pack_signs(case.values(case.shape, torch.float32, False))])
    case.seen["signs"] += signs is not None
    # in float64, from what is given
    given = dy.to(wide).double()
    negative = ~(y > 0) if signs is None else norm_activation.unpack_signs(signs, y.numel()).view(y.shape)
    dz = torch.where(negative, given * slope, given)
    z = torch.where(y.double() > 0, y.double(), y.double() / slope)
    offset, factor = per_channel(bias, y).double(), per_channel(gain, y).double()
    xhat, size = (z - offset) / factor, (z.abs() + offset.abs()) / factor.abs()
    return wide, mean, deviation, gain, bias, slope, y, dy, signs, dz, xhat, size


def case_norm_activation_sums(case: Case) -> None:
    wide, _, _, gain, bias, slope, y, dy, signs, dz, xhat, size = _backward_case(case)
    got = kernels.norm_activation_sums(y, dy, signs, gain, bias, slope)
    expected = torch.zeros(2, case.channels, dtype=wide)
    norm_activation.sums_specification(expected, y, dy, signs, gain, bias, slope)
    others = all_but_channels(y)
    exact = torch.stack([dz.sum(others), (dz * xhat).sum(others)])
    magnitude = torch.stack([dz.abs().sum(others), (dz.abs() * size).sum(others)])
    case.near("sums", got, expected, exact, magnitude, wide)


def case_undo_norm_activation_(case: Case) -> None:
    wide, mean, deviation, gain, bias, slope, y, dy, signs, dz, xhat, size = _backward_case(case)
    sums = case.pick([None, torch.randn(2, case.channels, generator=case.generator).to(wide)])
    count = case.pick([1, 9, 50_000])
    results = []
    for form in (kernels.undo_norm_activation_, norm_activation.undo_specification):
        x, dx = y.clone(), dy.clone()
        form(x, dx, signs, mean, deviation, gain, bias, slope, sums, count)
        results.append((x, dx))
    (x, dx), (expected_x, expected_dx) = results
    width, factor = per_channel(deviation, y).double(), per_channel(gain, y).double()
    centre = per_channel(mean, y).double()
    case.near("x", x, expected_x, xhat * width + centre, size * width + centre.abs(), wide)
    magnitude = dz.abs()
    if sums is not None:
        means = sums.double() / count
        dz = dz - xhat * per_channel(means[1], y) - per_channel(means[0], y)
        magnitude = magnitude + size * per_channel(means[1], y).abs() + per_channel(means[0], y).abs()
    case.near("dx", dx, expected_dx, dz * factor / width, magnitude * factor.abs() / width, wide)


def _clone(part: Tensor) -> Tensor:
    """The same values with the same strides, in memory of their own."""
    size = part.untyped_storage().nbytes() // part.element_size()
    state = torch.empty(size, dtype=part.dtype).copy_(part.as_strided((size,), (1,), 0))
    return state.as_strided(part.shape, part.stride(), part.storage_offset())


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def main(cases: int, operators: list[str]) -> None:
    torch.set_num_threads(1)
    for name in operators or CASES:
        seen: Counter = Counter()
        failures: list[str] = []
        start = time.process_time()
        for number in range(cases):
            case = Case(zlib.crc32(f"{name} {number}".encode()), seen)
            try:
                CASES[name](case)
            except Exception as error:
                case.failures.append(f"{type(error).__name__}: {error} (shape {case.shape})")
            failures += [f"case {number}: {each}" for each in case.failures]
        seconds = time.process_time() - start
        print(json.dumps(dict(operator=name, cases=cases, seconds=seconds, failures=failures, seen=seen)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
