"""LeakyReLU and its inverse (Eq. 24)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from revtrain.errors import RevtrainError
from revtrain.invertible import Gradients, InvertibleLayer


class InvertibleLeakyReLU(InvertibleLayer):
    """y = x for x >= 0 and n x for x < 0; x = y / n where y < 0 (Eq. 24). Any shape, element by element.

    Args:
        slope: n, without unit, 0 < n <= 1. The draft writes x / n; its text and its authors' runs use n x.

    Each pass costs precision: with a symmetric input the inverse multiplies the noise-to-signal ratio by
    (1 + n^2)(1 + 1/n^2)/4 (Eq. 28c). Raises `RevtrainError` for a slope outside (0, 1].
    """

    def __init__(self, slope: float = 0.2):
        super().__init__()
        if not 0 < slope <= 1:
            hint = f"Did you mean slope={1 / slope:g}?" if slope > 1 else "A slope of 0 (ReLU) has no inverse."
            raise RevtrainError(f"slope={slope} cannot be inverted.\nExpected 0 < slope <= 1. {hint}")
        self.slope = slope

    def extra_repr(self) -> str:
        return f"slope={self.slope}"

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def forward_(self, x: Tensor) -> tuple[Tensor, None]:
        return F.leaky_relu_(x, self.slope), None

    def replay_(self, x: Tensor, saved: None) -> Tensor:
        return F.leaky_relu_(x, self.slope)

    def inverse_(self, y: Tensor, saved: None) -> Tensor:
        return F.leaky_relu_(y, 1 / self.slope)

    def backward_(self, y: Tensor, dy: Tensor, saved: None, grads: Gradients) -> tuple[Tensor, Tensor]:
        # y has the sign of x, so the mask needs no storage of its own.
        torch.ops.aten.leaky_relu_backward(dy, y, self.slope, True, grad_input=dy)
        return self.inverse_(y, saved), dy
