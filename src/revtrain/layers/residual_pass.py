"""The residual functions F and G of a coupling: how each is added to its half, taken off again, and differentiated.

`source` is the half that a function reads, `target` the half that its result, the residual, is added to; both are views
of the chain's state. `dsource` and `dtarget` are the same halves of the gradient. A state may be in fixed point
(core.state_format); a function always reads floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients
from revtrain.core.hooks import forward_, has_hooks
from revtrain.core.layer import End, InvertibleLayer, context_for, differentiate_, end_of
from revtrain.core.precision import autocast_dtype, read_dtype
from revtrain.core.recompute import FirstRun, SecondRun, parameters_of
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels import add_to_part_, read_part
from revtrain.kernels.pieces import WHOLE, Index, Piece, is_large, pieces
from revtrain.layers.reach import reach_of, say_untiled


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
        self.state_format.add_(target, residual.detach(), sign * self.scale, piece_bytes, overflows)


class ResidualPass:
    """One residual function of a coupling: `target` +/- s function(`source`), and its backward pass.

    Args:
        function: F or G.
        residual_sum: how its result is added.
        piece_bytes: bound of each temporary.
        overflows: counts the values that leave the range of the grid; None where there is no grid.
        channels_last: the function reads its source in that memory format.
        name: of the function, for messages.
        context: side inputs of the chain, for a function that takes some.
    """

    def __init__(
        self,
        function: nn.Module,
        residual_sum: ResidualSum,
        piece_bytes: int,
        overflows: Tensor | None = None,
        channels_last: bool = False,
        name: str = "",
        context: tuple[Tensor, ...] = (),
    ):
        self.function, self.residual_sum, self.name = function, residual_sum, name or type(function).__name__
        self.context = context_for(function, context)
        self.piece_bytes, self.overflows, self.channels_last = piece_bytes, overflows, channels_last

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

    # What is the same for all functions that run in pieces.

    def pieces_for(self, function: nn.Module, source: Tensor, piece_bytes: int) -> Iterator[Piece]:
        """Of `source`, for a function that treats each sample on its own: tiles where a sample is large and it is known
        how far the function looks."""
        large = is_large(source, piece_bytes)
        reach = reach_of(function) if large else None
        if large and reach is None and source.dim() > 3:
            say_untiled(self.name)
        return pieces(source, piece_bytes, reach)

    def add_piece_(
        self, target: Tensor, residual: Tensor, piece: Piece, sign: int, overflows: Tensor | None = None
    ) -> None:
        """target += sign s residual, for a piece."""
        own = target[piece.own]
        self.residual_sum.add_(own, self.fits(piece.crop(residual), own), sign, self.piece_bytes, overflows)

    def undo_piece_(
        self,
        again: SecondRun,
        leaf: Tensor,
        target: Tensor,
        dtarget: Tensor,
        piece: Piece,
        wanted: Sequence[Tensor],
        grads: Gradients,
        context: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """target -= s function(leaf, *context) for a piece; the gradient of `leaf`, which may share memory with it.

        Gradients of side inputs and parameters go to `grads`, those of parameters for `wanted`. The temporaries end
        with this method.
        """
        sides = [each.detach().requires_grad_(each.requires_grad) for each in context]
        with torch.enable_grad():
            residual = again(leaf, *sides)
        self.add_piece_(target, residual, piece, -1)
        end = end_of(residual)
        del residual
        owners = (*context, *wanted)
        return differentiate_(
            end, leaf, sides, again.leaves, dtarget[piece.read], owners, grads, self.residual_sum.scale, piece=piece
        )

    def read(self, source: Tensor) -> Tensor:
        """`source`, or a part of it, as the function reads it: a copy in floating point, in its memory format."""
        return read_part(
            source,
            self.reads(source, self.function),
            unit=1.0 if source.is_floating_point() else self.residual_sum.state_format.unit,
            channels_last=self.channels_last,
        )

    def reads(self, source: Tensor, function: nn.Module) -> torch.dtype:
        """The type that `function` reads values of `source` in."""
        wide = source.dtype if source.is_floating_point() else floating_dtype(self.function)
        narrow = autocast_dtype(source.device.type)
        if narrow is not None and casts_its_input(function) and wide == torch.float32:
            return narrow  # as autocast would make it, in one pass less
        return read_dtype(source.new_empty(0, dtype=wide))

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


def convolutions_read_channels_last(x: Tensor) -> bool:
    """Whether convolutions of x are to read channels last: on the CPU they are faster so, and on a GPU their workspace
    is small besides (for (B, C, H, W) in float32 cuDNN would take Fourier transforms)."""
    return x.dim() == 4 and x.device.type != "mps"


def casts_its_input(function: nn.Module) -> bool:
    """Whether autocast narrows what `function` is given, since it begins with a convolution or a linear layer."""
    while isinstance(function, nn.Sequential) and type(function).forward is nn.Sequential.forward and len(function):
        if has_hooks(function):
            return False
        function = function[0]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return (
        isinstance(function, kinds)
        and type(function).forward in [k.forward for k in kinds]
        and not (has_hooks(function) or "forward" in vars(function))
    )


def floating_dtype(function: nn.Module) -> torch.dtype:
    """The precision of a function's parameters, float32 at least."""
    dtype = next((p.dtype for p in parameters_of(function) if p.is_floating_point()), torch.float32)
    return torch.promote_types(dtype, torch.float32)


