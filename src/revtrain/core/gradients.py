"""Gradients that one backward pass of a chain gathers for its parameters and side inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from revtrain.core.precision import NARROW
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

    def add_all(self, tensors: Sequence[Tensor], gradients: list[Tensor | None], lent: Tensor | None = None) -> None:
        """As `add`, of each; `gradients` is empty afterwards.

        Several are widened, or added to what is gathered, in one operation: on a GPU each costs a launch.
        """
        plain = [
            index
            for index, (tensor, each) in enumerate(zip(tensors, gradients, strict=True))
            if _is_plain(each) and id(tensor) in self._values and tensor.dtype == torch.float32
        ]
        narrow = [index for index in plain if cast(Tensor, gradients[index]).dtype in NARROW]
        if len(narrow) > 1:
            given = [cast(Tensor, gradients[index]) for index in narrow]
            wide = [torch.empty_like(each, dtype=torch.float32) for each in given]
            torch._foreach_copy_(wide, given)
            for index, each in zip(narrow, wide, strict=True):
                gradients[index] = each
            del given, wide
        more = [
            index
            for index in plain
            if _is_plain(self._values[id(tensors[index])]) and cast(Tensor, gradients[index]).dtype == torch.float32
        ]
        if len(more) > 1 and len({id(tensors[index]) for index in more}) == len(more):
            gathered = [cast(Tensor, self._values[id(tensors[index])]) for index in more]
            torch._foreach_add_(gathered, [cast(Tensor, gradients[index]) for index in more])
            for index in more:
                gradients[index] = None
        while gradients:  # one at a time, so that each is gone before the next piece
            self.add(tensors[len(gradients) - 1], gradients.pop(), lent)

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


def _is_plain(gradient: Tensor | None) -> bool:
    """Whether there is a gradient, and it is no share of one (a DTensor)."""
    return gradient is not None and not hasattr(gradient, "full_tensor")
