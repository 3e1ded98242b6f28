"""Affine coupling: one part is scaled and shifted by a function of the other (Dinh et al., "Density estimation using
Real NVP", 2017, arXiv:1605.08803, Eqs. 4 to 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import FirstRun
from revtrain.errors import RevtrainError
from revtrain.layers.channels import Split, check_dim, check_result, part_sizes, two_parts
from revtrain.layers.recomputed import own_copy, run, run_again, run_backward


class AffineCoupling(InvertibleLayer):
    """y1 = x1 exp(s) + t, y2 = x2, where (r, t) = f(x2) and s = c tanh(r). Undone as x1 = (y1 - t) exp(-s).

    x (B, C, ...) -> y of the same shape, or any other with the channels at `dim`. The second part passes unchanged: put
    a `HalfSwap` between two such layers, so that each part has its turn.

    Args:
        channels: C, even: two halves; or the sizes (C1, C2) of the two parts.
        f: a module from the second part (B, C2, ...) to twice the channels of the first, (B, 2 C1, ...): first the
            C1 of r, then the C1 of t. Dropout and batch norms inside are replayed exactly.
        dim: where the channels are, 1 or -1 for tokens (B, T, C).
        max_log_scale: c > 0. The scale of a value lies between exp(-c) and exp(c), and one inverse multiplies noise by
            at most exp(c): 2.7 for c = 1.

    Raises `RevtrainError` for sizes that cannot be cut so, an x of other channels, or an f that returns another shape.
    """

    def __init__(self, channels: Split, f: nn.Module, dim: int = 1, max_log_scale: float = 1.0):
        super().__init__()
        if not 0 < max_log_scale < math.inf:
            raise RevtrainError(
                f"AffineCoupling: max_log_scale={max_log_scale} was given.\n"
                "Expected a number above 0: scales then lie between exp(-max_log_scale) and exp(max_log_scale)."
            )
        self.sizes, self.dim, self.max_log_scale = part_sizes(channels, self), check_dim(dim, self), max_log_scale
        self.f = f

    def extra_repr(self) -> str:
        return f"{self.sizes}, dim={self.dim}, max_log_scale={self.max_log_scale}"

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self._parts(x)
        bounded, shift = self._bounded_and_shift(self.f(own_copy(x2)), x1)
        return torch.cat([x1 * self._scale(bounded) + shift, x2], self.dim)

    def forward_(self, x: Tensor) -> tuple[Tensor, FirstRun]:
        x1, x2 = self._parts(x)
        result, first = run(self.f, x2)
        self._transform_(x1, result)
        return x, first

    def recompute_(self, x: Tensor, saved: FirstRun) -> Tensor:
        x1, x2 = self._parts(x)
        self._transform_(x1, run_again(x2, saved))
        return x

    def stand_in(self, y: Tensor) -> FirstRun:
        return FirstRun(self.f, y.device, f"f of {type(self).__name__}, a {type(self.f).__name__}").pure()

    def inverse_(self, y: Tensor, saved: FirstRun) -> Tensor:
        y1, y2 = self._parts(y)
        bounded, shift = self._bounded_and_shift(run_again(y2, saved), y1)
        y1.sub_(shift).div_(self._scale(bounded))
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: FirstRun, grads: Gradients) -> tuple[Tensor, Tensor]:
        (y1, y2), (dy1, dy2) = self._parts(y), self._parts(dy)

        def undo_(result: Tensor) -> Tensor:  # y1 becomes x1, dy1 becomes dx1; returns the gradient of f's result
            bounded, shift = self._bounded_and_shift(result, y1)
            scale = self._scale(bounded)
            y1.sub_(shift)  # x1 exp(s): what dy1 meets on its way to s
            dlog_scale = dy1 * y1 * (self.max_log_scale * (1 - bounded.square()))
            dresult = torch.cat([dlog_scale, dy1], self.dim)
            y1.div_(scale)
            dy1.mul_(scale)
            return dresult

        dy2.add_(run_backward(self.f, y2, saved, grads, undo_))
        return y, dy

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return two_parts(x, self.dim, self.sizes, self)

    def _bounded_and_shift(self, result: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """tanh(r) and t, in the precision of x1 at least: F's may be 16 bit under autocast."""
        expected = list(x1.shape)
        expected[self.dim] *= 2
        check_result(result, tuple(expected), self.f, self)
        raw, shift = result.to(torch.promote_types(result.dtype, x1.dtype)).chunk(2, self.dim)
        return torch.tanh(raw), shift

    def _scale(self, bounded: Tensor) -> Tensor:
        return torch.exp(self.max_log_scale * bounded)

    def _transform_(self, x1: Tensor, result: Tensor) -> None:
        bounded, shift = self._bounded_and_shift(result, x1)
        x1.mul_(self._scale(bounded)).add_(shift)
