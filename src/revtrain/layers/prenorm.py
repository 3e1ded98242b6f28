"""Normalisation in front of a per-sample function: wide residuals that are never alive as a whole.

F(x) = body(norm(x)), where body treats each sample on its own (convolutions, any activation, group norm, attention
within a sample, ...). Only a batch norm looks at the whole batch, and it looks at x, which the coupling has at hand.
Its gradient is linear in two sums over the batch (see `NormOverPieces`), so one pass over pieces of the batch does all
the work: it recomputes body, takes its result off the other half, passes the gradient on and adds up the sums. The
activations inside F are alive for one piece of the batch at a time, whatever its width and depth, and body is computed
once more in all. A norm that looks at one sample at a time (LayerNorm, GroupNorm, RMSNorm) is run piece by
piece together with body.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from revtrain.core.hooks import has_hooks
from revtrain.core.layer import context_for
from revtrain.core.recompute import FirstRun, SecondRun, is_rewritten, parameters_of
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB, WHOLE, Piece
from revtrain.layers.norm_pieces import NormOverPieces, Statistics, normalise, runs_over_pieces, stand_in_statistics
from revtrain.layers.per_sample import is_a_norm_of_each_sample
from revtrain.layers.residual_pass import ResidualPass, floating_dtype


class PreNorm(nn.Module):
    """body(norm(x)), x (B, C, ...) or tokens (B, T, C); an ordinary module, which a coupling runs over pieces of the
    batch.

    Args:
        norm: C, for a BatchNorm2d of so many channels, which here takes any (B, C, ...); or a norm as a module: torch's
            BatchNorm1d, 2d and 3d, LayerNorm, GroupNorm, RMSNorm run over pieces, others with the whole batch.
        body: a module that treats each sample on its own: no batch statistics inside. Dropout draws the same mask when
            the body is recomputed. A result of another shape than x is for uneven couplings.

    With hooks on it or on its norm it is run with the whole batch at once, as any module.
    Raises `RevtrainError` for a norm or a body that is no module.
    """

    norm: Any  # a batch norm of torch's, or any module
    body: nn.Module
    is_prenorm = True
    piece_bytes: int = 2 * MIB

    def __init__(self, norm: int | nn.Module, body: nn.Module):
        super().__init__()
        if not isinstance(norm, int | nn.Module) or not isinstance(body, nn.Module):
            raise RevtrainError(
                f"PreNorm was given a {type(norm).__name__} as its norm and a {type(body).__name__} as its body.\n"
                "Expected a number of channels or a norm, and an nn.Module: nn.Tanh() rather than torch.tanh."
            )
        self.norm = nn.BatchNorm2d(norm) if isinstance(norm, int) else norm
        self.body = body

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        context = context_for(self.body, context)
        if self.runs_in_pieces():
            return self.body(normalise(x, self.norm, self.piece_bytes), *context)
        return self.body(self.norm(x), *context)

    def runs_in_pieces(self) -> bool:
        """Whether `NormOverPieces` does what a call of the norm would do."""
        is_own = type(self).forward is PreNorm.forward and "forward" not in vars(self) and not has_hooks(self)
        return is_own and runs_over_pieces(self.norm) and not is_rewritten(self.norm, "weight", "bias")

    def is_per_sample(self) -> bool:
        """Whether all of it looks at one sample at a time."""
        is_own = type(self).forward is PreNorm.forward and "forward" not in vars(self)
        return is_own and is_a_norm_of_each_sample(self.norm)

    def hands_context_to(self) -> Iterable[nn.Module]:
        """The modules that may take side inputs."""
        return [self.body]


class PreNormPass(ResidualPass):
    """`target` +/- s body(BN(`source`)), one piece of the batch at a time."""

    function: PreNorm

    @property
    def body_context(self) -> tuple[Tensor, ...]:
        """The side inputs, if the body takes some."""
        return context_for(self.function.body, self.context)

    def add_(self, source: Tensor, target: Tensor) -> tuple[Statistics, FirstRun]:
        norm, first = self._norm(source), FirstRun(self.function.body, source.device, f"{self.name}.body")
        for piece, residual in first.in_pieces(
            self._pieces(source), lambda piece: self._normalised(norm, piece), *self.body_context
        ):
            self.add_piece_(target, residual, piece, 1, self.overflows)
            del residual
        return norm.statistics, first.end()

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        statistics, first = saved
        norm = self._norm(source, statistics)
        with SecondRun(first) as again:
            for piece in self._pieces(source) if first.must_be_pure else first.pieces:
                residual = again(self._normalised(norm, piece), *self.body_context)
                self.add_piece_(target, residual, piece, sign)

    def stand_in(self, source: Tensor) -> tuple[Statistics, FirstRun]:
        statistics = stand_in_statistics(self.function.norm, self.name)
        return statistics, FirstRun(self.function.body, source.device, f"{self.name}.body").pure()

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        statistics, first = saved
        norm, wanted = self._norm(source, statistics), grads.wanted(parameters_of(self.function.body))
        with SecondRun(first, wanted) as again:
            for piece in first.pieces:
                leaf = self._normalised(norm, piece).requires_grad_()
                du = self.undo_piece_(again, leaf, target, dtarget, piece, wanted, grads, self.body_context)
                del leaf
                if du is not None:
                    norm.add_gradient_(dsource, du, piece.read)
                del du
        norm.finish_(dsource, grads)

    def _normalised(self, norm: NormOverPieces, piece: Piece) -> Tensor:
        return norm.normalised(piece.read, self.reads(norm.source, self.function.body))

    def _norm(self, source: Tensor, statistics: Statistics | None = None) -> NormOverPieces:
        return NormOverPieces(
            self.function.norm,
            source,
            self.residual_sum.state_format.unit,
            self.piece_bytes,
            statistics,
            self.channels_last,
        )

    def _pieces(self, source: Tensor) -> Iterator[Piece]:
        if self.body_context or any(map(has_hooks, self.function.body.modules())):
            return iter([WHOLE])
        # By the bytes of what the body reads: the state itself may be narrower.
        wide = floating_dtype(self.function).itemsize
        return self.pieces_for(self.function.body, source, self.piece_bytes * source.element_size() // wide)
