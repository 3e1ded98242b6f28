"""A convolution of bounded gain: what it adds to the other half of a coupling never dwarfs what is there.

In y1 = x1 + F(x2) a large F leaves x1 small beside y1, and the noise of y1 is then large beside the rebuilt x1.
Training drives the convolutions there: without a bound the SNR of a layer-wise network falls below 0 dB within fifty
steps, with it the SNR stays where it was at initialisation (docs/numerics.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.errors import RevtrainError

PROBE_SIDE = 8  # pixels; a larger image has hardly a larger singular value
FIRST_ITERATIONS = 20


class BoundedConv2d(nn.Conv2d):
    """Convolution without bias, (B, C, H, W) -> (B, C, H, W), whose largest singular value is at most `max_gain`.

    `constrain_`, after every step of the optimizer (see `constrain_`), scales the weights down where they exceed it.
    The singular value is the one on images of `PROBE_SIDE` pixels, by power iteration: one more iteration a step, and
    the direction found so far is part of the state.

    Args:
        channels: C. kernel_size: odd, in pixels.
        init_gain: of the initial weights, relative to torch's.
        max_gain: energy out over energy in is at most its square; None: no bound.

    Raises `RevtrainError` for a bound or a gain that is not positive.
    """

    draws_nothing = True  # random numbers

    direction: Tensor  # of the largest singular value, as far as it is found

    def __init__(self, channels: int, kernel_size: int = 3, init_gain: float = 1.0, max_gain: float | None = None):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        for name, value in (("init_gain", init_gain), ("max_gain", max_gain)):
            if value is not None and not value > 0:
                raise RevtrainError(f"{name}={value} was given.\nExpected a number above 0.")
        self.max_gain = max_gain
        with torch.no_grad():
            self.weight.mul_(init_gain)
        if max_gain is not None:
            self.register_buffer("direction", torch.randn(1, channels, PROBE_SIDE, PROBE_SIDE))
            self.constrain_(FIRST_ITERATIONS)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_gain={self.max_gain}"

    @torch.no_grad()
    def constrain_(self, iterations: int = 1) -> None:
        """Scale the weights down to `max_gain` where their largest singular value exceeds it."""
        if self.max_gain is None:
            return
        padding = self.kernel_size[0] // 2
        for _ in range(iterations):
            back = F.conv_transpose2d(
                F.conv2d(self.direction, self.weight, padding=padding), self.weight, padding=padding
            )
            norm = back.norm()  # of weights that are all zero it is zero, and any direction as good as another
            self.direction.copy_(torch.where(norm > 0, back / norm, self.direction))
        gain = F.conv2d(self.direction, self.weight, padding=padding).norm()
        self.weight.mul_((self.max_gain / gain).clamp_max(1.0))


def bounds_weights(model: nn.Module) -> bool:
    """Whether any module of `model` has a bound to keep."""
    return any(isinstance(module, BoundedConv2d) and module.max_gain is not None for module in model.modules())


def constrain_(model: nn.Module) -> None:
    """Let every module of `model` that bounds its weights do so; to be called after each step of an optimizer."""
    for module in model.modules():
        if isinstance(module, BoundedConv2d):
            module.constrain_()
