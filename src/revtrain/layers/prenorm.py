"""Batch normalisation in front of a per-sample function: wide residuals that are never alive as a whole.

F(x) = body(BN(x)), where body treats each sample on its own (convolutions, any activation, group norm, ...). Only
the BN looks at the whole batch, and it looks at x, which the coupling has at hand. Its gradient is linear in two
sums over the batch (see `NormOverPieces`), so one pass over pieces of the batch does all the work: it recomputes body,
takes its result off the other half, passes the gradient on and adds up the sums. The activations inside F are alive for
one piece of the batch at a time, whatever its width and depth, and body is computed once more in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from revtrain.core.layer import context_for
from revtrain.core.pieces import MIB, batch_pieces
from revtrain.core.precision import read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, is_rewritten, parameters_of
from revtrain.layers.norm_pieces import NormOverPieces, Statistics, normalise
from revtrain.layers.residual_pass import ResidualPass, floating_dtype, undo_piece


class PreNorm(nn.Module):
    """body(BN(x)), x (B, C, H, W); an ordinary module, which a coupling runs over pieces of the batch.

    Args:
        channels: C.
        body: a module from (B, C, H, W) to the same shape that treats each sample on its own: no batch
            statistics inside. Dropout draws the same mask when the body is recomputed.
    """

    piece_bytes: int = 2 * MIB

    def __init__(self, channels: int, body: nn.Module):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.body = body

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        over_pieces = not is_rewritten(self.norm, "weight", "bias")  # in the place of norm(x)
        context = context_for(self.body, context)
        if over_pieces:
            return self.body(normalise(x, self.norm, self.piece_bytes), *context)
        return self.body(self.norm(x), *context)

    def hands_context_to(self) -> Iterable[nn.Module]:
        """The modules that may take side inputs."""
        return [self.body]


class PreNormPass(ResidualPass):
    """`target` +/- s body(BN(`source`)), one piece of the batch at a time."""

    @property
    def body_context(self) -> tuple[Tensor, ...]:
        """The side inputs, if the body takes some."""
        return context_for(self.function.body, self.context)

    def add_(self, source: Tensor, target: Tensor) -> tuple[Statistics, FirstRun]:
        norm, first = self._norm(source), FirstRun(self.function.body, source.device, f"{self.name}.body")
        for sl, residual in first.in_pieces(norm.pieces, lambda sl: self._normalised(norm, sl), *self.body_context):
            self.residual_sum.add_(target[sl], self.fits(residual, target[sl]), 1, self.piece_bytes, self.overflows)
            del residual
        return norm.statistics, first.end()

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        statistics, first = saved
        norm = self._norm(source, statistics)
        with SecondRun(first) as again:
            for sl in first.pieces:
                residual = again(self._normalised(norm, sl), *self.body_context)
                self.residual_sum.add_(target[sl], residual, sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        statistics, first = saved
        norm, wanted = self._norm(source, statistics), grads.wanted(parameters_of(self.function.body))
        with SecondRun(first, wanted) as again:
            for sl in first.pieces:
                leaf = self._normalised(norm, sl).requires_grad_()
                du = undo_piece(
                    again,
                    self.residual_sum,
                    leaf,
                    target[sl],
                    dtarget[sl],
                    wanted,
                    grads,
                    self.piece_bytes,
                    self.body_context,
                )
                del leaf
                if du is not None:
                    norm.add_gradient_(dsource, du, sl)
                del du
        norm.finish_(dsource, grads)

    def _normalised(self, norm: NormOverPieces, sl: slice) -> Tensor:
        u = norm.normalised(sl)
        return u.to(read_dtype(u))

    def _norm(self, source: Tensor, statistics: Statistics | None = None) -> NormOverPieces:
        return NormOverPieces(
            self.function.norm, source, self.view, self._pieces(source), statistics, self.memory_format
        )

    def _pieces(self, source: Tensor) -> Iterator[slice]:
        if self.body_context:
            return iter([slice(None)])
        # By the bytes of what the body reads: the state itself may be narrower.
        wide = floating_dtype(self.function).itemsize
        return batch_pieces(source, self.piece_bytes * source.element_size() // wide)
