"""A user's function f inside a layer: run forward, once more for the inverse, once more with a graph.

The one place at which the affine and the momentum coupling run their function, so that both restore the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import differentiate_, end_of
from revtrain.core.precision import read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of


def own_copy(x: Tensor) -> Tensor:
    """x for a function that may write into it: dense, differentiable, in the caller's type."""
    return x.to(read_dtype(x)).clone(memory_format=torch.contiguous_format)


def run(function: nn.Module, x: Tensor) -> tuple[Tensor, FirstRun]:
    """function(x) for the first time, and what a second run needs to be the first one again."""
    first = FirstRun(function, x.device)
    result = first(own_copy(x))
    return result, first.end()


def run_again(x: Tensor, first: FirstRun) -> Tensor:
    """function(x) once more; running statistics and random numbers stay as they are."""
    with SecondRun(first) as again:
        return again(own_copy(x))


def run_backward(
    function: nn.Module, x: Tensor, first: FirstRun, grads: Gradients, gradient_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient of x; those of the function's parameters are added to `grads`.

    `gradient_of` is given function(x), not to be written to, and returns its gradient: a tensor that nobody else holds.
    """
    wanted = grads.wanted(parameters_of(function))
    leaf = own_copy(x.detach()).requires_grad_()
    with SecondRun(first, wanted) as again, torch.enable_grad():
        result = again(leaf)
    with torch.no_grad():
        dresult = gradient_of(result.detach())
    end = end_of(result)
    del result
    dx = differentiate_(end, leaf, (), again.leaves, dresult, wanted, grads)
    return torch.zeros_like(x) if dx is None else dx.to(x.dtype)
