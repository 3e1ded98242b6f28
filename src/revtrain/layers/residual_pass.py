"""The residual functions F and G of a coupling: how each is added to its half, taken off again, and differentiated.

`source` is the half that a function reads, `target` the half that its result, the residual, is added to; both are views
of the chain's state. `dsource` and `dtarget` are the same halves of the gradient. A state may be in fixed point
(core.state_format); a function always reads floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients, frozen_running_statistics, stand_ins
from revtrain.core.layer import InvertibleLayer
from revtrain.core.pieces import batch_pieces
from revtrain.core.random_state import RandomState, random_state, run_noting_random_state
from revtrain.core.state_format import PLAIN, StateFormat


@dataclass(frozen=True)
class ResidualSum:
    """How a residual is added to a half: scaled by s, and rounded to the grid of the state's format."""

    scale: float = 1.0
    state_format: StateFormat = PLAIN

    def of(self, residual: Tensor) -> Tensor:
        """s `residual`, on the grid; differentiable."""
        return self.state_format.snap(residual if self.scale == 1 else self.scale * residual)

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
    """

    def __init__(
        self,
        function: nn.Module,
        residual_sum: ResidualSum,
        piece_bytes: int,
        overflows: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.function, self.residual_sum = function, residual_sum
        self.piece_bytes, self.overflows, self.memory_format = piece_bytes, overflows, memory_format

    def add_(self, source: Tensor, target: Tensor) -> Any:
        """target += s function(source), for the first time; returns `saved`."""
        raise NotImplementedError

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        """target += sign s function(source), once more."""
        raise NotImplementedError

    def undo_(
        self, source: Tensor, target: Tensor, dsource: Tensor, dtarget: Tensor, saved: Any, grads: Gradients
    ) -> None:
        """target -= s function(source); dsource += s (d function / d source)^T dtarget."""
        raise NotImplementedError

    def read(self, source: Tensor) -> Tensor:
        """`source`, or a part of it, in floating point: a copy in the function's memory format."""
        return self.residual_sum.state_format.decode(source, floating_dtype(self.function), self.memory_format)

    def view(self, source: Tensor) -> Tensor:
        """As `read`, but not to be written to: no copy where the state is in floating point."""
        return source if source.is_floating_point() else self.read(source)


def convolution_format(x: Tensor) -> torch.memory_format:
    """What convolutions are fastest in: channels last on the CPU, and in 16 bit on a GPU."""
    if x.dim() != 4 or (x.device.type != "cpu" and not torch.is_autocast_enabled(x.device.type)):
        return torch.contiguous_format
    return torch.channels_last


def floating_dtype(function: nn.Module) -> torch.dtype:
    """The precision of a function's parameters; float32 where it has none."""
    return next((p.dtype for p in function.parameters() if p.is_floating_point()), torch.float32)


