"""What an invertible layer is, and the two small helpers that every such layer uses.

The data's way through a reversible network:

    forward    x --forward_--> y            in the chain's own buffer; only `saved` (a few numbers) is kept
    backward   (y, dy) --backward_--> (x, dx)   in the same two buffers; parameter gradients go to `grads`

A method whose name ends in an underscore may overwrite the storage of the tensors that it is given, as
everywhere in torch, and runs without autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MIB = 2**20


class Gradients:
    """Parameter gradients gathered during one backward pass of a chain.

    They go back through autograd, so hooks, `torch.autograd.grad` and DDP see them.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = list(parameters)
        self._values: dict[int, Tensor | None] = {id(p): None for p in self.parameters if p.requires_grad}

    def wanted(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those of `parameters` whose gradient somebody asks for."""
        return [p for p in parameters if id(p) in self._values]

    def add(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Add `gradient` (same shape as `parameter`) to what is gathered; the tensor is then ours."""
        if gradient is None or id(parameter) not in self._values:
            return
        gathered = self._values[id(parameter)]
        if gathered is None:
            self._values[id(parameter)] = gradient.to(parameter.dtype)
        else:
            gathered.add_(gradient)

    def values(self) -> list[Tensor | None]:
        """One gradient a parameter, in the order given; None where nothing arrived."""
        return [self._values.get(id(p)) for p in self.parameters]


class InvertibleLayer(nn.Module):
    """A layer with an analytic inverse.

    A subclass writes `forward` and `inverse`; that is enough for `InvertibleChain` to train through it
    without storing its input. The methods with an underscore are the memory-lean forms of the same
    functions; a subclass overrides them where it can work in place.

    `saved` is what the inverse needs besides y (BN: mean and standard deviation; most layers: None). It
    travels as a value, never on `self`, so a recomputation cannot update running statistics twice and one
    layer may be used several times in one graph.

    `chunk_bytes` bounds each temporary of the in-place passes, in bytes. `is_pointwise`: the layer works value by
    value but for statistics, so that computing it again costs next to nothing. `passes_integers`: the lean methods
    take states of an integer stream, too (see revtrain.stream).
    """

    chunk_bytes: int = 2 * MIB
    is_pointwise: bool = False
    passes_integers: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """y of x by ordinary autograd: the noise-free twin (`backward=store`)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, saved: Any = None) -> Tensor:
        """x of y; neither y nor `saved` is changed."""
        return self.inverse_(y.clone(memory_format=torch.contiguous_format), saved)

    # The lean forms. The defaults serve any layer that has only forward and inverse.

    def forward_(self, x: Tensor) -> tuple[Tensor, Any]:
        """(y, saved); updates running statistics as `forward` does."""
        return self.forward(x), None

    def replay_(self, x: Tensor, saved: Any) -> Tensor:
        """y of x a second time, with the `saved` of the first; updates nothing."""
        with frozen_running_statistics(self):
            return self.forward(x)

    def replay_to_walk_back_(self, x: Tensor, saved: Any) -> tuple[Tensor, Any]:
        """(y, saved) a second time, right before `backward_`: more may be kept, since it lives for a moment only."""
        return self.replay_(x, saved), saved

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


def batch_chunks(x: Tensor, chunk_bytes: int) -> Iterator[slice]:
    """Slices over the batch of `x` (B, ...), each of at most `chunk_bytes` bytes but one sample at least."""
    sample_bytes = max(1, x[0].numel() * x.element_size())
    step = max(1, chunk_bytes // sample_bytes)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def set_chunk_mib(model: nn.Module, chunk_mib: float) -> None:
    """Let every layer of `model` that works in chunks use temporaries of at most `chunk_mib` MiB."""
    for module in model.modules():
        if hasattr(module, "chunk_bytes"):
            module.chunk_bytes = max(1, int(chunk_mib * MIB))


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms inside `module`, torch's and ours, normalise as in training, but update nothing."""
    tracking = [m for m in module.modules() if m.training and getattr(m, "track_running_stats", False)]
    for m in tracking:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


@contextmanager
def stand_ins(module: nn.Module, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Replace `parameters` inside `module` by detached leaves of the same storage, and yield those.

    A gradient taken piece by piece with respect to the leaves passes no hook of the real parameters; these
    then fire once, with the whole gradient, when the chain returns it through autograd.
    """
    leaf_of = {id(p): p.detach().requires_grad_() for p in parameters}
    places = [
        (m, name, p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in leaf_of
    ]
    for m, name, p in places:
        m._parameters[name] = leaf_of[id(p)]
    try:
        yield [leaf_of[id(p)] for p in parameters]
    finally:
        for m, name, p in places:
            m._parameters[name] = p
