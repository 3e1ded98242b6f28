"""A batch norm and the LeakyReLU behind it as one layer: each pass over memory serves both (Eqs. 14, 23, 24)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.layers.activation import InvertibleLeakyReLU

if TYPE_CHECKING:
    from revtrain.layers.batchnorm import InvertibleBatchNorm2d


class NormActivation(InvertibleLayer):
    """What a chain runs in the place of `norm` and `activation`, which stand one behind the other in it.

    `saved` is a pair: what the two would have saved. The values are those of the two layers on their own.
    """

    is_pointwise = True

    def __init__(self, norm: InvertibleBatchNorm2d, activation: InvertibleLeakyReLU):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(x))

    def forward_(self, x: Tensor) -> tuple[Tensor, Any]:
        y, saved = self.norm.run_forward_(x, self.activation.slope)
        return y, (saved, None)

    def recompute_(self, x: Tensor, saved: Any) -> Tensor:
        of_norm = self.norm.stand_in(x) if saved[0] is None else saved[0]
        return self.norm.run_again_(x, of_norm, self.activation.slope)[0]

    def recompute_for_backward_(self, x: Tensor, saved: Any) -> tuple[Tensor, Any]:
        # A rebuilt y may have crossed zero, and one crossing changes a gradient by a finite amount. Inside a coupling
        # block the true signs are at hand; they cost a bit an element until the block's backward pass is over.
        y, signs = self.norm.run_again_(x, saved[0], self.activation.slope, self.activation.keep_signs)
        return y, (saved[0], signs)

    def stand_in(self, y: Tensor) -> Any:
        return self.norm.stand_in(y), None

    def inverse_(self, y: Tensor, saved: Any) -> Tensor:
        of_norm = self.norm.stand_in(y) if saved[0] is None else saved[0]
        return self.norm.inverse_(self.activation.inverse_(y, None), of_norm)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        return self.norm.run_back_(y, dy, saved[0], grads, self.activation.slope, saved[1])