class LayerwisePass(ResidualPass):
    """An invertible function: its layers are inverted one by one, from its output, while the gradient passes.

    Its first layers up to the first convolution (BN, LeakyReLU) are not inverted but computed again from the source,
    which is at hand: that costs no convolution, and the signs that they keep are alive only for their own part.
    """

    function: InvertibleLayer

    def add_(self, source: Tensor, target: Tensor) -> Any:
        residual, saved = self.function.forward_(self.read(source))
        self.residual_sum.add_(target, residual, 1, self.piece_bytes, self.overflows)
        return saved

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        self.residual_sum.add_(target, self.function.recompute_(self.read(source), saved), sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        layers = [(self.function, saved)]
        if isinstance(self.function, InvertibleChain):
            layers = list(zip(self.function.layers, saved, strict=True))
        leading = list(takewhile(lambda entry: entry[0].is_pointwise, layers))
        rest = layers[len(leading) :]
        x = self.read(source)
        for layer, each in leading:
            x = layer.recompute_(x, each)
        x, kept = _recompute_for_backward(rest, x)
        self.residual_sum.add_(target, x, -1, self.piece_bytes)
        dx = dtarget.clone(memory_format=torch.contiguous_format).mul_(self.residual_sum.scale)
        x, dx = self._invert_layers(kept, x, dx, grads)
        for sl in batch_pieces(x, self.piece_bytes):
            x[sl].copy_(self.read(source[sl]))
        x, kept = _recompute_for_backward(leading, x)
        x, dx = self._invert_layers(kept, x, dx, grads)
        # The rebuilt source is thrown away: `source` itself comes from the block's own inverse, which has less noise.
        dsource.add_(dx)

    def _invert_layers(self, layers: list[tuple[InvertibleLayer, Any]], y, dy, grads) -> tuple[Tensor, Tensor]:
        observer = getattr(self.function, "observer", None)
        while layers:
            layer, saved = layers.pop()
            y, dy = layer.backward_(y, dy, saved, grads)
            if observer is not None:
                observer.on_reconstructed(layer, y)
        return y, dy

    def read(self, source: Tensor) -> Tensor:
        # All of the batch at once, so in 16 bit where states are in 16 bit; normalised values suit float16.
        if not source.is_floating_point() and torch.is_autocast_enabled(source.device.type):
            return self.residual_sum.state_format.decode(source, torch.float16)
        return super().read(source)


def _recompute_for_backward(layers: list[tuple[InvertibleLayer, Any]], x: Tensor):
    """`x` through `layers` once more, and the layers with what each keeps for its way back."""
    kept = []
    for layer, saved in layers:
        x, more = layer.recompute_for_backward_(x, saved)
        kept.append((layer, more))
    return x, kept


class RecomputedPass(ResidualPass):
    """Any module: recomputed from its source and differentiated by autograd; in pieces of the batch if `per_sample`."""

    def __init__(self, *common: Any, per_sample: bool = False):
        super().__init__(*common)
        self.per_sample = per_sample

    def add_(self, source: Tensor, target: Tensor) -> list[RandomState | None]:
        saved = []
        for sl in self._pieces(source):
            residual, state = run_noting_random_state(self.function, self.read(source[sl]))
            self.residual_sum.add_(target[sl], residual, 1, self.piece_bytes, self.overflows)
            saved.append(state)
        return saved

    def recompute_(self, source: Tensor, target: Tensor, saved: list[RandomState | None], sign: int) -> None:
        for sl, state in zip(self._pieces(source), saved, strict=True):
            with frozen_running_statistics(self.function), random_state(state, source.device):
                self.residual_sum.add_(target[sl], self.function(self.read(source[sl])), sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        parameters = grads.wanted(self.function.parameters())
        with frozen_running_statistics(self.function), stand_ins(self.function, parameters) as leaves:
            for sl, state in zip(self._pieces(source), saved, strict=True):
                leaf = self.read(source[sl]).requires_grad_()
                dleaf, gradients = undo_piece(
                    self.function, self.residual_sum, leaf, target[sl], dtarget[sl], state, leaves, self.piece_bytes
                )
                if dleaf is not None:
                    dsource[sl].add_(dleaf)
                del leaf, dleaf
                while gradients:  # one at a time, so that each is gone before the next piece
                    grads.add(parameters[len(gradients) - 1], gradients.pop())

    def _pieces(self, source: Tensor) -> Iterator[slice]:
        return batch_pieces(source, self.piece_bytes) if self.per_sample else iter([slice(None)])


def undo_piece(
    function: nn.Module,
    residual_sum: ResidualSum,
    leaf: Tensor,
    target: Tensor,
    dtarget: Tensor,
    state: RandomState | None,
    leaves: list[Tensor],
    piece_bytes: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """target -= s function(leaf); the gradients of `leaf` and of `leaves`. Its temporaries end with it."""
    with torch.enable_grad(), random_state(state, leaf.device):
        residual = function(leaf)
    residual_sum.add_(target, residual, -1, piece_bytes)
    scaled = dtarget if residual_sum.scale == 1 else dtarget * residual_sum.scale
    dresidual = scaled.to(residual.dtype)
    del scaled
    # The gradient needs the graph of the residual, not its values.
    end = torch.autograd.graph.get_gradient_edge(residual)
    del residual
    gradients: list[Tensor | None] = list(torch.autograd.grad(end, [leaf, *leaves], dresidual, allow_unused=True))
    return gradients.pop(0), gradients
