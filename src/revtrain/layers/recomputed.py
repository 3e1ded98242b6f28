"""A user's function f inside a layer: run forward, once more for the inverse, once more with a graph.

The one place at which the affine and the momentum coupling run their function, so that both restore the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients, frozen_running_statistics, stand_ins
from revtrain.core.random_state import RandomState, random_state, run_noting_random_state
from revtrain.errors import RevtrainError


class FirstPass(NamedTuple):
    """What a second pass needs to be the first one again."""

    random: RandomState | None  # before the first pass; None where it drew nothing


def own_copy(x: Tensor) -> Tensor:
    """x for a function that may write into it: dense, and differentiable."""
    return x.clone(memory_format=torch.contiguous_format)


def run(function: nn.Module, x: Tensor) -> tuple[Tensor, FirstPass]:
    """function(x) for the first time."""
    result, state = run_noting_random_state(function, own_copy(x))
    return result, FirstPass(state)


def run_again(function: nn.Module, x: Tensor, first: FirstPass | None) -> Tensor:
    """function(x) once more; running statistics and random numbers stay as they are.

    Without `first`, for a function that draws no random numbers. Raises `RevtrainError` where it does.
    """
    with frozen_running_statistics(function):
        if first is not None:
            with random_state(first.random, x.device):
                return function(own_copy(x))
        result, state = run_noting_random_state(function, own_copy(x))
    if state is not None:
        raise RevtrainError(
            f"The inverse of f, a {type(function).__name__}, needs the random numbers of the forward pass.\n"
            "Call eval() first, or hand over the `saved` that forward_ returned."
        )
    return result


def run_backward(
    function: nn.Module, x: Tensor, first: FirstPass, grads: Gradients, gradient_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient of x; those of the function's parameters are added to `grads`.

    `gradient_of` is given function(x), not to be written to, and returns its gradient: a tensor that nobody else holds.
    """
    parameters = grads.wanted(function.parameters())
    with frozen_running_statistics(function), stand_ins(function, parameters) as leaves:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), random_state(first.random, x.device):
            result = function(own_copy(leaf))
        dresult = gradient_of(result.detach()).to(result.dtype)
        if not result.requires_grad:  # a constant
            return torch.zeros_like(x)
        dx, *gradients = torch.autograd.grad(result, [leaf, *leaves], dresult, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        grads.add(parameter, gradient)
    return torch.zeros_like(x) if dx is None else dx
