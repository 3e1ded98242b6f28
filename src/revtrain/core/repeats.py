"""Leaving out repeated layers where nothing but the memory of a training step is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer, context_for
from revtrain.core.layer_list import LayerList


@contextmanager
def without_repeats(model: nn.Module) -> Iterator[None]:
    """Inside, `model` needs the same peak memory for far fewer operations; for tensors without values.

    Of equal layers of a chain that are given states of equal shape, the first works and the others pass on what they
    are given, but for the gradients of their weights. It is the first, since when the backward pass comes to it most
    gradients are there already. A chain inside another's layer stays whole: what its first layers need depends on its
    last. So does a chain with backward=store, of which autograd keeps every layer's activations.
    """
    chains = [m for m in model.modules() if isinstance(m, InvertibleChain) and m.backward_mode == "invert"]
    inside = {id(m) for chain in chains for layer in chain.layers for m in layer.modules()}
    outermost = [chain for chain in chains if id(chain) not in inside]
    whole = [chain.layers for chain in outermost]
    for chain in outermost:
        first: dict[Any, _OncePerKind] = {}
        once = [_OncePerKind(layer, first) for layer, _ in chain.steps()]
        chain.layers = cast(Sequence[InvertibleLayer], LayerList(once, chain.state_format))
    try:
        yield
    finally:
        for chain, layers in zip(outermost, whole, strict=True):
            chain.layers = layers


class _OncePerKind(InvertibleLayer):
    """A layer of a chain that works unless an equal one before it has: the one in `first` of its kind and shape."""

    def __init__(self, layer: InvertibleLayer, first: dict[Any, _OncePerKind]):
        super().__init__()
        self.layer, self.first = layer, first
        self.passes_integers = layer.passes_integers
        self.kind = (type(layer), tuple(parameter.shape for parameter in layer.parameters()))
        self.saved: Any = None  # by the layer, where it has worked

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Any]:
        first = self.first.setdefault((self.kind, x.shape), self)
        if first is not self:  # what it would save is as large as what the first one has saved
            return x, (False, tree_map_only(Tensor, torch.empty_like, first.saved))
        y, self.saved = self.layer.forward_(x, *context_for(self.layer, context))
        return y, (True, self.saved)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients, *context: Tensor) -> tuple[Tensor, Tensor]:
        works, saved_by_layer = saved
        if works:
            self.saved = None
            return self.layer.backward_(y, dy, saved_by_layer, grads, *context_for(self.layer, context))
        for parameter in grads.wanted(self.layer.parameters()):
            grads.add(parameter, torch.empty_like(parameter))
        return y, dy
