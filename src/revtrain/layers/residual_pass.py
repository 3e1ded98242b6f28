"""The residual functions F and G of a coupling: how each is added to its half, taken off again, and differentiated.

`source` is the half that a function reads, `target` the half that its result, the residual, is added to; both are views
of the chain's state. `dsource` and `dtarget` are the same halves of the gradient. A state may be in fixed point
(core.state_format); a function always reads floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients
from revtrain.core.hooks import forward_
from revtrain.core.layer import InvertibleLayer, context_for, differentiate_, end_of
from revtrain.core.pieces import batch_pieces
from revtrain.core.precision import autocast_dtype, read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError


@dataclass(frozen=True)
class ResidualSum:
    """How a residual is added to a half: scaled by s, and rounded to the grid of the state's format."""

    scale: float = 1.0
    state_format: StateFormat = PLAIN

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """x + s `residual`, on the grid; differentiable, and bit for bit what `add_` computes."""
        if not self.state_format.rounds(x):
            return torch.add(x, residual, alpha=self.scale)
        wide = torch.promote_types(residual.dtype, torch.float32)
        return x + self.state_format.snap(residual.to(wide) if self.scale == 1 else residual.to(wide) * self.scale)

    def add_(
        self, target: Tensor, residual: Tensor, sign: int, piece_bytes: int, overflows: Tensor | None = None
    ) -> None:
        """target += sign s `residual`, over pieces of the batch; `overflows` counts the values that leave the range."""
        residual = residual.detach()
        if target.is_floating_point() and not self.state_format.rounds(target):
            target.add_(residual, alpha=sign * self.scale)
            return
        for sl in batch_pieces(residual, piece_bytes):
            scaled = residual[sl].float() if residual.dtype != torch.float64 else residual[sl]
            lost = self.state_format.add_(target[sl], scaled if self.scale == 1 else scaled * self.scale, sign)
            if overflows is not None:
                overflows += self.state_format.beyond(target[sl]) if lost is None else lost


class ResidualPass:
    """One residual function of a coupling: `target` +/- s function(`source`), and its backward pass.

    Args:
        function: F or G.
        residual_sum: how its result is added.
        piece_bytes: bound of each temporary.
        overflows: counts the values that leave the range of the grid; None where there is no grid.
        memory_format: in which the function reads its source.
        name: of the function, for messages.
        context: side inputs of the chain, for a function that takes some.
    """

    def __init__(
        self,
        function: nn.Module,
        residual_sum: ResidualSum,
        piece_bytes: int,
        overflows: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        name: str = "",
        context: tuple[Tensor, ...] = (),
    ):
        self.function, self.residual_sum, self.name = function, residual_sum, name or type(function).__name__
        self.context = context_for(function, context)
        self.piece_bytes, self.overflows, self.memory_format = piece_bytes, overflows, memory_format

    def add_(self, source: Tensor, target: Tensor) -> Any:
        """target += s function(source), for the first time; returns `saved`."""
        raise NotImplementedError

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        """target += sign s function(source), once more."""
        raise NotImplementedError

    def stand_in(self, source: Tensor) -> Any:
        """What takes the place of `saved` where nothing was; raises `RevtrainError` where nothing can."""
        return FirstRun(self.function, source.device, self.name).pure()

    def undo_(
        self,
        source: Tensor,
        target: Tensor,
        dsource: Tensor,
        dtarget: Tensor,
        saved: Any,
        grads: Gradients,
    ) -> None:
        """target -= s function(source); dsource += s (d function / d source)^T dtarget."""
        raise NotImplementedError

    def read(self, source: Tensor) -> Tensor:
        """`source`, or a part of it, as the function reads it: a copy in floating point, in its memory format."""
        values = self.values(source)
        dtype = read_dtype(values)
        return values if values.dtype == dtype else values.to(dtype)

    def values(self, source: Tensor) -> Tensor:
        """`source`, or a part of it, in floating point: a copy, in float32 at least."""
        dtype = floating_dtype(self.function)
        return self.residual_sum.state_format.decode(source, dtype, self.memory_format)

    def fits(self, residual: Tensor, target: Tensor) -> Tensor:
        """`residual`, if it can be added to `target` value by value.

        Raises:
            RevtrainError: shapes differ; a result that broadcasts is refused, too.
        """
        if not isinstance(residual, Tensor):
            raise RevtrainError(
                f"{self.name} returned a {type(residual).__name__}.\n"
                "Expected a tensor: wrap it in a module that returns one."
            )
        if residual.shape != target.shape:
            raise RevtrainError(
                f"{self.name} returned {tuple(residual.shape)}; the part of the state that it is added to has "
                f"{tuple(target.shape)}.\nExpected the same shape."
            )
        return residual

    def view(self, source: Tensor) -> Tensor:
        """As `values`, but not to be written to: no copy where the state is in floating point."""
        return source if source.is_floating_point() else self.values(source)


def convolution_format(x: Tensor) -> torch.memory_format:
    """What convolutions are fastest in: channels last on the CPU, and in 16 bit on a GPU."""
    if x.dim() != 4 or (x.device.type != "cpu" and autocast_dtype(x.device.type) is None):
        return torch.contiguous_format
    return torch.channels_last


def floating_dtype(function: nn.Module) -> torch.dtype:
    """The precision of a function's parameters, float32 at least."""
    dtype = next((p.dtype for p in parameters_of(function) if p.is_floating_point()), torch.float32)
    return torch.promote_types(dtype, torch.float32)


