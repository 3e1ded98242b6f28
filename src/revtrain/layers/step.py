"""Ordinary modules as steps of a chain: strided convolutions, max-pooling, a stem, the end of a network.

Such a step has no inverse, so its input is stored. The layers before it are walked back from there, those behind it as
ever: a whole network can be one chain, and stores one activation for each such step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer, context_for, differentiate_, end_of, is_for_backward, keeps_graph
from revtrain.core.recompute import FirstRun, SecondRun, is_dense, parameters_of, shares_memory
from revtrain.errors import RevtrainError


class _Stored(NamedTuple):
    x: Tensor
    first: FirstRun
    graph: _Graph | None  # of the first run


class _Graph(NamedTuple):
    end: GradientEdge | None  # None: a constant
    leaf: Tensor
    sides: list[Tensor]  # stand in for the side inputs
    leaves: list[Tensor]  # stand in for the parameters that ask for a gradient
    dtype: torch.dtype  # of the result


class CheckpointedStep(InvertibleLayer):
    """Any module as a step of a chain: its input is stored, and the module is run once more in the backward pass.

    Args:
        module: from a tensor to a tensor, of any shapes. Dropout and batch norms inside are replayed exactly. Side
            inputs of the chain are handed to it if its forward takes more than one argument.

    It has no inverse: `inverse` raises `RevtrainError`. The result is in float32 at least.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise RevtrainError(
                f"{type(self).__name__} was given a {type(module).__name__}.\n"
                "Expected an nn.Module: nn.Tanh() rather than torch.tanh."
            )
        self.module = module

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return _at_least_float32(self.module(self._own(x), *self._sides(context)))

    def stand_in(self, y: Tensor) -> Any:
        raise RevtrainError(
            f"{type(self).__name__} has no inverse: it keeps the input of its {type(self.module).__name__} for the "
            "backward pass only.\nInvert the parts of the chain before and behind it, as in chain[:2].inverse(y)."
        )

    def inverse(self, y: Tensor, saved: Any = None, *context: Tensor) -> Tensor:
        return self.stand_in(y)

    def inverse_(self, y: Tensor, saved: Any, *context: Tensor) -> Tensor:
        return self.stand_in(y)

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, _Stored]:
        first = self._first(x)
        y = first(self._own(x), *self._sides(context))
        return self._of_the_chain(y, x, context), _Stored(x, first.end(), None)

    def recompute_(self, x: Tensor, saved: _Stored, *context: Tensor) -> Tensor:
        with SecondRun(saved.first) as again:
            y = again(self._own(x), *self._sides(context))
        return self._of_the_chain(y, x, context)

    def backward_(
        self, y: Tensor, dy: Tensor, saved: _Stored, grads: Gradients, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = grads.wanted(parameters_of(self.module))
        leaf = saved.x.detach().requires_grad_()
        owners = self._sides(context)
        sides = [each.detach().requires_grad_(each.requires_grad) for each in owners]
        with torch.enable_grad(), SecondRun(saved.first, wanted) as again:
            y = again(leaf, *sides)  # which is copied where the module writes into it
        end = end_of(y)
        del y
        dx = differentiate_(end, leaf, sides, again.leaves, dy, (*owners, *wanted), grads)
        return self._input(saved), _gradient(dx, saved.x, dy)

    def _first(self, x: Tensor) -> FirstRun:
        return FirstRun(self.module, x.device, f"{type(self.module).__name__} of {type(self).__name__}")

    def _own(self, x: Tensor) -> Tensor:
        """x for the module: a copy if it may write into it, which is known only of torch's modules."""
        parts = [each for each in self.module.modules() if type(each) is not nn.Sequential]
        known = all(type(each).__module__.startswith("torch.nn.") for each in parts)
        return x if known and not any(getattr(each, "inplace", False) for each in parts) else x.clone()

    def _sides(self, context: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return context_for(self.module, tuple(context))

    def _of_the_chain(self, y: Tensor, x: Tensor, context: Sequence[Tensor]) -> Tensor:
        """y as a state that the chain may write into: nothing else shares its memory."""
        others = (x, *parameters_of(self), *self.buffers(), *context)
        own = _at_least_float32(y.detach())
        if shares_memory(own, y) and (y.requires_grad or any(shares_memory(own, each) for each in others)):
            return own.clone(memory_format=torch.contiguous_format)
        return own.contiguous()

    def _input(self, saved: _Stored) -> Tensor:
        """What the layers before are walked back from; they write into it."""
        return saved.x.clone() if keeps_graph() else saved.x


class StoredStep(CheckpointedStep):
    """Any module as a step of a chain: its input and all that autograd keeps of it are stored, as without a chain.

    Faster than a `CheckpointedStep`, which runs the module twice, for the memory of its activations.

    Args:
        module: from a tensor to a tensor, of any shapes. Side inputs of the chain are handed to it if its forward takes
            more than one argument.

    It has no inverse: `inverse` raises `RevtrainError`. The result is in float32 at least.
    """

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, _Stored]:
        if not is_for_backward():
            return super().forward_(x, *context)
        first, owners = self._first(x), self._asking_parameters()
        # Leaves in the place of parameters: the hooks of those fire once, when the chain returns their gradients.
        leaves = [each.detach().requires_grad_() if each.is_leaf else each for each in owners]
        leaf = x.detach().requires_grad_()
        sides = [each.detach().requires_grad_(each.requires_grad) for each in self._sides(context)]
        with torch.enable_grad(), _in_place_of(owners, leaves, self.module):
            y = first(self._own(leaf), *sides)
        end = get_gradient_edge(y) if y.requires_grad else None
        graph = _Graph(end, leaf, sides, leaves, y.dtype)
        return self._of_the_chain(y, x, context), _Stored(x, first.end(), graph)

    def backward_(
        self, y: Tensor, dy: Tensor, saved: _Stored, grads: Gradients, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        if saved.graph is None:
            return super().backward_(y, dy, saved, grads, *context)
        end, leaf, sides, leaves, dtype = saved.graph
        if end is None:
            return self._input(saved), torch.zeros_like(saved.x)
        asking = [(each, owner) for each, owner in zip(sides, self._sides(context), strict=True) if each.requires_grad]
        targets = [leaf, *(each for each, _ in asking), *leaves]
        dx, *gradients = torch.autograd.grad(end, targets, dy.to(dtype), retain_graph=keeps_graph(), allow_unused=True)
        for owner, gradient in zip(
            [*(owner for _, owner in asking), *self._asking_parameters()], gradients, strict=True
        ):
            grads.add(owner, gradient, lent=dy)
        return self._input(saved), _gradient(dx, saved.x, dy)

    def _asking_parameters(self) -> list[Tensor]:
        return [each for each in parameters_of(self.module) if each.requires_grad]


def _gradient(dx: Tensor | None, x: Tensor, dy: Tensor) -> Tensor:
    """dx as a tensor that the chain may write into."""
    if dx is None:
        return torch.zeros_like(x)
    return dx if is_dense(dx) and not shares_memory(dx, x) else dx.clone(memory_format=torch.contiguous_format)


def _at_least_float32(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32)) if y.is_floating_point() else y


@contextmanager
def _in_place_of(owners: Sequence[Tensor], leaves: Sequence[Tensor], module: nn.Module) -> Iterator[None]:
    leaf_of = {id(owner): leaf for owner, leaf in zip(owners, leaves, strict=True)}
    places = [
        (each._parameters, name, tensor)
        for each in module.modules()
        for name, tensor in each._parameters.items()
        if id(tensor) in leaf_of
    ]
    for held, name, tensor in places:
        held[name] = leaf_of[id(tensor)]  # type: ignore[assignment]  # a leaf is no nn.Parameter
    try:
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor
