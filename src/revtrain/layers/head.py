"""The end of a reversible trunk: from its last state to the logits, without another tensor of the state's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import differentiate_, end_of
from revtrain.core.precision import read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.kernels.pieces import MIB, Index, batch_pieces, join, pieces
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
        u = x if self.norm is None else normalise(x, self.norm, self.piece_bytes)
        return self.linear(self._merged(self._sums(u) / prod(u.shape[2:])))

    def forward_(self, state: Tensor, state_format: StateFormat = PLAIN) -> tuple[Tensor, Any]:
        """(logits, saved) of a chain's state, which is not changed; updates running statistics."""
        inputs = self._inputs(state, state_format)
        linear = FirstRun(self.linear, state.device)  # which narrows its weights once, under autocast
        logits = [linear(self._merged(self._features(inputs, *group)[0])) for group in self._groups(state)]
        linear.end()
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
        wanted, pixels = grads.wanted(parameters_of(self.linear)), prod(state.shape[2:])
        with SecondRun(FirstRun(self.linear, state.device).begin_again(), wanted) as again:
            for samples, parts in self._groups(state):
                leaf, u = self._features(inputs, samples, parts)
                with torch.enable_grad():
                    logits = again.within(lambda leaf: self.linear(self._merged(leaf)), leaf.requires_grad_())
                images = slice(samples.start // self.sub_images, samples.stop // self.sub_images)
                end = end_of(logits)
                dfeatures = differentiate_(end, leaf, (), again.leaves, dlogits[images], wanted, grads, writes_on=False)
                del logits, end
                if dfeatures is None:
                    continue
                dsums = dfeatures.div_(pixels)
                for part in parts:
                    u = inputs.normalised(part) if u is None else u
                    du = _per_pixel(dsums[_within(part, samples)], u)
                    if self.slope is not None:
                        du = torch.ops.aten.leaky_relu_backward(du, u, self.slope, False)
                    inputs.add_gradient_(dstate, du, part)
                    u = None
        inputs.finish_(dstate, grads)
        return dstate

    def _sums(self, u: Tensor) -> Tensor:
        """Over the pixels, activated: (B, C)."""
        return (u if self.slope is None else F.leaky_relu(u, self.slope)).sum(tuple(range(2, u.dim())))

    def _features(
        self, inputs: NormOverPieces | _NoNorm, samples: slice, parts: Sequence[Index]
    ) -> tuple[Tensor, Tensor | None]:
        """The means over the pixels of some samples, (n, C), and the normalised values, where these are one part."""
        pixels = prod(inputs.source.shape[2:])
        if len(parts) == 1:
            u = inputs.normalised(parts[0])
            return self._sums(u) / pixels, u
        shape = samples.stop - samples.start, inputs.source.shape[1]
        sums = inputs.source.new_zeros(shape, dtype=floating_dtype(self.linear))
        for part in parts:
            sums[_within(part, samples)] += self._sums(inputs.normalised(part))
        return sums / pixels, None

    def _merged(self, features: Tensor) -> Tensor:
        return merge_sub_images(features.to(read_dtype(features)), self.sub_images)

    def _inputs(self, state: Tensor, state_format: StateFormat, saved: Any = None) -> NormOverPieces | _NoNorm:
        if self.norm is None:
            return _NoNorm(state, lambda part: self._values(part, state_format))
        return NormOverPieces(self.norm, state, state_format.unit, self.piece_bytes, saved)

    def _values(self, part: Tensor, state_format: StateFormat) -> Tensor:
        return part if part.is_floating_point() else state_format.decode(part, floating_dtype(self.linear))

    def _groups(self, state: Tensor) -> Iterator[tuple[slice, list[Index]]]:
        """Samples that are whole images, their parts of batch pooling side by side, and the pieces to read them in."""
        # By the bytes of what is computed: the state itself may be narrower.
        piece_bytes = self.piece_bytes * state.element_size() // floating_dtype(self.linear).itemsize
        for images in batch_pieces(state.view(state.shape[0] // self.sub_images, -1), piece_bytes):
            samples = slice(images.start * self.sub_images, images.stop * self.sub_images)
            own = state[samples]
            fits = own.numel() * own.element_size() <= piece_bytes
            yield samples, [(samples,)] if fits else [_shifted(each.own, samples) for each in pieces(own, piece_bytes)]


def _per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Values (B, C) for all pixels of x (B, C, ...)."""
    return values.view(*values.shape, *[1] * (x.dim() - 2)).expand_as(x)


def _shifted(index: Index, samples: slice) -> Index:
    """`index` into x[samples] as one into x."""
    own, *rest = index
    return slice(own.start + samples.start, own.stop + samples.start), *rest


def _within(index: Index, samples: slice) -> slice:
    """Where the samples of an index into x are in x[samples]."""
    return slice(index[0].start - samples.start, index[0].stop - samples.start)


class _NoNorm:
    """A `NormOverPieces` that leaves its input as it is."""

    statistics = None

    def __init__(self, source: Tensor, read: Callable[[Tensor], Tensor]):
        self.source, self.read = source, read

    def normalised(self, where: Index) -> Tensor:
        return self.read(self.source[where]).detach()

    def add_gradient_(self, dx: Tensor, du: Tensor, where: Index) -> None:
        dx[where].add_(du)

    def finish_(self, dx: Tensor, grads: Gradients) -> None:
        pass
