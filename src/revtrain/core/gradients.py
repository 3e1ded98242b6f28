"""Gradients that one backward pass of a chain gathers for its parameters and side inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from revtrain.core.recompute import is_dense, memory_of, shares_memory


class Gradients:
    """Gradients gathered during one backward pass of a chain, of parameters and of side inputs.

    They go back through autograd, so hooks, `torch.autograd.grad` and DDP see them. What is gathered is never shared
    with anybody: autograd may return the very tensor that it was handed, or one tensor for two parameters.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)
        self._values: dict[int, Tensor | None] = {id(each): None for each in self.tensors if each.requires_grad}
        self._taken: set[int] = set()  # the memory of what is gathered

    def wanted(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those of `tensors` whose gradient somebody asks for."""
        return [each for each in tensors if id(each) in self._values]

    def add(self, tensor: Tensor, gradient: Tensor | None, lent: Tensor | None = None) -> None:
        """Add `gradient` (same shape as `tensor`) to what is gathered.

        Args:
            lent: what autograd was handed to compute it: `gradient` may be the very same memory, which is then copied.
        """
        if gradient is None or id(tensor) not in self._values:
            return
        gathered = self._values[id(tensor)]
        if gathered is not None:
            gathered.add_(gradient)
            return
        # many small terms: a sum in 16 bit would lose them
        own = gradient.to(torch.promote_types(tensor.dtype, torch.float32))
        if hasattr(own, "full_tensor"):  # a share of it, made for this
            self._values[id(tensor)] = own
            return
        if not is_dense(own) or memory_of(own) in self._taken or (lent is not None and shares_memory(own, lent)):
            own = own.clone(memory_format=torch.contiguous_format)
        self._taken.add(memory_of(own))
        self._values[id(tensor)] = own

    @contextmanager
    def standing_for(self, others: Sequence[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
        """Inside, the first of each triple is gathered in the place of the second, which then gets the third of it."""
        others = [each for each in others if id(each[1]) in self._values]
        self._values |= {id(inside): None for inside, *_ in others}
        yield
        for inside, outside, share in others:
            gathered = self._values.pop(id(inside))
            self.add(outside, None if gathered is None else share(gathered))

    def values(self) -> list[Tensor | None]:
        """One gradient for each of the tensors, in the order given; None where nothing arrived."""
        return [None if g is None else g.to(t.dtype) for t, g in ((t, self._values.get(id(t))) for t in self.tensors)]