class LayerwisePass(ResidualPass):
    """An invertible function: its layers are inverted one by one, from its output, while the gradient passes.

    Its first layers up to the first convolution (BN, LeakyReLU) are not inverted but computed again from the source,
    which is at hand: that costs no convolution, and the signs that they keep are alive only for their own part.
    """

    function: InvertibleLayer

    def add_(self, source: Tensor, target: Tensor) -> Any:
        residual, saved = forward_(self.function, self.read(source), self.context, Tensor.clone)
        self.fits(residual, target)
        self.residual_sum.add_(target, residual, 1, self.piece_bytes, self.overflows)
        return saved

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        self.residual_sum.add_(
            target, self.function.recompute_(self.read(source), saved, *self.context), sign, self.piece_bytes
        )

    def stand_in(self, source: Tensor) -> Any:
        return self.function.stand_in(source)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        layers = [(self.function, saved)]
        if isinstance(self.function, InvertibleChain):
            layers = list(zip(self.function.layers, saved, strict=True))
        leading = list(takewhile(lambda entry: entry[0].is_pointwise, layers))
        rest = layers[len(leading) :]
        x = self.read(source)
        for layer, each in leading:
            x = layer.recompute_(x, each, *context_for(layer, self.context))
        x, kept = _recompute_for_backward(rest, x, self.context)
        self.residual_sum.add_(target, x, -1, self.piece_bytes)
        dx = dtarget.clone(memory_format=torch.contiguous_format).mul_(self.residual_sum.scale)
        x, dx = self._invert_layers(kept, x, dx, grads)
        for sl in batch_pieces(x, self.piece_bytes):
            x[sl].copy_(self.read(source[sl]))
        x, kept = _recompute_for_backward(leading, x, self.context)
        x, dx = self._invert_layers(kept, x, dx, grads)
        # The rebuilt source is thrown away: `source` itself comes from the block's own inverse, which has less noise.
        dsource.add_(dx)

    def _invert_layers(
        self, layers: list[tuple[InvertibleLayer, Any]], y: Tensor, dy: Tensor, grads: Gradients
    ) -> tuple[Tensor, Tensor]:
        observer = getattr(self.function, "observer", None)
        while layers:
            layer, saved = layers.pop()
            y, dy = layer.backward_(y, dy, saved, grads, *context_for(layer, self.context))
            if observer is not None:
                observer.on_reconstructed(layer, y)
        return y, dy

    def read(self, source: Tensor) -> Tensor:
        # All of the batch at once, so in 16 bit where states are in 16 bit; normalised values suit float16.
        if not source.is_floating_point() and autocast_dtype(source.device.type) is not None:
            return self.residual_sum.state_format.decode(source, torch.float16)
        return self.values(source)


def _recompute_for_backward(
    layers: list[tuple[InvertibleLayer, Any]], x: Tensor, context: tuple[Tensor, ...]
) -> tuple[Tensor, list[tuple[InvertibleLayer, Any]]]:
    """`x` through `layers` once more, and the layers with what each keeps for its way back."""
    kept = []
    for layer, saved in layers:
        x, more = layer.recompute_for_backward_(x, saved, *context_for(layer, context))
        kept.append((layer, more))
    return x, kept


class RecomputedPass(ResidualPass):
    """Any module: recomputed from its source and differentiated by autograd; in pieces of the batch if `per_sample`."""

    def __init__(self, *common: Any, per_sample: bool = False, **named: Any):
        super().__init__(*common, **named)
        self.per_sample = per_sample

    def add_(self, source: Tensor, target: Tensor) -> FirstRun:
        first = FirstRun(self.function, source.device, self.name)
        for sl, residual in first.in_pieces(self._pieces(source), lambda sl: self.read(source[sl]), *self.context):
            self.residual_sum.add_(target[sl], self.fits(residual, target[sl]), 1, self.piece_bytes, self.overflows)
            del residual
        return first.end()

    def recompute_(self, source: Tensor, target: Tensor, saved: FirstRun, sign: int) -> None:
        with SecondRun(saved) as again:
            for sl in self._pieces(source) if saved.must_be_pure else saved.pieces:
                residual = again(self.read(source[sl]), *self.context)
                self.residual_sum.add_(target[sl], residual, sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        wanted = grads.wanted(parameters_of(self.function))
        with SecondRun(saved, wanted) as again:
            for sl in saved.pieces:
                leaf = self.read(source[sl]).requires_grad_()
                dleaf = undo_piece(
                    again,
                    self.residual_sum,
                    leaf,
                    target[sl],
                    dtarget[sl],
                    wanted,
                    grads,
                    self.piece_bytes,
                    self.context,
                )
                if dleaf is not None:
                    dsource[sl].add_(dleaf)
                del leaf, dleaf

    def _pieces(self, source: Tensor) -> Iterator[slice]:
        # Whether a side input has a part for each sample is not known: with one, the batch stays whole.
        whole = self.context or not self.per_sample
        return iter([slice(None)]) if whole else batch_pieces(source, self.piece_bytes)


def undo_piece(
    again: SecondRun,
    residual_sum: ResidualSum,
    leaf: Tensor,
    target: Tensor,
    dtarget: Tensor,
    wanted: Sequence[Tensor],
    grads: Gradients,
    piece_bytes: int,
    context: Sequence[Tensor] = (),
) -> Tensor | None:
    """target -= s function(leaf, *context); the gradient of `leaf`, which may share memory with `dtarget`.

    Gradients of side inputs and parameters go to `grads`, those of parameters for `wanted`. The
    temporaries end with this function.
    """
    sides = [each.detach().requires_grad_(each.requires_grad) for each in context]
    with torch.enable_grad():
        residual = again(leaf, *sides)
    residual_sum.add_(target, residual, -1, piece_bytes)
    end = end_of(residual)
    del residual
    owners = (*context, *wanted)
    return differentiate_(end, leaf, sides, again.leaves, dtarget, owners, grads, residual_sum.scale)
