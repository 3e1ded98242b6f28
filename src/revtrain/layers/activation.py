"""LeakyReLU and its inverse (Eq. 24)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.kernels.norm_activation import pack_signs, sign_pieces, undo_activation_
from revtrain.kernels.pieces import join


class InvertibleLeakyReLU(InvertibleLayer):
    """y = x for x >= 0 and n x for x < 0; x = y / n where y < 0 (Eq. 24). Any shape, element by element.

    Args:
        slope: n, without unit, 0 < n <= 1. The draft writes x / n; its text and its authors' runs use n x.
        keep_signs: inside a coupling block, keep the true signs for the backward pass, a bit an element.

    Each inversion costs precision: with a symmetric input the inverse multiplies the noise-to-signal ratio by
    (1 + n^2)(1 + 1/n^2)/4 (Eq. 28c). Raises `RevtrainError` for a slope outside (0, 1].
    """

    is_pointwise = True

    def __init__(self, slope: float = 0.2, keep_signs: bool = True):
        super().__init__()
        if not 0 < slope <= 1:
            hint = f"Did you mean slope={1 / slope:g}?" if slope > 1 else "A slope of 0 (ReLU) has no inverse."
            raise RevtrainError(f"slope={slope} cannot be inverted.\nExpected 0 < slope <= 1. {hint}")
        self.slope, self.keep_signs = slope, keep_signs

    def extra_repr(self) -> str:
        return f"slope={self.slope}"

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return F.leaky_relu_(x, self.slope), None

    def recompute_(self, x: Tensor, saved: None) -> Tensor:
        return F.leaky_relu_(x, self.slope)

    def recompute_for_backward_(self, x: Tensor, saved: None) -> tuple[Tensor, Tensor | None]:
        if not self.keep_signs:
            return self.recompute_(x, None), None
        # A rebuilt y may have crossed zero, and one crossing changes a gradient by a finite amount. Inside a coupling
        # block the true signs are at hand; they cost a bit an element until the block's backward pass is over.
        signs = [pack_signs(x[piece]) for piece in sign_pieces(x, self.piece_bytes)]
        return self.recompute_(x, None), join(signs, -(-x.numel() // 8))

    def inverse_(self, y: Tensor, saved: Tensor | None) -> Tensor:
        return F.leaky_relu_(y, 1 / self.slope)

    def backward_(self, y: Tensor, dy: Tensor, saved: Tensor | None, grads: Gradients) -> tuple[Tensor, Tensor]:
        if saved is None:  # y has the sign of x, but for the noise
            torch.ops.aten.leaky_relu_backward(dy, y, self.slope, True, grad_input=dy)
        else:
            undo_activation_(dy, saved, self.slope, self.piece_bytes)
        return self.inverse_(y, saved), dy