class LayerwisePass(ResidualPass):
    """An invertible function: its layers are inverted one by one, from its output, while the gradient passes.

    Two parts of it need not be inverted, since their inputs are at hand. Its first layers up to the first convolution
    (BN, LeakyReLU) are computed again from the source: that costs no convolution, and the signs that they keep are
    alive only for their own part. Its last layer is differentiated where the recomputation from the source has come to
    it, and gives its result and its gradient in one: the convolutions in it are computed once less. A chain with
    `recompute_leading` = False has all layers inverted, as the paper does.
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
            layers = self.function.steps(saved)

        def take(residual: Tensor, index: Index) -> None:
            self.residual_sum.add_(target[index], residual, -1, self.piece_bytes)

        again = getattr(self.function, "recompute_leading", True)
        leading = list(takewhile(lambda entry: again and entry[0].is_pointwise, layers))
        rest = layers[len(leading) :]
        last = [rest.pop()] if again and rest else []
        x = self.read(source)
        for layer, each in leading:
            x = layer.recompute_(x, each, *context_for(layer, self.context))
        x, kept = _recompute_for_backward(rest, x, self.context)
        dx = read_part(dtarget, dtarget.dtype, unit=self.residual_sum.scale)
        for layer, each in last:
            x, dx = layer.backward_from_(x, dx, each, grads, take, *context_for(layer, self.context))
            self._observe(layer, x)
        if not last:
            take(x, WHOLE.own)
        x, dx = self._invert_layers(kept, x, dx, grads)
        del x  # rebuilt, with noise; the source itself is at hand
        if leading:
            x, kept = _recompute_for_backward(leading, self.read(source), self.context)
            x, dx = self._invert_layers(kept, x, dx, grads)
        # The rebuilt source is thrown away: `source` itself comes from the block's own inverse, which has less noise.
        add_to_part_(dsource, dx, piece_bytes=self.piece_bytes)

    def _invert_layers(
        self, layers: list[tuple[InvertibleLayer, Any]], y: Tensor, dy: Tensor, grads: Gradients
    ) -> tuple[Tensor, Tensor]:
        while layers:
            layer, saved = layers.pop()
            y, dy = layer.backward_(y, dy, saved, grads, *context_for(layer, self.context))
            self._observe(layer, y)
        return y, dy

    def _observe(self, layer: InvertibleLayer, x: Tensor) -> None:
        observer = getattr(self.function, "observer", None)
        if observer is not None:
            observer.on_reconstructed(layer, x)

    def reads(self, source: Tensor, function: nn.Module) -> torch.dtype:
        # All of the batch at once, so in 16 bit where states are in 16 bit; normalised values suit float16.
        if not source.is_floating_point() and autocast_dtype(source.device.type) is not None:
            return torch.float16
        return source.dtype if source.is_floating_point() else floating_dtype(self.function)


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
        for piece, residual in first.in_pieces(
            self._pieces(source), lambda piece: self.read(source[piece.read]), *self.context
        ):
            self.add_piece_(target, residual, piece, 1, self.overflows)
            del residual
        return first.end()

    def recompute_(self, source: Tensor, target: Tensor, saved: FirstRun, sign: int) -> None:
        with SecondRun(saved) as again:
            for piece in self._pieces(source) if saved.must_be_pure else saved.pieces:
                residual = again(self.read(source[piece.read]), *self.context)
                self.add_piece_(target, residual, piece, sign)

    def undo_(self, source, target, dsource, dtarget, saved, grads):
        wanted = grads.wanted(parameters_of(self.function))
        with SecondRun(saved, wanted) as again:
            for piece in saved.pieces:
                leaf = self.read(source[piece.read]).requires_grad_()
                dleaf = self.undo_piece_(again, leaf, target, dtarget, piece, wanted, grads, self.context)
                if dleaf is not None:
                    add_to_part_(dsource[piece.read], dleaf, piece_bytes=self.piece_bytes)
                del leaf, dleaf

    def _pieces(self, source: Tensor) -> Iterator[Piece]:
        # Whether a side input has a part for each sample is not known: with one, the batch stays whole.
        if self.context or not self.per_sample:
            return iter([WHOLE])
        return self.pieces_for(self.function, source, self.piece_bytes)

    def undo_together(
        self,
        other: RecomputedPass,
        x: tuple[Tensor, Tensor],
        dx: tuple[Tensor, Tensor],
        saved: tuple[FirstRun, FirstRun],
        grads: Gradients,
        take: Callable[[Tensor, Index, int], None],
    ) -> None:
        """The gradient of y1 = x1 + s F(x2), y2 = x2 + s G(y1) from its input, F this function and G the `other`.

        Args:
            x: (x1, x2), which stay as they are.
            dx: (dy1, dy2), which become (dx1, dx2).
            saved: of F and of G.
            take: is given the pieces of y1 and y2, each with its index into them and the number of the part, 0 or 1.
        """
        (x1, x2), (dx1, dx2) = x, dx
        wanted_f, wanted_g = (grads.wanted(parameters_of(each.function)) for each in (self, other))
        with SecondRun(saved[0], wanted_f) as f_again, SecondRun(saved[1], wanted_g) as g_again:
            for piece in saved[0].pieces:
                own = piece.own
                of_f = self.read(x2[own]).requires_grad_()
                end_f, y1 = self._sum_of_piece(f_again, of_f, x1[own])
                take(y1, own, 0)
                of_g = other.read(y1).requires_grad_()
                del y1
                end_g, y2 = other._sum_of_piece(g_again, of_g, x2[own])
                take(y2, own, 1)
                del y2
                scale = self.residual_sum.scale
                dleaf = differentiate_(end_g, of_g, (), g_again.leaves, dx2[own], wanted_g, grads, scale)
                del end_g, of_g
                if dleaf is not None:
                    add_to_part_(dx1[own], dleaf, piece_bytes=self.piece_bytes)
                dleaf = differentiate_(end_f, of_f, (), f_again.leaves, dx1[own], wanted_f, grads, scale)
                del end_f, of_f
                if dleaf is not None:
                    add_to_part_(dx2[own], dleaf, piece_bytes=self.piece_bytes)
                del dleaf

    def _sum_of_piece(self, again: SecondRun, leaf: Tensor, target: Tensor) -> tuple[End | None, Tensor]:
        """Where the graph of function(leaf) ends, and target + s function(leaf), a tensor of its own."""
        with torch.enable_grad():
            residual = again(leaf)
        total = target.clone()
        self.residual_sum.add_(total, self.fits(residual, total), 1, self.piece_bytes)
        return end_of(residual), total

    def works_on_its_samples(self, saved: Any) -> bool:
        """Whether its first run went over slices of the batch, drew nothing and changed nothing."""
        return (
            isinstance(saved, FirstRun)
            and not (saved.must_be_pure or saved.generators or saved.buffers or saved.changed_attributes)
            and not self.context
            and all(len(piece.own) == 1 and piece is not WHOLE for piece in saved.pieces)
        )
