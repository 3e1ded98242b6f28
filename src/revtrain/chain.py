"""The chain: the one place that owns a backward pass.

invert   forward keeps the chain's output and a few numbers a layer; backward walks the layers in
         reverse and turns (y, dy) into (x, dx) in two buffers, whatever the depth.
store    the same layers under ordinary autograd: the noise-free twin of section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from revtrain.errors import RevtrainError
from revtrain.invertible import Gradients, InvertibleLayer

BACKWARDS = ("invert", "store")


class Observer(Protocol):
    """What may watch a chain from outside (see `observe`); the layers know nothing of it."""

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        """`x` is about to enter `layer` in the forward pass."""

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        """`x` is what the backward pass rebuilt of the input of `layer`."""


class InvertibleChain(InvertibleLayer):
    """Invertible layers in a row; itself an invertible layer, so chains nest.

    Args:
        layers: `InvertibleLayer`s, first to last.
        backward: "invert" (rebuild activations) or "store" (ordinary autograd).
        reuse_output: let the backward pass overwrite the chain's output. Saves one activation; the output
            must then not be read after `backward()`. Autograd refuses a second backward through it.

    Input and output are tensors (B, ...); the layers decide the rest. Raises `RevtrainError` for a layer
    that is not invertible or an unknown `backward`.
    """

    observer: Observer | None = None

    def __init__(self, layers: Iterable[InvertibleLayer], backward: str = "invert", reuse_output: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, InvertibleLayer):
                raise RevtrainError(
                    f"Layer {index} of the chain is a {type(layer).__name__}, which has no inverse.\n"
                    "Expected InvertibleLayer objects; put other modules outside the chain or inside F and G "
                    "of an AdditiveCoupling."
                )
        if backward not in BACKWARDS:
            raise RevtrainError(f"backward={backward!r} is unknown.\nExpected one of: {', '.join(BACKWARDS)}.")
        self.backward_mode = backward
        self.reuse_output = reuse_output

    def forward(self, x: Tensor) -> Tensor:
        if self.backward_mode == "store":
            for layer in self.layers:
                x = layer(x)
            return x
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
            return _ChainFunction.apply(x, self, *parameters)
        with torch.no_grad():
            return self.forward_(_own_copy(x))[0]

    def forward_(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        saved = []
        for layer in self.layers:
            if self.observer is not None:
                self.observer.on_input(layer, x)
            x, memory = layer.forward_(x)
            saved.append(memory)
        return x, saved

    def replay_(self, x: Tensor, saved: list[Any]) -> Tensor:
        for layer, memory in zip(self.layers, saved, strict=True):
            x = layer.replay_(x, memory)
        return x

    def replay_to_walk_back_(self, x: Tensor, saved: list[Any]) -> tuple[Tensor, list[Any]]:
        kept = []
        for layer, memory in zip(self.layers, saved, strict=True):
            x, memory = layer.replay_to_walk_back_(x, memory)
            kept.append(memory)
        return x, kept

    def inverse_(self, y: Tensor, saved: list[Any]) -> Tensor:
        for layer, memory in zip(reversed(self.layers), reversed(saved), strict=True):
            y = layer.inverse_(y, memory)
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: list[Any], grads: Gradients) -> tuple[Tensor, Tensor]:
        for layer, memory in zip(reversed(self.layers), reversed(saved), strict=True):
            y, dy = layer.backward_(y, dy, memory, grads)
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y, dy


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chain: InvertibleChain, *parameters: Tensor) -> Tensor:
        ctx.chain, ctx.parameters, ctx.input_dtype = chain, parameters, x.dtype
        # Recomputation must round as the forward pass did, so it runs under the same autocast state. Its cache
        # stays off: a weight cast without a graph (here) must not be found where a graph is wanted (there).
        device = x.device.type
        ctx.autocast = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        with ctx.autocast():
            y, ctx.saved = chain.forward_(_own_copy(x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (y,) = ctx.saved_tensors
        y = y.detach() if ctx.chain.reuse_output else y.detach().clone()
        # dy may be shared with other branches of the caller's graph, or be expanded: take a copy to work in.
        dy = dy.to(y.dtype, copy=True, memory_format=torch.contiguous_format)
        grads = Gradients(ctx.parameters)
        with ctx.autocast():
            _, dx = ctx.chain.backward_(y, dy, ctx.saved, grads)
        dx = dx.to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        return dx, None, *grads.values()


def _own_copy(x: Tensor) -> Tensor:
    """A contiguous copy that the chain may overwrite: the caller's graph may need `x` (a ReLU saves it).

    Under autocast the stream stays in float32: its sums are what the inverse has to undo.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.float32 if autocast and x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


@contextmanager
def observe(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Attach `observer` to every chain inside `model` for the duration of the block."""
    chains = [m for m in model.modules() if isinstance(m, InvertibleChain)]
    for chain in chains:
        chain.observer = observer
    try:
        yield
    finally:
        for chain in chains:
            chain.observer = None
