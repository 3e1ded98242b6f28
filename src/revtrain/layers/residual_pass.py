"""The residual functions F and G of a coupling: how each is added to its half, taken off again, and differentiated.

`source` is the half that a function reads, `target` the half that it is added to, both views of the chain's state;
`dsource` and `dtarget` are the same halves of the gradient. A state may be in fixed point (core.state_format); a
function always sees floating point.
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
    """What is added to a half: s times a function's result, on the stream's grid."""

    scale: float = 1.0
    stream: StateFormat = PLAIN

    def of(self, result: Tensor) -> Tensor:
        """s `result`, on the grid; differentiable."""
        return self.stream.snap(result if self.scale == 1 else self.scale * result)

    def add_(
        self, target: Tensor, result: Tensor, sign: int, piece_bytes: int, overflows: Tensor | None = None
    ) -> None:
        """target += sign s `result`, over chunks of the batch; values that leave the range go to `overflows`."""
        result = result.detach()
        if target.is_floating_point() and not self.stream.rounds(target):
            target.add_(result, alpha=sign * self.scale)
            return
        for sl in batch_pieces(result, piece_bytes):
            scaled = result[sl].float() if result.dtype != torch.float64 else result[sl]
            lost = self.stream.add_(target[sl], scaled if self.scale == 1 else scaled * self.scale, sign)
            if overflows is not None:
                overflows += self.stream.beyond(target[sl]) if lost is None else lost


class ResidualPass:
    """One residual function of a coupling: `target` +/- s function(`source`), and the way back."""

    def __init__(
        self,
        function: nn.Module,
        residual: ResidualSum,
        piece_bytes: int,
        overflows: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.function, self.residual, self.piece_bytes, self.overflows = function, residual, piece_bytes, overflows
        self.memory_format = memory_format

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
        return self.residual.stream.decode(source, floating_dtype(self.function), self.memory_format)

    def view(self, source: Tensor) -> Tensor:
        """As `read`, but not to be written to: no copy where the stream is in floating point."""
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
    """An invertible function: its activations are rebuilt from its output while the gradient passes.

    Its leading pointwise layers are not inverted but computed again, from the true source: that costs no
    convolution, and their signs need not be kept meanwhile.
    """

    def add_(self, source: Tensor, target: Tensor) -> Any:
        result, saved = self.function.forward_(self.read(source))
        self.residual.add_(target, result, 1, self.piece_bytes, self.overflows)
        return saved

    def recompute_(self, source: Tensor, target: Tensor, saved: Any, sign: int) -> None:
        self.residual.add_(target, self.function.recompute_(self.read(source), saved), sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        is_chain = isinstance(self.function, InvertibleChain)
        layers = list(zip(self.function.layers, saved, strict=True)) if is_chain else [(self.function, saved)]
        leading = list(takewhile(lambda entry: entry[0].is_pointwise, layers))
        rest = layers[len(leading) :]
        x = self.read(source)
        for layer, memory in leading:
            x = layer.recompute_(x, memory)
        x, kept = _recompute_for_backward(rest, x)
        self.residual.add_(target, x, -1, self.piece_bytes)
        dx = dtarget.clone(memory_format=torch.contiguous_format).mul_(self.residual.scale)
        x, dx = self._invert_layers(kept, x, dx, grads)
        for sl in batch_pieces(x, self.piece_bytes):
            x[sl].copy_(self.read(source[sl]))
        x, kept = _recompute_for_backward(leading, x)
        x, dx = self._invert_layers(kept, x, dx, grads)
        # The rebuilt source is thrown away: `source` itself came through the block's own, quieter inverse.
        dsource.add_(dx)

    def _invert_layers(self, layers: list[tuple[InvertibleLayer, Any]], y, dy, grads) -> tuple[Tensor, Tensor]:
        observer = getattr(self.function, "observer", None)
        while layers:
            layer, memory = layers.pop()
            y, dy = layer.backward_(y, dy, memory, grads)
            if observer is not None:
                observer.on_reconstructed(layer, y)
        return y, dy

    def read(self, source: Tensor) -> Tensor:
        # All of the batch at once, so in 16 bit where a 16-bit stream is asked for; normalised values suit float16.
        if not source.is_floating_point() and torch.is_autocast_enabled(source.device.type):
            return self.residual.stream.decode(source, torch.float16)
        return super().read(source)


def _recompute_for_backward(layers: list[tuple[InvertibleLayer, Any]], x: Tensor):
    """`x` through `layers` once more, and the layers with what each keeps for its way back."""
    kept = []
    for layer, memory in layers:
        x, memory = layer.recompute_for_backward_(x, memory)
        kept.append((layer, memory))
    return x, kept


class RecomputedPass(ResidualPass):
    """Any module: recomputed from its source and differentiated by autograd, over chunks if it may be."""

    def __init__(self, function, residual, piece_bytes, overflows, memory_format, per_sample: bool = False):
        super().__init__(function, residual, piece_bytes, overflows, memory_format)
        self.per_sample = per_sample

    def add_(self, source: Tensor, target: Tensor) -> list[RandomState | None]:
        saved = []
        for sl in self._chunks(source):
            result, state = run_noting_random_state(self.function, self.read(source[sl]))
            self.residual.add_(target[sl], result, 1, self.piece_bytes, self.overflows)
            saved.append(state)
        return saved

    def recompute_(self, source: Tensor, target: Tensor, saved: list[RandomState | None], sign: int) -> None:
        for sl, state in zip(self._chunks(source), saved, strict=True):
            with frozen_running_statistics(self.function), random_state(state, source.device):
                self.residual.add_(target[sl], self.function(self.read(source[sl])), sign, self.piece_bytes)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        parameters = grads.wanted(self.function.parameters())
        with frozen_running_statistics(self.function), stand_ins(self.function, parameters) as leaves:
            for sl, state in zip(self._chunks(source), saved, strict=True):
                leaf = self.read(source[sl]).requires_grad_()
                dleaf, gradients = undo_piece(
                    self.function, self.residual, leaf, target[sl], dtarget[sl], state, leaves, self.piece_bytes
                )
                if dleaf is not None:
                    dsource[sl].add_(dleaf)
                del leaf, dleaf
                while gradients:  # one at a time, so that each is gone before the next chunk
                    grads.add(parameters[len(gradients) - 1], gradients.pop())

    def _chunks(self, source: Tensor) -> Iterator[slice]:
        return batch_pieces(source, self.piece_bytes) if self.per_sample else iter([slice(None)])


def undo_piece(
    function: nn.Module,
    residual: ResidualSum,
    leaf: Tensor,
    target: Tensor,
    dtarget: Tensor,
    state: RandomState | None,
    leaves: list[Tensor],
    piece_bytes: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """target -= s function(leaf); the gradients of `leaf` and of `leaves`. Its temporaries end with it."""
    with torch.enable_grad(), random_state(state, leaf.device):
        result = function(leaf)
    residual.add_(target, result, -1, piece_bytes)
    dresult = dtarget.to(result.dtype) if residual.scale == 1 else (dtarget * residual.scale).to(result.dtype)
    # The gradient needs the graph of the result, not its values.
    end = torch.autograd.graph.get_gradient_edge(result)
    del result
    dleaf, *gradients = torch.autograd.grad(end, [leaf, *leaves], dresult, allow_unused=True)
    return dleaf, gradients
