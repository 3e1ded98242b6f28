"""Batch normalisation in front of a per-sample function: wide residuals that are never alive as a whole.

F(x) = body(BN(x)), where body treats each sample on its own (convolutions, any activation, group norm, ...). Only
the BN looks at the whole batch, and it looks at x, which the coupling has at hand. Its gradient is linear in two
sums over the batch (see `NormOverPieces`), so one pass over pieces of the batch does all the work: it recomputes body,
takes its result off the other half, passes the gradient on and adds up the sums. The activations inside F are alive for
one piece of the batch at a time, whatever its width and depth, and body is computed once more in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from revtrain.core.gradients import stand_ins
from revtrain.core.pieces import MIB, batch_pieces
from revtrain.core.random_state import RandomState, random_state, run_noting_random_state
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

    def forward(self, x: Tensor) -> Tensor:
        return self.body(normalise(x, self.norm, self.piece_bytes))


class PreNormPass(ResidualPass):
    """`target` +/- s body(BN(`source`)), one piece of the batch at a time."""

    function: PreNorm

    def add_(self, source: Tensor, target: Tensor) -> tuple[Statistics, list[RandomState | None]]:
        norm, states = self._norm(source), []
        for sl in norm.pieces:
            residual, state = run_noting_random_state(self.function.body, norm.normalised(sl))
            self.residual_sum.add_(target[sl], residual, 1, self.piece_bytes, self.overflows)
            states.append(state)
        return norm.statistics, states

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        statistics, states = saved
        norm = self._norm(source, statistics)
        for sl, state in zip(norm.pieces, states, strict=True):
            with random_state(state, source.device):
                residual = self.function.body(norm.normalised(sl))
            self.residual_sum.add_(target[sl], residual, sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        statistics, states = saved
        norm, body = self._norm(source, statistics), self.function.body
        parameters = grads.wanted(body.parameters())
        with stand_ins(body, parameters) as leaves:
            for sl, state in zip(norm.pieces, states, strict=True):
                leaf = norm.normalised(sl).requires_grad_()
                du, gradients = undo_piece(
                    body, self.residual_sum, leaf, target[sl], dtarget[sl], state, leaves, self.piece_bytes
                )
                del leaf
                if du is not None:
                    norm.add_gradient_(dsource, du, sl)
                del du
                while gradients:  # one at a time, so that each is gone before the next piece
                    grads.add(parameters[len(gradients) - 1], gradients.pop())
        norm.finish_(dsource, grads)

    def _norm(self, source: Tensor, statistics: Statistics | None = None) -> NormOverPieces:
        return NormOverPieces(
            self.function.norm, source, self.view, self._pieces(source), statistics, self.memory_format
        )

    def _pieces(self, source: Tensor) -> Iterator[slice]:
        # By the bytes of what the body reads: the state itself may be narrower.
        wide = floating_dtype(self.function).itemsize
        return batch_pieces(source, self.piece_bytes * source.element_size() // wide)
