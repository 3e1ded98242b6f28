"""The end of a chain that says something of every pixel: logits, or the loss, which needs no logits of full size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.layer import differentiate_, end_of
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB, Piece, pieces
from revtrain.layers.norm_pieces import NormOverPieces, normalise
from revtrain.layers.residual_pass import floating_dtype

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class DenseHead(nn.Module):
    """BN, LeakyReLU, a 1x1 convolution: (B, C, H, W) -> logits (B, classes, H, W), or the loss of each image, (B,).

    `chain(x)` returns the logits. `chain(x, labels)` returns the mean cross-entropy over the pixels of each image, and
    works it out piece by piece, so that no tensor of `classes` values a pixel is made; its mean is what to call
    `backward()` on. Meanwhile `confusion` counts: entry (i, j) how many pixels of class i were taken for class j, since
    it was last set to zero. Like `Head` it needs no inverse, and begins the gradient of the state itself.

    Labels (B, H, W) may be of any type of whole numbers: uint8 ones, as masks are stored, take a byte a pixel. torch's
    loss needs int64, which a chain makes of them piece by piece, and only one with `backward="store"` of all at once.

    Args:
        channels: C.
        classes: number of logits.
        slope: n of the LeakyReLU, without unit.
        dims: 1, 2 or 3: of rows, images or volumes.
        ignored: the label of pixels that count for nothing.

    Raises `RevtrainError` for labels of another shape than the image, or that are not whole numbers.
    """

    piece_bytes: int = 2 * MIB
    norm: Any  # a batch norm of torch's
    confusion: Tensor

    def __init__(self, channels: int, classes: int, slope: float = 0.2, dims: int = 2, ignored: int = 255):
        super().__init__()
        self.slope, self.classes, self.ignored = slope, classes, ignored
        self.norm = _NORMS[dims](channels)
        self.conv = _CONVOLUTIONS[dims](channels, classes, 1)
        self.register_buffer("confusion", torch.zeros(classes, classes, dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, ignored={self.ignored}"

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        u = normalise(x, self.norm, self.piece_bytes)
        if labels is None:
            return self._logits(u)
        self._check(x, labels)
        labels = labels.long()
        return self._losses(self._logits(u), labels, counts=True) / self._pixels(labels).clamp(min=1)

    def forward_(
        self, state: Tensor, state_format: StateFormat = PLAIN, labels: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """(logits or losses, saved) of a chain's state, which is not changed; updates running statistics."""
        inputs = NormOverPieces(self.norm, state, state_format.unit, self.piece_bytes)
        first, wide = FirstRun(self.conv, state.device), floating_dtype(self.conv)
        if labels is None:
            logits = state.new_empty((len(state), self.classes, *state.shape[2:]), dtype=wide)
            for piece in self._pieces(state):
                logits[piece.own] = first(self._activated(inputs.normalised(piece.own)))
            first.end()
            return logits, (inputs.statistics, None)
        self._check(state, labels)
        losses = state.new_zeros(len(state), dtype=wide)
        pixels = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        for piece in self._pieces(state):
            own, own_labels = first(self._activated(inputs.normalised(piece.own))), _of_pixels(labels, piece)
            losses[piece.samples] += self._losses(own, own_labels, counts=True)
            pixels[piece.samples] += self._pixels(own_labels)
        first.end()
        pixels.clamp_(min=1)
        return losses / pixels, (inputs.statistics, pixels)

    def backward_(
        self,
        state: Tensor,
        dresult: Tensor,
        saved: Any,
        grads: Gradients,
        state_format: StateFormat,
        dtype: torch.dtype,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The gradient of `state`, in `dtype`; those of the parameters are added to `grads`."""
        statistics, pixels = saved
        inputs = NormOverPieces(self.norm, state, state_format.unit, self.piece_bytes, statistics)
        dstate = torch.zeros(state.shape, dtype=dtype, device=state.device)
        wanted = grads.wanted(parameters_of(self.conv))
        dresult = dresult if labels is None else dresult / pixels
        with SecondRun(FirstRun(self.conv, state.device).begin_again(), wanted) as again:
            for piece in self._pieces(state):
                leaf = inputs.normalised(piece.own).requires_grad_()
                with torch.enable_grad():
                    result = again.within(self._logits, leaf)
                    if labels is not None:
                        result = self._losses(result, _of_pixels(labels, piece))
                dpiece = dresult[piece.own if labels is None else piece.samples]
                end = end_of(result)
                del result
                du = differentiate_(end, leaf, (), again.leaves, dpiece, wanted, grads, writes_on=False)
                if du is not None:
                    inputs.add_gradient_(dstate, du, piece.own)
                del du, end, leaf
        inputs.finish_(dstate, grads)
        return dstate

    def _activated(self, u: Tensor) -> Tensor:
        return F.leaky_relu(u, self.slope)

    def _logits(self, u: Tensor) -> Tensor:
        return self.conv(self._activated(u))

    def _losses(self, logits: Tensor, labels: Tensor, counts: bool = False) -> Tensor:
        """The cross-entropy of each sample, summed over its pixels, (B,); `counts`: into the confusion, too."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if counts:
            known = labels != self.ignored
            pairs = labels.where(known, 0) * self.classes + wide.detach().argmax(1)
            own = torch.zeros(self.classes**2, dtype=torch.int64, device=labels.device)
            self.confusion += own.index_add_(0, pairs.flatten(), known.flatten().long()).view_as(self.confusion)
        return F.cross_entropy(wide, labels, reduction="none", ignore_index=self.ignored).flatten(1).sum(1)

    def _pixels(self, labels: Tensor) -> Tensor:
        """How many pixels of each image count, (B,)."""
        return (labels != self.ignored).flatten(1).sum(1)

    def _pieces(self, state: Tensor) -> Iterator[Piece]:
        # By the bytes of what is computed: the state itself may be narrower.
        return pieces(state, self.piece_bytes * state.element_size() // floating_dtype(self.conv).itemsize)

    def _check(self, x: Tensor, labels: Tensor) -> None:
        expected = (len(x), *x.shape[2:])
        if labels.is_floating_point() or labels.is_complex() or labels.shape != expected:
            raise RevtrainError(
                f"DenseHead was given labels {tuple(labels.shape)} of {labels.dtype} for a state of {tuple(x.shape)}.\n"
                f"Expected whole numbers of shape {expected}: a class for each pixel, {self.ignored} for none."
            )


def _of_pixels(labels: Tensor, piece: Piece) -> Tensor:
    """Labels (B, H, W) of a piece of (B, C, H, W), in int64."""
    return labels[(piece.samples, *piece.own[2:])].long()


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Of each class, from a confusion matrix (classes, classes): (classes,), not a number where neither truth nor
    prediction has any pixel of it."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)
