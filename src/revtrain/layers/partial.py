"""A chain for some of the channels; the others pass, as skips of a U-Net do (Etmann et al., 2020, arXiv:2005.05220)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers.channels import Split, part_sizes, two_parts


class PartialChain(InvertibleLayer):
    """y = (x1, chain(x2)): x (B, C, ...) is cut into two parts, and the second one goes through layers of its own.

    What these do in between is theirs: they may pool on their way, if they unpool before their end. x1 passes as it is
    and costs nothing, where a U-Net keeps a copy of each skip. In place, the second part stays where it lies in the
    state.

    Args:
        channels: C, cut into two halves, or the sizes of both parts.
        layers: `InvertibleLayer`s, which take and return tensors of the second part's shape.
        state_format: the number format of x and y, that of the chain around it.

    Raises `RevtrainError` for channels that cannot be cut, and for an inner result of another shape.
    """

    passes_integers = True

    def __init__(self, channels: Split, layers: Iterable[InvertibleLayer], state_format: StateFormat = PLAIN):
        super().__init__()
        self.sizes = part_sizes(channels, self)
        self.chain = InvertibleChain(layers, backward="store", state_format=state_format)
        self.state_format = state_format

    def extra_repr(self) -> str:
        return f"{self.sizes}"

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        first, second = two_parts(x, 1, self.sizes, self)
        return torch.cat([first, self._fits(self.chain(second, *context), second)], 1)

    def hands_context_to(self) -> Iterable[InvertibleLayer]:
        """The modules that may take side inputs."""
        return [self.chain]

    def stand_in(self, y: Tensor) -> list[Any]:
        return self.chain.stand_in(self._second(y))

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, list[Any]]:
        second = self._second(x)
        result, saved = self.chain.forward_(second, *context)
        _put(second, self._fits(result, second))
        return x, saved

    def recompute_(self, x: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        second = self._second(x)
        _put(second, self.chain.recompute_(second, saved, *context))
        return x

    def inverse_(self, y: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        second = self._second(y)
        _put(second, self.chain.inverse_(second, saved, *context))
        return y

    def backward_(
        self, y: Tensor, dy: Tensor, saved: list[Any], grads: Gradients, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        second, dsecond = self._second(y), self._second(dy)
        x, dx = self.chain.backward_(second, dsecond, saved, grads, *context)
        _put(second, x)
        _put(dsecond, dx)
        return y, dy

    def _second(self, x: Tensor) -> Tensor:
        return two_parts(x, 1, self.sizes, self)[1]

    def _fits(self, result: Tensor, second: Tensor) -> Tensor:
        if result.shape != second.shape:
            raise RevtrainError(
                f"{type(self).__name__}: its layers made {tuple(result.shape)} of a part of {tuple(second.shape)}.\n"
                "Expected the same shape: for each pooling on the way down an unpooling on the way up."
            )
        return result


def _put(part: Tensor, result: Tensor) -> None:
    """`result` where `part` lies; most layers have left it there."""
    steps = zip(result.stride(), part.stride(), part.shape, strict=True)
    lies_there = (
        result.untyped_storage()._cdata == part.untyped_storage()._cdata
        and result.storage_offset() == part.storage_offset()
        and all(own == other for own, other, size in steps if size > 1)
    )
    if not lies_there:
        part.copy_(result)
