"""The end of a reversible trunk: from its last state to the logits, without another tensor of the state's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import differentiate_, end_of
from revtrain.core.pieces import MIB, batch_pieces, join
from revtrain.core.precision import read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.layers.norm_pieces import NormOverPieces, normalise
from revtrain.layers.pooling import merge_sub_images
from revtrain.layers.residual_pass import floating_dtype


class Head(nn.Module):
    """[BN, LeakyReLU,] mean over pixels, merge of sub-images, linear: (B S, C, H, W) -> logits (B, classes).

    It needs no inverse, since it leaves the state that it reads as it is. At the end of a chain
    (`InvertibleChain(head=...)`) it works over pieces of the batch and keeps nothing but the statistics of its BN. The
    gradient of the state begins here, in one tensor of the state's size, which the layers before then work in.

    Args:
        channels: C.
        classes: number of logits.
        sub_images: S, the parts that batch pooling made of each image.
        slope: n of the LeakyReLU after the BN, without unit; None: neither of the two.
    """

    piece_bytes: int = 2 * MIB

    def __init__(self, channels: int, classes: int, sub_images: int = 1, slope: float | None = None):
        super().__init__()
        self.sub_images, self.slope = sub_images, slope
        self.norm = None if slope is None else nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def extra_repr(self) -> str:
        return f"sub_images={self.sub_images}, slope={self.slope}"

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(self._features(x if self.norm is None else normalise(x, self.norm, self.piece_bytes)))

    def forward_(self, state: Tensor, state_format: StateFormat = PLAIN) -> tuple[Tensor, Any]:
        """(logits, saved) of a chain's state, which is not changed; updates running statistics."""
        inputs = self._inputs(state, state_format)
        logits = [self._logits(self._features(inputs.normalised(sl))) for sl in inputs.pieces]
        return join(logits, state.shape[0] // self.sub_images), inputs.statistics

    def backward_(
        self,
        state: Tensor,
        dlogits: Tensor,
        saved: Any,
        grads: Gradients,
        state_format: StateFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        """The gradient of `state`, in `dtype`; those of the parameters are added to `grads`."""
        inputs = self._inputs(state, state_format, saved)
        dstate = torch.zeros(state.shape, dtype=dtype, device=state.device)
        wanted = grads.wanted(parameters_of(self.linear))
        with SecondRun(FirstRun(self.linear, state.device).begin_again(), wanted) as again:
            for sl in inputs.pieces:
                leaf = inputs.normalised(sl).requires_grad_()
                with torch.enable_grad():
                    logits = again.within(self._logits, self._features(leaf))
                images = slice(sl.start // self.sub_images, sl.stop // self.sub_images)
                end = end_of(logits)
                du = differentiate_(end, leaf, (), again.leaves, dlogits[images], wanted, grads, writes_on=False)
                del logits, end
                if du is not None:
                    inputs.add_gradient_(dstate, du, sl)
        inputs.finish_(dstate, grads)
        return dstate

    def _features(self, u: Tensor) -> Tensor:
        activated = u if self.slope is None else F.leaky_relu(u, self.slope)
        return activated.sum((2, 3)) / (u.shape[2] * u.shape[3])

    def _logits(self, features: Tensor) -> Tensor:
        return self.linear(merge_sub_images(features.to(read_dtype(features)), self.sub_images))

    def _inputs(self, state: Tensor, state_format: StateFormat, saved: Any = None) -> NormOverPieces | _NoNorm:
        def read(part: Tensor) -> Tensor:
            return part if part.is_floating_point() else state_format.decode(part, floating_dtype(self.linear))

        pieces = self._pieces(state)
        if self.norm is None:
            return _NoNorm(state, read, pieces)
        return NormOverPieces(self.norm, state, read, pieces, saved)

    def _pieces(self, state: Tensor) -> Iterator[slice]:
        # Whole images, whose parts lie side by side in the batch.
        for sl in batch_pieces(state.view(state.shape[0] // self.sub_images, -1), self.piece_bytes):
            yield slice(sl.start * self.sub_images, sl.stop * self.sub_images)


class _NoNorm:
    """A `NormOverPieces` that leaves its input as it is."""

    statistics = None

    def __init__(self, source: Tensor, read: Callable[[Tensor], Tensor], pieces: Iterable[slice]):
        self.source, self.read, self.pieces = source, read, list(pieces)

    def normalised(self, sl: slice) -> Tensor:
        return self.read(self.source[sl]).detach()

    def add_gradient_(self, dx: Tensor, du: Tensor, sl: slice) -> None:
        dx[sl].add_(du)

    def finish_(self, dx: Tensor, grads: Gradients) -> None:
        pass
