"""Momentum residual blocks (Sander et al., "Momentum Residual Neural Networks", 2021, arXiv:2102.07870)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import FirstRun
from revtrain.errors import RevtrainError
from revtrain.layers.channels import check_dim, check_result, part_sizes, two_parts
from revtrain.layers.recomputed import own_copy, run, run_again, run_backward


class MomentumCoupling(InvertibleLayer):
    """A residual block with a velocity: v' = m v + (1 - m) F(x), x' = x + v'. Any F, no split of a network's width.

    The state (B, C, ...) holds x in its first half and v in its second; start with v = 0, torch.cat([x, zeros], dim),
    and read x from the first half of the result. Undone as x = x' - v', v = (v' - (1 - m) F(x)) / m.

    Args:
        channels: C, even; x and v have C / 2 each.
        f: F, a module from (B, C/2, ...) to the same shape. Dropout and batch norms inside are replayed exactly.
        momentum: m, without unit, 0 < m < 1. Each inverse divides the noise of v by m: n blocks multiply it by m^-n, so
            deep chains in float32 want m near 1 (0.9: 60 dB lost after 66 blocks; 0.99: 9 dB after 100). m = 1 is
            refused, since F would then take no part, and m = 0, an ordinary residual block, has no inverse.
        dim: where the channels are, 1 or -1 for tokens (B, T, C).

    Raises `RevtrainError` for a momentum outside (0, 1), an odd number of channels, an x of other channels, or an F
    that returns another shape.
    """

    def __init__(self, channels: int, f: nn.Module, momentum: float = 0.9, dim: int = 1):
        super().__init__()
        if not 0 < momentum < 1:
            raise RevtrainError(
                f"MomentumCoupling: momentum={momentum} was given.\n"
                "Expected 0 < momentum < 1: at 0 the block has no inverse, at 1 its function takes no part. Try 0.9."
            )
        sizes = part_sizes(channels, self)
        if sizes[0] != sizes[1]:
            raise RevtrainError(
                f"MomentumCoupling: channels={channels} was given.\n"
                "Expected an even number: the state x and its velocity v have the same size."
            )
        self.sizes, self.momentum, self.dim = sizes, momentum, check_dim(dim, self)
        self.f = f

    def extra_repr(self) -> str:
        return f"{sum(self.sizes)}, momentum={self.momentum}, dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        position, velocity = self._parts(x)
        result = self._checked(self.f(own_copy(position)), position)
        velocity = torch.add(self.momentum * velocity, result, alpha=1 - self.momentum)
        return torch.cat([position + velocity, velocity], self.dim)

    def forward_(self, x: Tensor) -> tuple[Tensor, FirstRun]:
        position, velocity = self._parts(x)
        result, first = run(self.f, position)
        self._move_(position, velocity, result)
        return x, first

    def recompute_(self, x: Tensor, saved: FirstRun) -> Tensor:
        position, velocity = self._parts(x)
        self._move_(position, velocity, run_again(position, saved))
        return x

    def stand_in(self, y: Tensor) -> FirstRun:
        return FirstRun(self.f, y.device, f"f of {type(self).__name__}, a {type(self.f).__name__}").pure()

    def inverse_(self, y: Tensor, saved: FirstRun) -> Tensor:
        position, velocity = self._parts(y)
        position.sub_(velocity)
        self._slow_down_(velocity, run_again(position, saved))
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: FirstRun, grads: Gradients) -> tuple[Tensor, Tensor]:
        (position, velocity), (dposition, dvelocity) = self._parts(y), self._parts(dy)
        position.sub_(velocity)
        dvelocity.add_(dposition)  # v' reaches the loss through x', too

        def undo_(result: Tensor) -> Tensor:  # v' becomes v; returns the gradient of F's result
            self._slow_down_(velocity, result)
            return (1 - self.momentum) * dvelocity

        dposition.add_(run_backward(self.f, position, saved, grads, undo_))
        dvelocity.mul_(self.momentum)
        return y, dy

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return two_parts(x, self.dim, self.sizes, self)

    def _checked(self, result: Tensor, position: Tensor) -> Tensor:
        check_result(result, tuple(position.shape), self.f, self)
        return result

    def _move_(self, position: Tensor, velocity: Tensor, result: Tensor) -> None:
        velocity.mul_(self.momentum).add_(self._checked(result, position), alpha=1 - self.momentum)
        position.add_(velocity)

    def _slow_down_(self, velocity: Tensor, result: Tensor) -> None:
        velocity.sub_(self._checked(result, velocity), alpha=1 - self.momentum).div_(self.momentum)
