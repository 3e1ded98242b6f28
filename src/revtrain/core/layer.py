"""What an invertible layer is.

How a chain goes through its layers:

    forward    x --forward_--> y                in one buffer, the chain's own; only `saved` (a few numbers) is kept
    backward   (y, dy) --backward_--> (x, dx)   in that buffer and one for the gradient; those of the parameters are
                                                added to `grads`

A method whose name ends in an underscore may overwrite the storage of the tensors that it is given, as
everywhere in torch, and runs without autograd.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revtrain.core.gradients import Gradients
from revtrain.core.precision import current_pass, read_dtype
from revtrain.core.recompute import (
    FirstRun,
    Sample,
    SecondRun,
    difference,
    is_dense,
    parameters_of,
    sample,
    shares_memory,
    tolerance,
    users_of_memory,
)
from revtrain.core.state_format import StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels import read_part
from revtrain.kernels.pieces import MIB, WHOLE, Index, Piece
from revtrain.kernels.shapes import memory_format_of

Take = Callable[[Tensor, Index], None]  # of a part of a result, and where it belongs


class InvertibleLayer(nn.Module):
    """A layer with an analytic inverse.

    A subclass writes `forward` and `inverse`; that is enough for `InvertibleChain` to train through it
    without storing its input. The methods with an underscore compute the same in place; a subclass overrides
    them where it can save memory so.

    `saved` is what the inverse needs besides y (BN: mean and standard deviation; most layers: None). It
    travels as a value, never on `self`, so a recomputation cannot update running statistics twice and one
    layer may be used several times in one graph.

    `piece_bytes` bounds each temporary of the methods in place, in bytes. `is_pointwise`: each value of y depends on
    one of x (and on statistics), so that computing y again costs little. `passes_integers`: the methods in place take
    states in an integer format, too (see revtrain.core.state_format); `state_format`: the only format that they take,
    None for any.
    """

    piece_bytes: int = 2 * MIB
    is_pointwise: bool = False
    passes_integers: bool = False
    state_format: StateFormat | None = None

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """y of x by ordinary autograd: the noise-free twin (`backward=store`)."""
        raise NotImplementedError

    def joined_with(self, following: InvertibleLayer) -> InvertibleLayer | None:
        """A layer that does the work of this one and the one behind it in fewer passes; None: there is none.

        Its `saved` is the pair of what the two would have saved. Hooks of the two are seen to.
        """
        return None

    def inverse(self, y: Tensor, saved: Any = None, *context: Tensor) -> Tensor:
        """x of y; neither y nor `saved` is changed, and no graph is made.

        Without `saved` in evaluation mode; in training mode for layers that need nothing of the forward pass.

        Raises:
            RevtrainError: the layer needs what the forward pass saved, and `saved` is None; or y asks for a gradient.
        """
        refuse_graph(self, y)
        with torch.no_grad():
            own = y.clone(memory_format=torch.contiguous_format)
            return self.inverse_(own, self.stand_in(own) if saved is None else saved, *context)

    def stand_in(self, y: Tensor) -> Any:
        """What takes the place of `saved` where y is inverted without it.

        Raises:
            RevtrainError: nothing can; says what is missing.
        """
        default = type(self).forward_ is InvertibleLayer.forward_
        return self._fresh_run(y).pure() if default else None

    # The lean forms. The defaults serve any layer that has only forward and inverse: `saved` is then its first run.

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Any]:
        """(y, saved); updates running statistics as `forward` does."""
        first, shape = self._fresh_run(x), x.shape
        y = first(x.to(read_dtype(x)), *context)
        first.end().input_shape = shape
        # The chain will write into y: it must not be a parameter, a side input or an expanded view.
        own = y.detach().to(torch.promote_types(y.dtype, x.dtype))
        others = (*parameters_of(self), *self.buffers(), *context)
        if not is_dense(own) or any(shares_memory(own, each) for each in others):
            own = own.clone(memory_format=torch.contiguous_format)
        return own, first

    def recompute_(self, x: Tensor, saved: Any, *context: Tensor) -> Tensor:
        """y of x a second time, with the `saved` of the first; updates nothing."""
        with SecondRun(self._first_run(x, saved)) as again:
            return again.within(self.forward, x.to(read_dtype(x)), *context).to(x.dtype)

    def recompute_for_backward_(self, x: Tensor, saved: Any, *context: Tensor) -> tuple[Tensor, Any]:
        """(y, saved) a second time, right before `backward_`: more may be kept, since it lives for a moment only."""
        return self.recompute_(x, saved, *context), saved

    def inverse_(self, y: Tensor, saved: Any, *context: Tensor) -> Tensor:
        """x of y, in place where the layer can."""
        if isinstance(saved, FirstRun):
            with SecondRun(saved) as again:
                return again.within(lambda y, *rest: self.inverse(y, None, *rest), y, *context)
        return self.inverse(y, saved, *context)

    def backward_(self, y: Tensor, dy: Tensor, saved: Any, grads: Gradients, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(x, dx) of (y, dy); gradients of parameters and side inputs are added to `grads`.

        Shapes of x and dx are equal; the chain may write into both.
        """
        given = sample(y)
        x = self.inverse_(y, saved, *context)
        shape = getattr(saved, "input_shape", None) or dy.shape
        if x.shape != shape and isinstance(saved, FirstRun):
            raise RevtrainError(
                f"{type(self).__name__}.inverse returned the shape {tuple(x.shape)} where forward was given "
                f"{tuple(shape)}.\nExpected that inverse undoes forward: revtrain.verify(model, x) tells by how much."
            )
        if shares_memory(x, dy) or not is_dense(x):
            x = x.clone(memory_format=torch.contiguous_format)
        first = self._first_run(x, saved)
        self._compare(first, given, x)
        wanted = grads.wanted(parameters_of(self))
        leaf = x.detach().to(read_dtype(x)).requires_grad_()
        sides = [each.detach().requires_grad_(each.requires_grad) for each in context]
        with torch.enable_grad(), SecondRun(first, wanted) as again:
            recomputed = again(leaf, *sides) if first.outputs else again.within(self.forward, leaf, *sides)
        end = end_of(recomputed)
        del recomputed
        dx = differentiate_(end, leaf, sides, again.leaves, dy, (*context, *wanted), grads, writes_on=False)
        if dx is None:
            return x, torch.zeros_like(x)
        dx = dx.to(dy.dtype)
        own = is_dense(dx) and not shares_memory(dx, x) and not shares_memory(dx, dy)
        return x, dx if own else dx.clone(memory_format=torch.contiguous_format)

    def backward_from_(
        self, x: Tensor, dy: Tensor, saved: Any, grads: Gradients, take: Take, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(x, dx) of (x, dy), where x is at hand: for a layer behind which nothing has to be computed again.

        `take` is called with y part by part, each part once, and with where it belongs in y. A layer that can make part
        and gradient together computes its function once, where `recompute_` and `backward_` do twice.
        """
        y, saved = self.recompute_for_backward_(x, saved, *context)
        take(y, WHOLE.own)
        return self.backward_(y, dy, saved, grads, *context)

    def _compare(self, first: FirstRun, y: Sample | None, x: Tensor) -> None:
        """Raise `RevtrainError` where the inverse of y (a sample of it) is far from what `forward` was given."""
        current = current_pass()
        if not first.samples or first.samples[0] is None or (current is not None and current.observed):
            return
        x_before, y_before = first.samples[0]
        noise = difference(y_before, y)
        if difference(x_before, sample(x)) > tolerance(x.dtype, noise if current is None else current.saw(noise)):
            raise RevtrainError(
                f"The inverse of {first.name} computed something else than what its forward was given, when its input "
                "was recomputed.\n"
                "Either it is not the inverse (revtrain.verify measures that), or the layer depends on what a chain "
                "cannot see and restore: a random generator outside of its modules, a file, a clock.\n"
                "Make that a buffer or a number of the layer, or hand it over as a side input: chain(x, tensor)."
            )

    def _first_run(self, x: Tensor, saved: Any) -> FirstRun:
        """What `forward_` of this class has kept; of a subclass that has its own `forward_`, the present state."""
        return saved if isinstance(saved, FirstRun) else self._fresh_run(x).begin_again()

    def _fresh_run(self, x: Tensor) -> FirstRun:
        first = FirstRun(self, x.device)
        first.run = self.forward  # the chain fires the hooks of its layers
        return first


class End(NamedTuple):
    """Where a graph ends: what a gradient needs of a result, which itself can go."""

    edge: Any
    dtype: torch.dtype
    channels_last: bool  # the memory format that the result has, and its gradient should have


def end_of(y: Tensor) -> End | None:
    """The end of y's graph; None for a constant. Delete y then: its memory is not needed for its gradient."""
    if not y.requires_grad:
        return None
    channels_last = not y.is_contiguous() and y.is_contiguous(memory_format=memory_format_of(y, True))
    return End(torch.autograd.graph.get_gradient_edge(y), y.dtype, channels_last)


def differentiate_(
    end: End | None,
    leaf: Tensor,
    sides: Sequence[Tensor],
    leaves: Sequence[Tensor],
    dy: Tensor,
    owners: Sequence[Tensor],
    grads: Gradients,
    scale: float = 1.0,
    writes_on: bool = True,
    piece: Piece = WHOLE,
) -> Tensor | None:
    """The gradient of `leaf`; those of `sides` and `leaves` go to `grads` for their `owners`, in this order.

    `end` is that of a result (see `end_of`), whose gradient is `scale` dy; where only a `piece` of the result is right,
    it is zero elsewhere. What is returned, None where the result does not depend on `leaf`, may share memory with
    dy. `writes_on`: the caller goes on writing into dy.

    Raises:
        RevtrainError: autograd refuses, as for a reentrant checkpoint; or a hook has kept a view of dy, which the
            caller will write into.
    """
    if end is None:  # a constant
        return None
    wanted = [each for each in sides if each.requires_grad]
    owners = [owner for owner, each in zip(owners, sides, strict=False) if each.requires_grad] + list(
        owners[len(sides) :]
    )
    if end.channels_last or scale != 1 or piece.inner is not None:
        handed = read_part(dy, end.dtype, unit=scale, channels_last=end.channels_last)
        piece.clear_halo_(handed)
    else:
        handed = dy.view_as(dy).to(end.dtype)
    users = users_of_memory(dy)
    dleaf: Tensor | None
    try:
        dleaf, *gradients = torch.autograd.grad(end.edge, [leaf, *wanted, *leaves], handed, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RevtrainError(
            "A function inside of a chain uses torch.utils.checkpoint with use_reentrant=True.\n"
            "Its gradients cannot be taken inside of another backward pass: use use_reentrant=False."
        ) from error
    del end
    grads.add_all(owners, list(gradients), lent=handed)
    del gradients
    is_handed = dleaf is handed
    if not writes_on or not shares_memory(handed, dy):
        return dleaf
    if sys.getrefcount(handed) > REFERENCES + is_handed:  # a hook has kept it: it gets a copy, the chain goes on
        handed.data = handed.clone()
    elif users_of_memory(dy) > users + (dleaf is not None and not is_handed and shares_memory(dleaf, dy)):
        raise RevtrainError(
            "A hook inside of a function of a chain keeps a view of the gradient that it is given.\n"
            "The chain goes on working in that memory: keep a copy of it, gradient.clone()."
        )
    return dleaf


REFERENCES = 2  # to a local variable: the variable, and sys.getrefcount's argument


def refuse_graph(layer: nn.Module, y: Tensor) -> None:
    """Raise `RevtrainError` where a caller of `inverse` would expect a gradient."""
    if torch.is_grad_enabled() and y.requires_grad:
        raise RevtrainError(
            f"{type(layer).__name__}.inverse was given a tensor that asks for a gradient, and makes no graph.\n"
            "Call it inside of torch.no_grad(), or on y.detach()."
        )


_for_backward: ContextVar[bool] = ContextVar("for_backward", default=True)


@contextmanager
def without_backward() -> Iterator[None]:
    """The block runs forward passes after which no backward pass follows."""
    token = _for_backward.set(False)
    try:
        yield
    finally:
        _for_backward.reset(token)


def is_for_backward() -> bool:
    """Whether a backward pass may follow the forward pass that is running."""
    return _for_backward.get()


def keeps_graph() -> bool:
    """Whether the backward pass that is running may be run a second time (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def takes_context(module: nn.Module) -> bool:
    """Whether side inputs are for this module: its forward has more than one argument.

    A module that only hands them on says to which others in `hands_context_to()`, and takes some if one of those does.
    """
    hands_to = getattr(module, "hands_context_to", None)
    if hands_to is not None:
        return any(map(takes_context, hands_to()))
    kinds = inspect.signature(module.forward).parameters.values()
    return len([each for each in kinds if each.kind is not each.KEYWORD_ONLY]) > 1 or any(
        each.kind is each.VAR_POSITIONAL for each in kinds
    )


def context_for(module: nn.Module, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The side inputs that `module` takes: all, or none."""
    return context if context and takes_context(module) else ()
