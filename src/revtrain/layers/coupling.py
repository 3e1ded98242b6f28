"""Additive coupling: y1 = x1 + F(x2), y2 = x2 + G(y1), undone as x2 = y2 - G(y1), x1 = y1 - F(x2) (Eqs. 8, 9).

What F and G are decides how the backward pass runs through them:

    any torch module        recomputed once and differentiated by autograd; everything inside one of the two
                            is alive meanwhile: the paper's local bottleneck (RevNet, iRevNet)
    an invertible layer     recomputed once, then walked back layer by layer (hybrid: section 4.2)
    per sample (no BN)      as any module, but over chunks of the batch (the coupling convolution, 4.1.3)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.errors import RevtrainError
from revtrain.invertible import Gradients, InvertibleLayer, batch_chunks, frozen_running_statistics, stand_ins


class AdditiveCoupling(InvertibleLayer):
    """Reversible block of two residual functions, x (B, C, H, W) -> y (B, C, H, W), C even.

    Args:
        channels: C; each half has C / 2 channels.
        f, g: modules that map (B, C/2, H, W) to the same shape. Dropout and torch's batch norms inside them
            are replayed exactly: same mask, running statistics updated once.
        per_sample: f and g treat each sample on its own (no batch statistics), so the backward pass may
            run over chunks of the batch.
        scale: s in y1 = x1 + s F(x2), y2 = x2 + s G(y1).
        grid_bits: b; round the residuals (and the input) to multiples of 2^-b. Sums of such numbers are exact in
            float32 while they stay below 2^(24-b), so the inverse is exact, too, at any depth. None: no rounding.

    Raises `RevtrainError` for an odd number of channels.
    """

    def __init__(
        self,
        channels: int,
        f: nn.Module,
        g: nn.Module,
        per_sample: bool = False,
        scale: float = 1.0,
        grid_bits: int | None = None,
    ):
        super().__init__()
        if channels < 2 or channels % 2:
            raise RevtrainError(
                f"A coupling of {channels} channels cannot be split into two equal halves.\n"
                f"Expected an even number: {channels + 1} or {max(2, channels - 1)}, say (see `width`)."
            )
        self.channels, self.per_sample = channels, per_sample
        self.residual = Residual(scale, grid_bits)
        self.f, self.g = f, g

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.residual}"

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.residual.snap(x).chunk(2, dim=1)
        # Contiguous as in the lean form: some kernels round differently on a strided half.
        y1 = x1 + self.residual.of(self.f(x2.contiguous()))
        y2 = x2 + self.residual.of(self.g(y1))
        return torch.cat([y1, y2], dim=1)

    def forward_(self, x: Tensor) -> tuple[Tensor, Any]:
        x1, x2 = self._halves(self._snap_(x))
        saved_f = self._branch(self.f).add_(x2, x1)
        saved_g = self._branch(self.g).add_(x1, x2)
        return x, (saved_f, saved_g)

    def replay_(self, x: Tensor, saved: Any) -> Tensor:
        x1, x2 = self._halves(self._snap_(x))
        self._branch(self.f).replay_(x2, x1, saved[0], sign=1)
        self._branch(self.g).replay_(x1, x2, saved[1], sign=1)
        return x

    def inverse_(self, y: Tensor, saved: Any) -> Tensor:
        y1, y2 = self._halves(self._snap_(y))
        self._branch(self.g).replay_(y1, y2, saved[1], sign=-1)
        self._branch(self.f).replay_(y2, y1, saved[0], sign=-1)
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        (y1, y2), (dy1, dy2) = self._halves(self._snap_(y)), self._halves(dy)
        self._branch(self.g).undo_(y1, y2, dy1, dy2, saved[1], grads)  # y2 becomes x2; dy1 is complete
        self._branch(self.f).undo_(y2, y1, dy2, dy1, saved[0], grads)  # y1 becomes x1; dy2 is complete
        return y, dy

    def _snap_(self, x: Tensor) -> Tensor:
        # On the way back this also removes the small error that a layer above may have left.
        if self.residual.rounds(x):
            for sl in batch_chunks(x, self.chunk_bytes):
                x[sl].copy_(self.residual.snap(x[sl]))
        return x

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Views of one buffer: the two halves are never copied apart or joined again.
        half = self.channels // 2
        return x.narrow(1, 0, half), x.narrow(1, half, half)

    def _branch(self, function: nn.Module) -> Branch:
        if isinstance(function, InvertibleLayer):
            return _WalkedBack(function, self.residual, self.chunk_bytes)
        return _Recomputed(function, self.residual, self.chunk_bytes, self.per_sample)


class CouplingConv2d(AdditiveCoupling):
    """The invertible convolution of section 4.1.3: a coupling whose F and G are one convolution each.

    x (B, C, H, W) -> (B, C, H, W), C even; kernel_size odd. Together the two halves hold
    2 (C/2)^2 kernel_size^2 weights, half as many as a full convolution.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        if kernel_size % 2 == 0:
            raise RevtrainError(
                f"kernel_size={kernel_size} would change the image size.\nExpected an odd number such as 1, 3 or 5."
            )
        half = max(1, channels // 2)
        f, g = (nn.Conv2d(half, half, kernel_size, padding=kernel_size // 2, bias=False) for _ in range(2))
        super().__init__(channels, f, g, per_sample=True)


@dataclass(frozen=True)
class Residual:
    """What is added to a half: s F, rounded to a grid of 2^-grid_bits where sums in float32 are then exact."""

    scale: float = 1.0
    grid_bits: int | None = None

    def rounds(self, stream: Tensor) -> bool:
        """float64 needs no grid; 16-bit streams have too few bits for one."""
        return self.grid_bits is not None and stream.dtype == torch.float32

    def snap(self, x: Tensor) -> Tensor:
        """x on the grid, exactly; its gradient passes as if nothing had been rounded."""
        if not self.rounds(x):
            return x
        step = 2.0**self.grid_bits
        snapped = (x.detach() * step).round_().div_(step)
        return snapped + (x - x.detach()) if x.requires_grad else snapped

    def of(self, result: Tensor) -> Tensor:
        """s `result`, on the grid; differentiable."""
        scaled = result if self.scale == 1 else self.scale * result
        if self.grid_bits is not None and scaled.dtype in (torch.float16, torch.bfloat16):
            scaled = scaled.float()  # the stream's own precision
        return self.snap(scaled)

    def add_(self, target: Tensor, result: Tensor, sign: int, chunk_bytes: int) -> None:
        """target += sign s `result`, over chunks of the batch."""
        result = result.detach()
        if not self.rounds(target):
            target.add_(result, alpha=sign * self.scale)
            return
        for sl in batch_chunks(target, chunk_bytes):
            target[sl].add_(self.of(result[sl]), alpha=sign)


class Branch:
    """One residual function of a coupling: `target` +/- scale * function(`source`), and the way back."""

    def add_(self, source: Tensor, target: Tensor) -> Any:
        """target += scale function(source), for the first time; returns `saved`."""
        raise NotImplementedError

    def replay_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        """target += sign scale function(source), once more."""
        raise NotImplementedError

    def undo_(
        self, source: Tensor, target: Tensor, dsource: Tensor, dtarget: Tensor, saved: Any, grads: Gradients
    ) -> None:
        """target -= scale function(source); dsource += scale (d function / d source)^T dtarget."""
        raise NotImplementedError


class _WalkedBack(Branch):
    """An invertible function: its activations are rebuilt from its output while the gradient passes."""

    def __init__(self, function: InvertibleLayer, residual: Residual, chunk_bytes: int):
        self.function, self.residual, self.chunk_bytes = function, residual, chunk_bytes

    def add_(self, source: Tensor, target: Tensor) -> Any:
        result, saved = self.function.forward_(_copy(source))
        self.residual.add_(target, result, 1, self.chunk_bytes)
        return saved

    def replay_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        self.residual.add_(target, self.function.replay_(_copy(source), saved), sign, self.chunk_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        result, saved = self.function.replay_to_walk_back_(_copy(source), saved)
        self.residual.add_(target, result, -1, self.chunk_bytes)
        # The rebuilt source is thrown away: `source` itself came through the block's own, quieter inverse.
        _, gradient = self.function.backward_(result, _copy(dtarget).mul_(self.residual.scale), saved, grads)
        dsource.add_(gradient)


class _Recomputed(Branch):
    """Any module: recomputed from its source and differentiated by autograd, over chunks if it may be."""

    def __init__(self, function: nn.Module, residual: Residual, chunk_bytes: int, per_sample: bool):
        self.function, self.residual, self.chunk_bytes, self.per_sample = function, residual, chunk_bytes, per_sample

    def _chunks(self, source: Tensor) -> Iterator[slice]:
        return batch_chunks(source, self.chunk_bytes) if self.per_sample else iter([slice(None)])

    def add_(self, source: Tensor, target: Tensor) -> Any:
        saved = []
        for sl in self._chunks(source):
            before = _rng_state(source.device)
            self.residual.add_(target[sl], self.function(_copy(source[sl])), 1, self.chunk_bytes)
            # Only a function that drew random numbers needs their state again.
            saved.append(before if _differs(before, _rng_state(source.device)) else None)
        return saved

    def replay_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        for sl, rng in zip(self._chunks(source), saved, strict=True):
            with frozen_running_statistics(self.function), _rng(rng, source.device):
                self.residual.add_(target[sl], self.function(_copy(source[sl])), sign, self.chunk_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        parameters = grads.wanted(self.function.parameters())
        with frozen_running_statistics(self.function), stand_ins(self.function, parameters) as leaves:
            for sl, rng in zip(self._chunks(source), saved, strict=True):
                gradients = self._undo_chunk(source[sl], target[sl], dsource[sl], dtarget[sl], rng, leaves)
                while gradients:  # one at a time, so that each is gone before the next chunk
                    grads.add(parameters[len(gradients) - 1], gradients.pop())

    def _undo_chunk(self, source, target, dsource, dtarget, rng, leaves) -> list[Tensor | None]:
        """`undo_` of one chunk; returns the gradients of `leaves`. Its temporaries end with it."""
        leaf = _copy(source).requires_grad_()
        with torch.enable_grad(), _rng(rng, source.device):
            result = self.function(leaf)
        self.residual.add_(target, result, -1, self.chunk_bytes)
        scale = self.residual.scale
        dresult = dtarget.to(result.dtype) if scale == 1 else (dtarget * scale).to(result.dtype)
        # The gradient needs the graph of the result, not its values.
        end = torch.autograd.graph.get_gradient_edge(result)
        del result
        dleaf, *gradients = torch.autograd.grad(end, [leaf, *leaves], dresult, allow_unused=True)
        if dleaf is not None:
            dsource.add_(dleaf)
        return gradients


def _copy(half: Tensor) -> Tensor:
    return half.clone(memory_format=torch.contiguous_format)


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _differs(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> bool:
    # Read the bytes themselves: a tensor operation here would be seen, and refused, under fake tensors.
    return any(x is not None and _bytes(x) != _bytes(y) for x, y in zip(a, b, strict=True))


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.numel())


@contextmanager
def _rng(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Run the block with the random numbers of `state`; leave the generators as they were."""
    if state is None:
        yield
        return
    now = _rng_state(device)
    _set_rng(state, device)
    try:
        yield
    finally:
        _set_rng(now, device)


def _set_rng(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
