"""What an invertible layer is.

How a chain goes through its layers:

    forward    x --forward_--> y                in one buffer, the chain's own; only `saved` (a few numbers) is kept
    backward   (y, dy) --backward_--> (x, dx)   in that buffer and one for the gradient; those of the parameters are
                                                added to `grads`

A method whose name ends in an underscore may overwrite the storage of the tensors that it is given, as
everywhere in torch, and runs without autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients, frozen_running_statistics, stand_ins
from revtrain.core.pieces import MIB


class InvertibleLayer(nn.Module):
    """A layer with an analytic inverse.

    A subclass writes `forward` and `inverse`; that is enough for `InvertibleChain` to train through it
    without storing its input. The methods with an underscore compute the same in place; a subclass overrides
    them where it can save memory so.

    `saved` is what the inverse needs besides y (BN: mean and standard deviation; most layers: None). It
    travels as a value, never on `self`, so a recomputation cannot update running statistics twice and one
    layer may be used several times in one graph.

    `piece_bytes` bounds each temporary of the methods in place, in bytes. `is_pointwise`: each value of y depends on
    one of x (and on statistics), so that computing y again costs little. `passes_integers`: the methods in place take
    states in an integer format, too (see revtrain.core.state_format).
    """

    piece_bytes: int = 2 * MIB
    is_pointwise: bool = False
    passes_integers: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """y of x, differentiable by ordinary autograd (`backward=store`)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, saved: Any = None) -> Tensor:
        """x of y; neither y nor `saved` is changed."""
        return self.inverse_(y.clone(memory_format=torch.contiguous_format), saved)

    # In place. These serve any layer that has only forward and inverse.

    def forward_(self, x: Tensor) -> tuple[Tensor, Any]:
        """(y, saved); updates running statistics as `forward` does."""
        return self.forward(x), None

    def recompute_(self, x: Tensor, saved: Any) -> Tensor:
        """y of x a second time, with the `saved` of the first; updates nothing."""
        with frozen_running_statistics(self):
            return self.forward(x)

    def recompute_for_backward_(self, x: Tensor, saved: Any) -> tuple[Tensor, Any]:
        """(y, saved) a second time, right before `backward_`: more may be kept, since it lives for a moment only."""
        return self.recompute_(x, saved), saved

    def inverse_(self, y: Tensor, saved: Any) -> Tensor:
        """x of y, in place where the layer can."""
        return self.inverse(y, saved)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients) -> tuple[Tensor, Tensor]:
        """(x, dx) of (y, dy); parameter gradients are added to `grads`. Shapes of x and dx are equal."""
        x = self.inverse_(y, saved)
        leaf = x.detach().requires_grad_()
        parameters = grads.wanted(self.parameters())
        with torch.enable_grad(), frozen_running_statistics(self), stand_ins(self, parameters) as leaves:
            again = self.forward(leaf)
        dx, *dparameters = torch.autograd.grad(again, [leaf, *leaves], dy, allow_unused=True)
        for parameter, gradient in zip(parameters, dparameters, strict=True):
            grads.add(parameter, gradient)
        return x, torch.zeros_like(x) if dx is None else dx
