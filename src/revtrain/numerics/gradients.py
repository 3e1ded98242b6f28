"""What rounding does to the thing that matters: each parameter's gradient, `invert` against `store`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revtrain.numerics.probing import inverts, loss_gradients, on_the_side, storing


class GradientFidelity(NamedTuple):
    """Of one parameter's gradient: `cosine` of the angle to the true one, `relative_error` |g - g_true| / |g_true|.

    A gradient that is not finite has cosine 0 and an infinite error; where both are 0, it is 1 and 0. One that is
    missing counts as 0.
    """

    cosine: float
    relative_error: float

    @property
    def is_missing(self) -> bool:
        """Nothing has arrived, or nothing but zeros, where there is a true gradient."""
        return self.cosine == 0 and self.relative_error == 1


def probe_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, GradientFidelity]:
    """Compare the gradients of one batch in training mode, with activations rebuilt and with activations stored.

    Two forward and backward passes under the caller's autocast state; the model is left as it was. The second stores
    all activations of the batch.

    Args:
        images: (B, 3, H, W), normalised, on the model's device. labels: (B,) int64.

    Returns parameter name -> fidelity in the order of `named_parameters`, of all that have a gradient either way; empty
    for a model that rebuilds nothing.
    """
    if not inverts(model):
        return {}
    with on_the_side(model, images.device):
        rebuilt = loss_gradients(model, images, labels)
    with on_the_side(model, images.device), storing(model):
        true = loss_gradients(model, images, labels)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {
        name: _compare(ours, theirs)
        for name, ours, theirs in zip(names, rebuilt, true, strict=True)
        if ours is not None or theirs is not None
    }


def _compare(gradient: Tensor | None, true: Tensor | None) -> GradientFidelity:
    if gradient is None or true is None:
        there = true if gradient is None else gradient
        if there is None:
            return GradientFidelity(1.0, 0.0)
        zeros = torch.zeros_like(there)
        return compare(zeros, there) if gradient is None else compare(there, zeros)
    return compare(gradient, true)


def compare(gradient: Tensor, true: Tensor) -> GradientFidelity:
    """Fidelity of one gradient, both of one shape, in float64."""
    gradient, true = gradient.double().flatten().cpu(), true.double().flatten().cpu()
    size, true_size = gradient.norm().item(), true.norm().item()
    if not math.isfinite(size):
        return GradientFidelity(0.0, math.inf)
    if size == 0 or true_size == 0:
        same = size == true_size
        return GradientFidelity(float(same), 0.0 if same else (math.inf if true_size == 0 else 1.0))
    cosine = min(1.0, max(-1.0, (gradient @ true).item() / (size * true_size)))
    return GradientFidelity(cosine, (gradient - true).norm().item() / true_size)
