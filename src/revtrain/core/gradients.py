"""The parameter gradients of one backward pass of a chain, and how a module is computed again without side effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Gradients:
    """Parameter gradients gathered during one backward pass of a chain.

    They go back through autograd, so hooks, `torch.autograd.grad` and DDP see them.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = list(parameters)
        self._values: dict[int, Tensor | None] = {id(p): None for p in self.parameters if p.requires_grad}

    def wanted(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those of `parameters` that require a gradient."""
        return [p for p in parameters if id(p) in self._values]

    def add(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Add `gradient` (same shape as `parameter`) to what is gathered; the caller must not use the tensor again."""
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


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms inside `module`, torch's and ours, normalise as in training, but update nothing."""
    tracking = [m for m in module.modules() if m.training and getattr(m, "track_running_stats", False)]
    for m in tracking:
        m.track_running_stats = False  # type: ignore[assignment]  # any module's attribute
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True  # type: ignore[assignment]


@contextmanager
def stand_ins(module: nn.Module, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, `module` computes with detached tensors in the place of `parameters`; yields those, of the same storage.

    Gradients are taken of them, piece by piece of the batch. Hooks on the real parameters (as DDP has them) then run
    once, with the whole gradient, when the chain returns it through autograd.
    """
    leaf_of = {id(p): p.detach().requires_grad_() for p in parameters}
    places = [
        (m, name, p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in leaf_of
    ]
    for m, name, p in places:
        m._parameters[name] = leaf_of[id(p)]  # type: ignore[assignment]  # a leaf of the same use
    try:
        yield [leaf_of[id(p)] for p in parameters]
    finally:
        for m, name, p in places:
            m._parameters[name] = p
