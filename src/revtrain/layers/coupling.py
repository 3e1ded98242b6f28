"""Additive coupling: y1 = x1 + F(x2), y2 = x2 + G(y1), undone as x2 = y2 - G(y1), x1 = y1 - F(x2) (Eqs. 8, 9).

What F and G are decides how the backward pass runs through them:

    any torch module        recomputed once and differentiated by autograd; everything inside one of the two
                            is alive meanwhile: the paper's local bottleneck (RevNet, iRevNet)
    an invertible layer     recomputed once, then inverted layer by layer (hybrid: section 4.2)
    per sample (no BN)      as any module, but over pieces of the batch (the coupling convolution, 4.1.3)
    PreNorm                 BN, then any per-sample module: over pieces of the batch, too (see layers/prenorm.py)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.names import former_names
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers.bounded import BoundedConv2d
from revtrain.layers.prenorm import PreNorm, PreNormPass
from revtrain.layers.residual_pass import LayerwisePass, RecomputedPass, ResidualPass, ResidualSum, convolution_format


class AdditiveCoupling(InvertibleLayer):
    """Reversible block of two residual functions, x (B, C, H, W) -> y (B, C, H, W), C even.

    Args:
        channels: C; each half has C / 2 channels.
        f, g: modules that map (B, C/2, H, W) to the same shape. Dropout and torch's batch norms inside them
            are recomputed exactly: same mask, running statistics updated once.
        per_sample: f and g treat each sample on its own (no batch statistics), so the backward pass may
            run over pieces of the batch.
        scale: s in y1 = x1 + s F(x2), y2 = x2 + s G(y1).
        state_format: the number format of x and y, that of the chain around it. On a grid (any but plain) the inverse
            is exact at any depth. Formerly `stream`.
        channels_last: hand F and G their inputs in the memory format that convolutions are fastest in (see
            `convolution_format`) rather than always contiguous. They must not `view` them, then.

    `overflows` counts the values that left the range of the format's grid in forward passes.
    Raises `RevtrainError` for an odd number of channels.
    """

    @former_names(stream="state_format")
    def __init__(
        self,
        channels: int,
        f: nn.Module,
        g: nn.Module,
        per_sample: bool = False,
        scale: float = 1.0,
        state_format: StateFormat = PLAIN,
        channels_last: bool = False,
    ):
        super().__init__()
        if channels < 2 or channels % 2:
            raise RevtrainError(
                f"A coupling of {channels} channels cannot be split into two equal halves.\n"
                f"Expected an even number: {channels + 1} or {max(2, channels - 1)}, say (see `width`)."
            )
        self.channels, self.per_sample, self.channels_last = channels, per_sample, channels_last
        self.residual_sum = ResidualSum(scale, state_format)
        self.f, self.g = f, g
        self.passes_integers = state_format.is_integer
        if state_format.bits is not None:
            self.register_buffer("overflows", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.residual_sum}"

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        # Dense as in forward_: some kernels round differently on a strided half.
        memory_format = self._memory_format(x)
        y1 = x1 + self.residual_sum.of(self.f(x2.contiguous(memory_format=memory_format)))
        y2 = x2 + self.residual_sum.of(self.g(y1.contiguous(memory_format=memory_format)))
        return torch.cat([y1, y2], dim=1)

    def forward_(self, x: Tensor) -> tuple[Tensor, Any]:
        x1, x2 = self._halves(x)
        saved_f = self._pass_through(self.f, x).add_(x2, x1)
        saved_g = self._pass_through(self.g, x).add_(x1, x2)
        return x, (saved_f, saved_g)

    def recompute_(self, x: Tensor, saved: Any) -> Tensor:
        x1, x2 = self._halves(x)
        self._pass_through(self.f, x).recompute_(x2, x1, saved[0], sign=1)
        self._pass_through(self.g, x).recompute_(x1, x2, saved[1], sign=1)
        return x

    def inverse_(self, y: Tensor, saved: Any) -> Tensor:
        y1, y2 = self._halves(y)
        self._pass_through(self.g, y).recompute_(y1, y2, saved[1], sign=-1)
        self._pass_through(self.f, y).recompute_(y2, y1, saved[0], sign=-1)
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        (y1, y2), (dy1, dy2) = self._halves(y), self._halves(dy)
        self._pass_through(self.g, y).undo_(y1, y2, dy1, dy2, saved[1], grads)  # y2 becomes x2; dy1 is complete
        self._pass_through(self.f, y).undo_(y2, y1, dy2, dy1, saved[0], grads)  # y1 becomes x1; dy2 is complete
        return y, dy

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Views of one buffer: the two halves are never copied apart or joined again.
        half = self.channels // 2
        return x.narrow(1, 0, half), x.narrow(1, half, half)

    def _memory_format(self, x: Tensor) -> torch.memory_format:
        return convolution_format(x) if self.channels_last else torch.contiguous_format

    def _pass_through(self, function: nn.Module, x: Tensor) -> ResidualPass:
        overflows = getattr(self, "overflows", None)
        common = (function, self.residual_sum, self.piece_bytes, overflows, self._memory_format(x))
        if isinstance(function, PreNorm):
            return PreNormPass(*common)
        if isinstance(function, InvertibleLayer):
            return LayerwisePass(*common)
        return RecomputedPass(*common, per_sample=self.per_sample)


class CouplingConv2d(AdditiveCoupling):
    """The invertible convolution of section 4.1.3: a coupling whose F and G are one convolution each.

    x (B, C, H, W) -> (B, C, H, W), C even; kernel_size odd. Together the two halves hold
    2 (C/2)^2 kernel_size^2 weights, half as many as a full convolution. `init_gain` and `max_gain`: what F and G add to
    the other half, at the start and at most; see `BoundedConv2d`.
    """

    def __init__(self, channels: int, kernel_size: int = 3, init_gain: float = 1.0, max_gain: float | None = None):
        if kernel_size % 2 == 0:
            raise RevtrainError(
                f"kernel_size={kernel_size} would change the image size.\nExpected an odd number such as 1, 3 or 5."
            )
        half = max(1, channels // 2)
        f, g = (BoundedConv2d(half, kernel_size, init_gain, max_gain) for _ in range(2))
        super().__init__(channels, f, g, per_sample=True, channels_last=True)
