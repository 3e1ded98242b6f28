"""Additive coupling: y1 = x1 + F(x2), y2 = x2 + G(y1), undone as x2 = y2 - G(y1), x1 = y1 - F(x2), as in RevNet.

What F and G are decides how the backward pass runs through them:

    any torch module        recomputed once and differentiated by autograd; everything inside one of the two
                            is alive meanwhile: the paper's local bottleneck (RevNet, iRevNet)
    an invertible layer     recomputed once, then inverted layer by layer (hybrid: section 4.2)
    per sample (no BN)      as any module, but over pieces of the batch (the coupling convolution, 4.1.3)
    PreNorm                 BN, then any per-sample module: over pieces of the batch, too (see layers/prenorm.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.hooks import has_hooks
from revtrain.core.layer import InvertibleLayer, Take
from revtrain.core.names import former_names
from revtrain.core.precision import read_dtype
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import Index
from revtrain.kernels.shapes import memory_format_of
from revtrain.layers.bounded import BoundedConv2d
from revtrain.layers.channels import Split, part_sizes
from revtrain.layers.per_sample import check_per_sample
from revtrain.layers.prenorm import PreNorm, PreNormPass
from revtrain.layers.residual_pass import (
    LayerwisePass,
    RecomputedPass,
    ResidualPass,
    ResidualSum,
    convolutions_read_channels_last,
)


class AdditiveCoupling(InvertibleLayer):
    """Reversible block of two residual functions, x (B, C, H, W) -> y (B, C, H, W), C even.

    Args:
        channels: C; each half has C / 2 channels.
        f, g: modules that map (B, C/2, H, W) to the same shape. Dropout and torch's batch norms inside them
            are recomputed exactly: same mask, running statistics updated once.
        per_sample: f and g treat each sample on its own (no batch statistics), so the backward pass may
            run over pieces of the batch.
        scale: s in y1 = x1 + s F(x2), y2 = x2 + s G(y1).
        state_format: the number format of x and y, that of the chain around it. On a grid (any but plain) the inverse
            is exact at any depth. Formerly `stream`.
        channels_last: hand F and G their inputs in the memory format that convolutions are fastest in (see
            `convolutions_read_channels_last`) rather than always contiguous. They must not `view` them, then.

    `overflows` counts the values that left the range of the format's grid in forward passes.
    Raises `RevtrainError` for an odd number of channels.
    """

    @former_names(stream="state_format")
    def __init__(
        self,
        channels: Split,
        f: nn.Module,
        g: nn.Module | None = None,
        per_sample: bool = False,
        scale: float = 1.0,
        state_format: StateFormat = PLAIN,
        channels_last: bool = False,
        dim: int = 1,
    ):
        super().__init__()
        sizes = part_sizes(channels, self)
        if not math.isfinite(scale):
            raise RevtrainError(
                f"{type(self).__name__}: scale={scale} was given.\nExpected a finite number, such as 1.0."
            )
        for name, function in (("f", f), ("g", g)):
            if not isinstance(function, nn.Module) and not (name == "g" and function is None):
                given = function.__name__ if isinstance(function, type) else type(function).__name__
                raise RevtrainError(
                    f"{type(self).__name__}: {name} is {'the class' if isinstance(function, type) else 'a'} {given}.\n"
                    "Expected an nn.Module object: nn.Tanh() rather than nn.Tanh or torch.tanh."
                )
        if dim == 0:
            raise RevtrainError("dim=0 would split the batch.\nExpected another dimension: 1, or the last for tokens.")
        self.sizes = sizes
        self.channels, self.dim, self.per_sample, self.channels_last = sum(sizes), dim, per_sample, channels_last
        self.residual_sum = ResidualSum(scale, state_format)
        self.f, self.g = f, g
        self.passes_integers, self.state_format = state_format.is_integer, state_format
        if state_format.bits is not None:
            self.register_buffer("overflows", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.sizes}, dim={self.dim}, {self.residual_sum}"

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        x1, x2 = self._parts(x)
        y1 = self._added("f", x1, x2, context)
        y2 = x2 if self.g is None else self._added("g", x2, y1, context)
        return torch.cat([y1, y2], dim=self.dim)

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Any]:
        x1, x2 = self._parts(x)
        saved_f = self._pass_through("f", x, context).add_(x2, x1)
        saved_g = None if self.g is None else self._pass_through("g", x, context).add_(x1, x2)
        return x, (saved_f, saved_g)

    def recompute_(self, x: Tensor, saved: Any, *context: Tensor) -> Tensor:
        x1, x2 = self._parts(x)
        self._pass_through("f", x, context, saved[0]).recompute_(x2, x1, saved[0], 1)
        if self.g is not None:
            self._pass_through("g", x, context, saved[1]).recompute_(x1, x2, saved[1], 1)
        return x

    def stand_in(self, y: Tensor) -> Any:
        y1, y2 = self._parts(y)
        in_g = None if self.g is None else self._pass_through("g", y).stand_in(y1)
        return self._pass_through("f", y).stand_in(y2), in_g

    def inverse_(self, y: Tensor, saved: Any, *context: Tensor) -> Tensor:
        y1, y2 = self._parts(y)
        if self.g is not None:
            self._pass_through("g", y, context, saved[1]).recompute_(y1, y2, saved[1], -1)
        self._pass_through("f", y, context, saved[0]).recompute_(y2, y1, saved[0], -1)
        return y

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients, *context: Tensor) -> tuple[Tensor, Tensor]:
        (y1, y2), (dy1, dy2) = self._parts(y), self._parts(dy)
        if self.g is not None:  # y2 becomes x2; dy1 is complete
            self._pass_through("g", y, context, saved[1]).undo_(y1, y2, dy1, dy2, saved[1], grads)
        # y1 becomes x1; dy2 is complete
        self._pass_through("f", y, context, saved[0]).undo_(y2, y1, dy2, dy1, saved[0], grads)
        return y, dy

    def backward_from_(
        self, x: Tensor, dy: Tensor, saved: Any, grads: Gradients, take: Take, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.g is None:
            return super().backward_from_(x, dy, saved, grads, take, *context)
        f, g = (self._pass_through(which, x, context, each) for which, each in zip("fg", saved, strict=True))
        if not (
            isinstance(f, RecomputedPass)
            and isinstance(g, RecomputedPass)
            and f.works_on_its_samples(saved[0])
            and g.works_on_its_samples(saved[1])
            and saved[0].pieces == saved[1].pieces
        ):
            return super().backward_from_(x, dy, saved, grads, take, *context)
        between = (slice(None),) * (self.dim % x.dim() - 1)
        channels = slice(0, self.sizes[0]), slice(self.sizes[0], None)

        def take_part(y: Tensor, samples: Index, part: int) -> None:
            take(y, (*samples, *between, channels[part]))

        f.undo_together(g, self._parts(x), self._parts(dy), saved, grads, take_part)
        return x, dy

    def _added(self, which: str, target: Tensor, source: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """target + s F(source), by ordinary autograd."""
        return self.residual_sum.added(target, self._residual(which, target, source, context))

    def _residual(self, which: str, target: Tensor, source: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """F(source), of what the lean form hands to F, too: a dense tensor of its own."""
        through = self._pass_through(which, source, context)
        memory_format = memory_format_of(source, self._reads_channels_last(source))
        own = source.to(read_dtype(source)).contiguous(memory_format=memory_format)
        if own is source and may_write_its_input(through.function):
            own = own.clone()
        looks = own is source and not (torch.compiler.is_compiling() or own.is_inference())
        version = own._version if looks else None
        residual = through.fits(through.function(own, *through.context), target)
        if looks and own._version != version:
            raise RevtrainError(
                f"{through.name} changes its input in place, which the coupling needs once more.\n"
                "Let it begin with an operation that makes a tensor of its own, as x + 1 rather than x.add_(1)."
            )
        return residual

    def hands_context_to(self) -> Iterable[nn.Module]:
        """The modules that may take side inputs."""
        return [each for each in (self.f, self.g) if each is not None]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Views of one buffer: the two parts are never copied apart or joined again.
        dim, (first, second) = self.dim, self.sizes
        if x.dim() < 2 or not -x.dim() <= dim < x.dim() or x.shape[dim] != first + second:
            raise RevtrainError(
                f"{type(self).__name__}: an input of shape {tuple(x.shape)} was given; expected {first + second} "
                f"channels along dimension {dim}, which is split into {first} and {second}.\n"
                "Give `channels` what the input has there, and `dim` the dimension: 2 or -1 for tokens (B, T, C)."
            )
        return x.narrow(dim, 0, first), x.narrow(dim, first, second)

    def _reads_channels_last(self, x: Tensor) -> bool:
        return self.channels_last and convolutions_read_channels_last(x)

    def _pass_through(self, which: str, x: Tensor, context: tuple[Tensor, ...] = (), saved: Any = None) -> ResidualPass:
        """The way through `f` or `g`; on the way back that on which `saved` was kept."""
        function, overflows = getattr(self, which), getattr(self, "overflows", None)
        common = (function, self.residual_sum, self.piece_bytes, overflows, self._reads_channels_last(x))
        name = f"{which} of {type(self).__name__}, a {type(function).__name__}"
        if isinstance(function, InvertibleLayer):
            return LayerwisePass(*common, name=name, context=context)
        if isinstance(saved, tuple):
            return PreNormPass(*common, name=name, context=context)
        per_sample = self.per_sample
        if per_sample:
            check_per_sample(function, name)
        elif isinstance(function, PreNorm):
            check_per_sample(function.body, name)
            if saved is None and function.runs_in_pieces():
                return PreNormPass(*common, name=name, context=context)
            per_sample = function.is_per_sample()
        # a hook sees each forward pass once, with the whole batch
        per_sample = per_sample and not any(map(has_hooks, function.modules()))
        return RecomputedPass(*common, name=name, context=context, per_sample=per_sample)


def may_write_its_input(function: nn.Module) -> bool:
    """Whether an operation in place could reach the very tensor that `function` is given.

    Not where its first module is one of torch's or ours that makes a tensor of its own.
    """
    passing = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    for module in function if isinstance(function, nn.Sequential) else [function]:
        if getattr(module, "inplace", False):
            return True
        if isinstance(module, nn.Sequential):
            return may_write_its_input(module)
        if not isinstance(module, passing):
            return not type(module).__module__.startswith(("torch.nn.", "revtrain."))
    return False


class CouplingConv2d(AdditiveCoupling):
    """The invertible convolution of section 4.1.3: a coupling whose F and G are one convolution each.

    x (B, C, H, W) -> (B, C, H, W), C even; kernel_size odd. Together the two halves hold
    2 (C/2)^2 kernel_size^2 weights, half as many as a full convolution. `init_gain` and `max_gain`: what F and G add to
    the other half, at the start and at most; see `BoundedConv2d`.
    """

    def __init__(self, channels: int, kernel_size: int = 3, init_gain: float = 1.0, max_gain: float | None = None):
        if kernel_size % 2 == 0:
            raise RevtrainError(
                f"kernel_size={kernel_size} would change the image size.\nExpected an odd number such as 1, 3 or 5."
            )
        half = max(1, channels // 2)
        f, g = (BoundedConv2d(half, kernel_size, init_gain, max_gain) for _ in range(2))
        super().__init__(channels, f, g, per_sample=True, channels_last=True)
