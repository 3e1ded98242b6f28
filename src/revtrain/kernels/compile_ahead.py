"""Compile the kernels without a GPU: what a launch would compile, for any architecture of NVIDIA's.

The launches themselves are taken from the functions that make them, called with tensors that have no values, so that
block sizes, types and flags are those of a training step.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100)

_NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel."""

    kernel: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: registers that found no place
    shared_bytes: int  # of a program
    cubin: bytes
    ptx: str


@dataclass(frozen=True)
class Variant:
    """An operator with types and memory formats as a training step uses it."""

    operator: str
    types: str
    call: Callable[[], Any]


def launches(variant: Variant) -> list[Any]:
    """The launches that the operator makes."""
    from revtrain.kernels.triton_kernels.tiling import recording

    with recording() as made:
        variant.call()
    return made


def same_code(launch: Any) -> tuple[Any, ...]:
    """What a compiled kernel depends on; launches in which it is the same share the kernel."""
    constants, signature, _ = _parameters(launch)
    return launch.kernel, *map(str, (signature, constants, launch.options))


def compile_for(launch: Any, architecture: int) -> Compiled:
    """The kernel of `launch` for compute capability architecture / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, signature, aligned = _parameters(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    cubin = compiled.asm["cubin"]
    registers, spilled = _resources(cubin)
    return Compiled(launch.kernel.fn.__name__, registers, spilled, compiled.metadata.shared, cubin, compiled.asm["ptx"])


def _parameters(launch: Any) -> tuple[dict[str, Any], dict[str, str], dict[tuple[int], Any]]:
    """What Triton specialises on, as at a real launch: (values of constants, types, alignments)."""
    constants, signature, aligned = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_NAMES[value.dtype]}"
            aligned[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp64"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
    return constants, signature, aligned


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of the stack) of a thread: the kernels have no arrays, what lies on the stack was spilled."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


# ---- what is compiled ----------------------------------------------------------------------------

STATES = (torch.float32, torch.float64, torch.int16, torch.int32)
INPUTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GRADIENTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def variants() -> Iterator[Variant]:
    """Every operator with every combination of types that makes sense, in both memory formats."""
    for state in (*STATES, torch.float16, torch.bfloat16):
        for dtype in INPUTS:
            if not _compatible(state, dtype):
                continue
            for last in (False, True):
                yield _variant("read_part", _read(state, dtype, last, True), state, dtype, last)
            yield _variant("read_part", _read(state, dtype, True, False), state, dtype, True, "cast alone")
            for last in (False, True):
                for grid in (False, True) if state.is_floating_point else (True,):
                    note = "grid" if grid else "no grid"
                    yield _variant("add_to_part_", _add(state, dtype, last, grid), state, dtype, last, note)
    for state in STATES:
        yield _variant("channel_statistics", _statistics(state, False), state)
        yield _variant("channel_statistics", _statistics(state, True), state, None, True)
        for gradient in GRADIENTS:
            if not _compatible(state, gradient):
                continue
            for du in {gradient: None, torch.bfloat16: None, torch.float16: None}:
                if _compatible(state, du) and _compatible(gradient, du):
                    for last in (False, True):
                        yield _variant("add_norm_gradient_", _gradient(gradient, du, state, last), gradient, du, last,
                                       f"part {_NAMES[state]}")  # fmt: skip
            yield _variant("add_norm_rest_", _rest(gradient, state), gradient, state)
    for dtype in (torch.float32, torch.float64):
        for bounded in (False, True):
            yield _variant("norm_constants", _constants(dtype, bounded), dtype, note="Eq. 23" if bounded else "")
            yield _variant("split_sums", _split(dtype, bounded), dtype, note="factor" if bounded else "divisor")
    yield from _large()
    for y in INPUTS:
        for signs in (False, True):
            note = "signs" if signs else ""
            yield _variant("normalise_activate_", _forward(y, signs), y, note=note)
            for dy in {y: None, torch.float32: None}:
                if _compatible(y, dy):
                    yield _variant("norm_activation_sums", _sums(y, dy, signs), y, dy, note=note)
                    yield _variant("undo_norm_activation_", _undo(y, dy, signs), y, dy, note=note)


def _large() -> Iterator[Variant]:
    """Tensors whose places take 64 bit."""
    single, half = torch.float32, torch.bfloat16
    calls = {
        "read_part": _read(single, half, True, True),
        "add_to_part_": _add(torch.int16, half, True, True),
        "channel_statistics": _statistics(torch.int16, False),
        "add_norm_gradient_": _gradient(single, half, torch.int16, True),
        "add_norm_rest_": _rest(single, torch.int16),
        "normalise_activate_": _forward(single, True),
        "norm_activation_sums": _sums(single, single, True),
        "undo_norm_activation_": _undo(single, single, True),
    }
    for operator, call in calls.items():
        yield Variant(operator, "64-bit places", partial(call, samples=2**18))


def _compatible(one: torch.dtype, other: torch.dtype) -> bool:
    """float64 is for everything or for nothing."""
    return (one == torch.float64) == (other == torch.float64)


def _variant(operator, call, one, other=None, last=False, note="") -> Variant:
    types = _NAMES[one] if other is None else f"{_NAMES[one]}, {_NAMES[other]}"
    words = [types, "channels last" if last else "", note]
    return Variant(operator, "; ".join(word for word in words if word), call)


def _dense(dtype: torch.dtype, samples: int, last: bool = False) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(samples, 32, 16, 16, dtype=dtype, device="meta").to(memory_format=memory_format)


def _part(dtype: torch.dtype, samples: int) -> Tensor:
    """One half of a state."""
    return torch.empty(samples, 64, 16, 16, dtype=dtype, device="meta")[:, :32]


def _channels(dtype: torch.dtype, *rows: int) -> Tensor:
    return torch.empty(*rows, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")


def _read(state, dtype, last, normalised):
    from revtrain.kernels import triton_kernels as kernels

    scale, shift = (_channels(dtype), _channels(dtype)) if normalised else (None, None)
    return lambda samples=8: kernels.read_part(_part(state, samples), scale, shift, 2.0**-8, dtype, last)


def _add(state, dtype, last, grid):
    from revtrain.kernels import triton_kernels as kernels

    lost = torch.empty((), dtype=torch.int64, device="meta") if grid else None
    none = torch.empty((), dtype=torch.bool, device="meta") if grid else None
    step = 2.0**-8 if grid else 0.0
    return lambda samples=8: kernels.add_to_part_(
        _part(state, samples), _dense(dtype, samples, last), 0.3, step, 128.0, lost, none
    )


def _statistics(state, last):
    from revtrain.kernels import triton_kernels as kernels

    wide = torch.float64 if state == torch.float64 else torch.float32
    return lambda samples=8: kernels.channel_statistics(
        _dense(state, samples, True) if last else _part(state, samples), 2.0**-8, wide
    )


def _gradient(gradient, du, state, last):
    from revtrain.kernels import triton_kernels as kernels

    mean, sums = _channels(state), _channels(state, 2)
    return lambda samples=8: kernels.add_norm_gradient_(
        _part(gradient, samples), _dense(du, samples, last), _part(state, samples), mean, mean, sums, True, 2.0**-8
    )


def _rest(gradient, state):
    from revtrain.kernels import triton_kernels as kernels

    mean, sums = _channels(state), _channels(state, 2)
    return lambda samples=8: kernels.add_norm_rest_(
        _part(gradient, samples), _part(state, samples), mean, mean, mean, sums, 2048, 2.0**-8
    )


def _constants(dtype, bounded):
    from revtrain.kernels import triton_kernels as kernels

    c = torch.empty(64, dtype=dtype, device="meta")
    batches, signs = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(64, dtype=torch.int8, device="meta")
    epsilon_i, own_signs = (0.1, signs) if bounded else (None, None)
    return lambda: kernels.norm_constants(c, c, c, c, 1e-5, epsilon_i, own_signs, 1, c, c, batches, 0.1, 2048)


def _split(dtype, by_factor):
    from revtrain.kernels import triton_kernels as kernels

    sums, c = torch.empty(2, 64, dtype=dtype, device="meta"), torch.empty(64, dtype=dtype, device="meta")
    return lambda: kernels.split_sums(sums, c if by_factor else None, None if by_factor else c)


def _forward(x, signs):
    from revtrain.kernels import triton_kernels as kernels

    mean = _channels(x)
    packed = torch.empty(8192 if signs else 0, dtype=torch.uint8, device="meta")
    return lambda samples=8: kernels.normalise_activate_(_dense(x, samples), mean, mean, mean, mean, 0.5, packed)


def _sums(y, dy, signs):
    from revtrain.kernels import triton_kernels as kernels

    gain = _channels(y)
    packed = torch.empty(8192, dtype=torch.uint8, device="meta") if signs else None
    return lambda samples=8: kernels.norm_activation_sums(
        _dense(y, samples), _dense(dy, samples), packed, gain, gain, 0.5
    )


def _undo(y, dy, signs):
    from revtrain.kernels import triton_kernels as kernels

    mean, sums = _channels(y), _channels(y, 2)
    packed = torch.empty(8192, dtype=torch.uint8, device="meta") if signs else None
    return lambda samples=8: kernels.undo_norm_activation_(
        _dense(y, samples), _dense(dy, samples), packed, mean, mean, mean, mean, 0.5, sums, 2048
    )
