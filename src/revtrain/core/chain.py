"""The chain: invertible layers in a row, and the one backward pass that goes through them.

invert   The forward pass keeps the chain's output and a few numbers a layer (of a BN, its statistics). The backward
         pass goes through the layers from last to first; each turns its output y and the gradient dy into its input x
         and dx. Two buffers of an activation's size serve them all, whatever the depth.
store    The same layers under ordinary autograd, which keeps their activations: the gradients without the noise of
         inversion, for comparison (section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.lazy import LazyModuleMixin

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer, context_for, takes_context
from revtrain.core.names import former_names
from revtrain.core.precision import autocast_as_now, autocast_dtype, pass_of, read_dtype
from revtrain.core.recompute import AsItWas, watching_for_gradients
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError

BACKWARDS = ("invert", "store")


class Observer(Protocol):
    """What may watch a chain from outside (see `observe`); the layers know nothing of it."""

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        """`x` is about to enter `layer` in the forward pass."""

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        """`x` is what the backward pass rebuilt of the input of `layer`."""


class Head(Protocol):
    """What may end a chain: a module that is not inverted (see `revtrain.layers.Head`)."""

    def __call__(self, x: Tensor) -> Tensor:
        """The chain's result by ordinary autograd."""

    def forward_(self, state: Tensor, state_format: StateFormat) -> tuple[Tensor, Any]:
        """(result, saved); the state stays as it is."""

    def backward_(
        self,
        state: Tensor,
        dresult: Tensor,
        saved: Any,
        grads: Gradients,
        state_format: StateFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        """The gradient of the state, in `dtype`."""


class InvertibleChain(InvertibleLayer):
    """Invertible layers in a row; itself an invertible layer, so chains nest.

    Args:
        layers: `InvertibleLayer`s, first to last.
        backward: "invert" (rebuild activations) or "store" (ordinary autograd).
        reuse_output: let the backward pass overwrite the chain's output. Saves one activation; the output
            must then not be read after `backward()`. Autograd refuses a second backward through it.
        state_format: the number format of the states, that is, of the activations between the layers; an integer
            one only for layers that can have it (couplings of the same format, poolings). Formerly `stream`.
        head: a module after the layers that needs no inverse. Nobody else then sees the last state, and the
            backward pass overwrites it. Formerly `readout`.

    Input and output are tensors (B, ...); the layers decide the rest. `overflows` counts the input values that lay
    outside the range of the format's grid. Raises `RevtrainError` for a layer that is not invertible, one that
    cannot take integer states, or an unknown `backward`.
    """

    observer: Observer | None = None
    layers: Sequence[InvertibleLayer]
    overflows: Tensor

    @former_names(stream="state_format", readout="head")
    def __init__(
        self,
        layers: Iterable[InvertibleLayer],
        backward: str = "invert",
        reuse_output: bool = False,
        state_format: StateFormat = PLAIN,
        head: Head | None = None,
    ):
        super().__init__()
        self.layers = cast(Sequence[InvertibleLayer], nn.ModuleList(layers))
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, InvertibleLayer):
                raise RevtrainError(
                    f"Layer {index} of the chain is a {type(layer).__name__}, which has no inverse.\n"
                    "Expected InvertibleLayer objects; put other modules outside the chain or inside F and G "
                    "of an AdditiveCoupling."
                )
        if backward not in BACKWARDS:
            raise RevtrainError(f"backward={backward!r} is unknown.\nExpected one of: {', '.join(BACKWARDS)}.")
        for index, layer in enumerate(self.layers):
            if state_format.is_integer and not layer.passes_integers:
                raise RevtrainError(
                    f"stream={state_format.name} cannot pass layer {index} of the chain, a {type(layer).__name__}.\n"
                    "Expected couplings and poolings only; use stream=float32 for other layers."
                )
        self.backward_mode = backward
        self.state_format, self.head = state_format, head
        self.reuse_output = reuse_output or head is not None
        if state_format.bits is not None:
            self.register_buffer("overflows", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The chain's result, with side inputs `context` for those layers and functions that take some."""
        self._check_input(x, context)
        if self.backward_mode == "store" or not x.numel():  # of an empty batch nothing is stored
            with pass_of(x.dtype):
                y = self.state_format.snap(x)
                for layer in self.layers:
                    y = layer(y, *context_for(layer, context))
                y = y if self.head is None else self.head(y)
                return y.to(read_dtype(y))
        return _without_compiler()(self, x, *context)

    def hands_context_to(self) -> Iterable[nn.Module]:
        """The modules that may take side inputs."""
        return self.layers

    def _invert(self, x: Tensor, *context: Tensor) -> Tensor:
        if x.is_complex():
            raise RevtrainError(
                f"InvertibleChain: an input of {x.dtype} was given, of complex numbers.\n"
                'Expected real floating point: stack real and imaginary part, or use backward="store".'
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RevtrainError(
                "InvertibleChain: an input with a tangent of forward-mode differentiation was given.\n"
                'Only backward="store" passes tangents on.'
            )
        self._fill_lazy_modules(x, *context)
        now = AsItWas(self, context)
        tensors = [*context, *now.parameters]
        if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in tensors)):
            return _ChainFunction.apply(x, self, now, *tensors)
        with watching_for_gradients(torch.is_grad_enabled()), torch.no_grad():
            return self._pass_forward(x, context)[0]

    def _pass_forward(self, x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Any, Any]:
        """(result, last state, saved by the layers, saved by the head)."""
        no_numbers: list[Tensor] = []
        with pass_of(x.dtype, no_numbers):
            state, saved = self.forward_(self.encode(x), *context)
            result, saved_by_head = self.finish(state)
            result = result.to(read_dtype(result))
            if no_numbers:  # integer states have no value for what is none
                result = result.masked_fill_(torch.stack(no_numbers).any(), torch.nan)
        return result, state, saved, saved_by_head

    def _check_input(self, x: Tensor, context: tuple[Tensor, ...]) -> None:
        if not (x.is_floating_point() or x.is_complex()):
            raise RevtrainError(
                f"InvertibleChain: an input of {x.dtype} was given.\n"
                "Expected floating point: x.float(), images divided by 255, say."
            )
        if context and not takes_context(self):
            raise RevtrainError(
                f"InvertibleChain: {len(context)} side input(s), the context, were given, but none of its layers and "
                "functions takes any.\n"
                "Expected a forward(x, context) of the layer or of F or G that is to have them."
            )

    @torch.no_grad()
    def _fill_lazy_modules(self, x: Tensor, *context: Tensor) -> None:
        """Let lazy modules find the sizes of their parameters, which the pass itself has to know."""
        lazy = [m for m in self.modules() if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()]  # type: ignore[misc]
        if not lazy:
            return
        training = [m for m in self.modules() if m.training]
        for module in training:  # evaluation draws no random numbers and updates no statistics
            module.training = False
        try:
            y = self.state_format.snap(x.detach().clone())
            for layer in self.layers:
                y = layer(y, *context_for(layer, context))
            if self.head is not None:
                self.head(y)
        finally:
            for module in training:
                module.training = True

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[InvertibleLayer]:
        return iter(self.layers)

    def __getitem__(self, index: int | slice) -> InvertibleLayer:
        """A layer, or for a slice a chain of the same layers without the head."""
        if isinstance(index, slice):
            return InvertibleChain(self.layers[index], self.backward_mode, state_format=self.state_format)
        return self.layers[index]

    def encode(self, x: Tensor) -> Tensor:
        """x as a state in this chain's number format: a copy that it may overwrite."""
        state, lost = self.state_format.encode(x, self.piece_bytes)
        if lost is not None:
            self.overflows += lost
        return state

    def finish(self, state: Tensor) -> tuple[Tensor, Any]:
        """(result, saved) of the last state: the head's, or else the state itself in floating point."""
        if self.head is not None:
            return self.head.forward_(state, self.state_format)
        return (state if state.is_floating_point() else self.state_format.decode(state)), None

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, list[Any]]:
        saved_by_layers = []
        for layer in self.layers:
            if self.observer is not None:
                self.observer.on_input(layer, x)
            x, saved = layer.forward_(x, *context_for(layer, context))
            saved_by_layers.append(saved)
        return x, saved_by_layers

    def recompute_(self, x: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        for layer, each in zip(self.layers, saved, strict=True):
            x = layer.recompute_(x, each, *context_for(layer, context))
        return x

    def recompute_for_backward_(self, x: Tensor, saved: list[Any], *context: Tensor) -> tuple[Tensor, list[Any]]:
        saved_again = []
        for layer, each in zip(self.layers, saved, strict=True):
            x, more = layer.recompute_for_backward_(x, each, *context_for(layer, context))
            saved_again.append(more)
        return x, saved_again

    def inverse_(self, y: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        for layer, each in zip(reversed(self.layers), reversed(saved), strict=True):
            y = layer.inverse_(y, each, *context_for(layer, context))
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y

    def backward_(
        self, y: Tensor, dy: Tensor, saved: list[Any], grads: Gradients, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        for layer, each in zip(reversed(self.layers), reversed(saved), strict=True):
            y, dy = layer.backward_(y, dy, each, grads, *context_for(layer, context))
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y, dy

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The head was called readout once: a network saved then loads as well.
        former = f"{prefix}readout."
        for key in [key for key in state_dict if key.startswith(former)]:
            state_dict[f"{prefix}head.{key.removeprefix(former)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _without_compiler() -> Callable[..., Tensor]:
    """`InvertibleChain._invert`, which torch.compile leaves alone as a whole: one break of the graph a chain."""
    return torch.compiler.disable(InvertibleChain._invert)


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chain: InvertibleChain, now: AsItWas, *tensors: Tensor) -> Tensor:
        ctx.chain, ctx.as_it_was, ctx.tensors, ctx.input_dtype = chain, now, tensors, x.dtype
        # Recomputation must round as the forward pass did, so it runs under the same autocast state.
        ctx.autocast = autocast_as_now(x.device.type)
        with ctx.autocast():
            result, state, ctx.saved, ctx.saved_by_head = chain._pass_forward(x, tuple(now.context))
        # As the state; that of an integer one is in 16 bit under autocast.
        ctx.gradient_dtype = state.dtype if state.is_floating_point() else autocast_dtype(x.device.type) or x.dtype
        ctx.owns_state = chain.reuse_output or result is not state
        ctx.save_for_backward(state)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (saved_state,) = ctx.saved_tensors
        chain, grads, context = ctx.chain, Gradients(ctx.tensors), tuple(ctx.as_it_was.context)
        ctx.as_it_was.check()
        state = saved_state.detach() if ctx.owns_state else saved_state.detach().clone()
        with ctx.as_it_was.restored(), ctx.autocast(), pass_of(ctx.input_dtype, observed=chain.observer is not None):
            if chain.head is None:
                # dy may be shared with other branches of the caller's graph, or be expanded: a copy to work in.
                dstate = dy.to(ctx.gradient_dtype, copy=True, memory_format=torch.contiguous_format)
            else:
                dstate = chain.head.backward_(
                    state, dy, ctx.saved_by_head, grads, chain.state_format, ctx.gradient_dtype
                )
            x, dx = chain.backward_(state, dstate, ctx.saved, grads, *context)
        if not ctx.needs_input_grad[0]:
            dx = None
        elif dx.dtype != ctx.input_dtype:  # x has served its purpose: a narrower gradient fits into its storage
            fits = x.is_contiguous() and x.element_size() >= ctx.input_dtype.itemsize
            narrow = x.view(-1).view(ctx.input_dtype)[: dx.numel()].view(dx.shape) if fits else None
            dx = dx.to(ctx.input_dtype) if narrow is None else narrow.copy_(dx)
        return dx, None, None, *grads.values()


@contextmanager
def observe(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Attach `observer` to every chain inside `model` for the duration of the block."""
    chains = [m for m in model.modules() if isinstance(m, InvertibleChain)]
    for chain in chains:
        chain.observer = observer
    try:
        yield
    finally:
        for chain in chains:
            chain.observer = None
