"""The chain: invertible layers in a row, and the one backward pass that goes through them.

invert   The forward pass keeps the chain's output and a few numbers a layer (of a BN, its statistics). The backward
         pass goes through the layers from last to first; each turns its output y and the gradient dy into its input x
         and dx. Two buffers of an activation's size serve them all, whatever the depth.
store    The same layers under ordinary autograd, which keeps their activations: the gradients without the noise of
         inversion, for comparison (section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.lazy import LazyModuleMixin

from revtrain.core.gradients import Gradients
from revtrain.core.hooks import forward_
from revtrain.core.joined import Steps, joined, separate
from revtrain.core.layer import InvertibleLayer, context_for, refuse_graph, takes_context, without_backward
from revtrain.core.layer_list import LayerList
from revtrain.core.names import former_names
from revtrain.core.precision import NARROW, autocast_as_now, autocast_dtype, pass_of, read_dtype
from revtrain.core.recompute import AsItWas, parameters_of, watching_for_gradients
from revtrain.core.sharded import whole_weights
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
    """What may end a chain: a module that is not inverted (see `revtrain.layers.Head`).

    One that takes side inputs of the chain, as its `forward` says, gets them as further arguments of all three.
    An ordinary module may end a chain, too. It is run by autograd on the chain's result, which it may keep.
    """

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
        head: a module after the layers that needs no inverse. If it has `forward_` and `backward_` (see `Head`), nobody
            else sees the last state, and the backward pass overwrites it. Formerly `readout`.

    Input and output are tensors (B, ...); the layers decide the rest. `overflows` counts the input values that lay
    outside the range of the format's grid.

    Raises `RevtrainError` for an unknown `backward`, a head that is no module, and a layer without an inverse or of
    another number format; also for one that is put into `layers` later (see `LayerList`).
    """

    observer: Observer | None = None
    recompute_leading = True  # as F or G: not all of its layers are inverted; see `LayerwisePass`
    layers: Sequence[InvertibleLayer]
    state_format: StateFormat
    head: nn.Module | None
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
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList | nn.Sequential):
            raise RevtrainError(
                f"InvertibleChain was given a {type(layers).__name__} in the place of its layers.\n"
                "Expected a list of InvertibleLayer objects: InvertibleChain([layer])."
            )
        if head is not None and not isinstance(head, nn.Module):
            raise RevtrainError(
                f"InvertibleChain was given a {type(head).__name__} as its head.\n"
                "Expected an nn.Module: wrap the function in one, or call it on the result of the chain."
            )
        self.state_format = state_format
        self.layers = cast(Sequence[InvertibleLayer], LayerList(layers, state_format))
        self.backward_mode = backward
        self.head = cast(nn.Module | None, head)
        self.reuse_output = reuse_output or self._lean_head is not None
        self.passes_integers = state_format.is_integer
        if state_format.bits is not None:
            self.register_buffer("overflows", torch.zeros((), dtype=torch.int64), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backward_mode" and value not in BACKWARDS:
            raise RevtrainError(f"backward={value!r} is unknown.\nExpected one of: {', '.join(BACKWARDS)}.")
        if name == "layers" and not isinstance(value, LayerList):
            value = LayerList(value, self.state_format)
        super().__setattr__(name, value)

    @property
    def _lean_head(self) -> Any:
        """The head (`Head`), if it works on the chain's state; None: an ordinary module works on the chain's result."""
        is_lean = hasattr(self.head, "forward_") and hasattr(self.head, "backward_")
        return self.head if is_lean else None

    def _for_head(self, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The side inputs that the head takes, which has to work on the chain's state."""
        return context_for(self._lean_head, context) if self._lean_head is not None else ()

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The chain's result, with side inputs `context` for those layers and functions that take some."""
        self._check_input(x, context)
        if self.backward_mode == "store" or not x.numel():  # of an empty batch nothing is stored
            with pass_of(x.dtype) if x.dtype in NARROW else nullcontext():  # a compiler cannot follow it
                y = self.state_format.snap(x)
                for layer in self.layers:
                    y = layer(y, *context_for(layer, context))
                y = y if self.head is None else self.head(y, *self._for_head(context))
                return y.to(read_dtype(y))
        result = _without_compiler()(self, x, *context)
        return result if self.head is None or self._lean_head is not None else self.head(result)

    def hands_context_to(self) -> Iterable[nn.Module]:
        """The modules that may take side inputs."""
        return self.layers if self._lean_head is None else [*self.layers, self._lean_head]

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
        now = AsItWas(
            cast(nn.Module, self if self._lean_head is not None or self.head is None else self.layers), context
        )
        tensors = [*context, *now.parameters]
        if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in tensors)):
            return _ChainFunction.apply(x, self, now, *tensors)
        with watching_for_gradients(torch.is_grad_enabled()), torch.no_grad(), without_backward():
            return self._pass_forward(x, context)[0]

    def _pass_forward(self, x: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Any, Any]:
        """(result, last state, saved by the layers, saved by the head)."""
        is_integer = self.state_format.is_integer
        no_numbers = torch.zeros((), dtype=torch.bool, device=x.device) if is_integer else None
        with pass_of(x.dtype, no_numbers):
            state, saved = self.forward_(self.encode(x), *context)
            result, saved_by_head = self.finish(state, *context)
            result = result.to(read_dtype(result))
            if no_numbers is not None:  # integer states have no value for what is none
                result = result.masked_fill_(no_numbers, torch.nan)
        return result, state, saved, saved_by_head

    def _check_input(self, x: Tensor, context: tuple[Tensor, ...]) -> None:
        if not isinstance(x, Tensor):
            raise RevtrainError(
                f"InvertibleChain was given a {type(x).__name__}.\nExpected a tensor (B, ...) for its first layer."
            )
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
        lazy = [m for m in self.modules() if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()]
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
        return self.state_format.encode(x, self.piece_bytes, getattr(self, "overflows", None))

    def finish(self, state: Tensor, *context: Tensor) -> tuple[Tensor, Any]:
        """(result, saved) of the last state: the head's, or else the state itself in floating point."""
        if self._lean_head is not None:
            return self._lean_head.forward_(state, self.state_format, *self._for_head(context))
        return (state if state.is_floating_point() else self.state_format.decode(state)), None

    def steps(self, saved: Sequence[Any] | None = None, first: int = 0) -> Steps:
        """What a pass goes through: the layers from the first on, some joined to one, with what each has saved."""
        layers = list(self.layers)[first:]
        saved = [None] * len(layers) if saved is None else saved[first:]
        # an observer sees every layer on its own
        return joined(layers, saved) if self.observer is None else list(zip(layers, saved, strict=True))

    def forward_(self, x: Tensor, *context: Tensor) -> tuple[Tensor, list[Any]]:
        steps = self.steps()
        for index, (layer, _) in enumerate(steps):
            if self.observer is not None:
                self.observer.on_input(layer, x)
            with whole_weights(layer):
                x, saved = forward_(layer, x, context_for(layer, context), self.state_format.decode)
            steps[index] = layer, saved
        return x, separate(steps, self.layers)

    def recompute_(self, x: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        for layer, each in self.steps(saved):
            each = layer.stand_in(x) if each is None else each
            x = layer.recompute_(x, each, *context_for(layer, context))
        return x

    def recompute_for_backward_(self, x: Tensor, saved: list[Any], *context: Tensor) -> tuple[Tensor, list[Any]]:
        steps = self.steps(saved)
        for index, (layer, each) in enumerate(steps):
            x, more = layer.recompute_for_backward_(x, each, *context_for(layer, context))
            steps[index] = layer, more
        return x, separate(steps, self.layers)

    def inverse(self, y: Tensor, saved: Any = None, *context: Tensor) -> Tensor:
        """x of y, the chain's result: chain.inverse(y, *side inputs), or with `saved` between; in y's precision.

        Raises:
            RevtrainError: a layer needs what the forward pass saved, or there is a head.
        """
        if isinstance(saved, Tensor):
            saved, context = None, (saved, *context)
        if self.head is not None and saved is None:
            raise RevtrainError(
                f"InvertibleChain has a head, a {type(self.head).__name__}, which has no inverse.\n"
                "Invert the layers alone: chain[:].inverse(y), where y is what they gave to the head."
            )
        refuse_graph(self, y)
        with torch.no_grad(), pass_of(y.dtype):
            state = self.state_format.encode(y, self.piece_bytes) if y.is_floating_point() else y.clone()
            x = self.inverse_(state, self.stand_in(state) if saved is None else saved, *context)
            return self.state_format.decode(x, y.dtype).to(y.dtype) if y.is_floating_point() else x

    def stand_in(self, y: Tensor) -> list[Any]:
        return [None] * len(self)  # each layer's, once its own y is there

    def inverse_(self, y: Tensor, saved: list[Any], *context: Tensor) -> Tensor:
        for index, (layer, each) in reversed(list(enumerate(zip(self.layers, saved, strict=True)))):
            with _place(index), whole_weights(layer):
                each = layer.stand_in(y) if each is None else each
                y = layer.inverse_(y, each, *context_for(layer, context))
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y

    def backward_(
        self, y: Tensor, dy: Tensor, saved: list[Any], grads: Gradients, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.walk_back_(y, dy, saved, grads, context)

    def walk_back_(
        self,
        y: Tensor,
        dy: Tensor,
        saved: list[Any],
        grads: Gradients,
        context: tuple[Tensor, ...],
        until: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(x, dx) of the layer at `until`: the layers from the last to that one are undone."""
        steps = self.steps(saved, until)
        while steps:
            layer, each = steps.pop()
            with whole_weights(layer, grads):
                y, dy = layer.backward_(y, dy, each, grads, *context_for(layer, context))
            if self.observer is not None:
                self.observer.on_reconstructed(layer, y)
        return y, dy

    def first_that_wants(self, grads: Gradients, context: tuple[Tensor, ...]) -> int:
        """The place of the first layer inside which anybody asks for a gradient: in front of it, nobody does."""
        for index, layer in enumerate(self.layers):
            if grads.wanted([*parameters_of(layer), *context_for(layer, context)]):
                return index
        return len(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The head was called readout once: a network saved then loads as well.
        former = f"{prefix}readout."
        for key in [key for key in state_dict if key.startswith(former)]:
            state_dict[f"{prefix}head.{key.removeprefix(former)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_compiler() -> Callable[..., Tensor]:
    """`InvertibleChain._invert`, which torch.compile leaves alone as a whole: one break of the graph a chain."""
    return _uncompiled if torch.compiler.is_compiling() else InvertibleChain._invert


# As torch.compiler.disable, which would import the compiler here and now.
_uncompiled = torch._disable_dynamo(InvertibleChain._invert)


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
            if chain._lean_head is None:
                # dy may be shared with other branches of the caller's graph, or be expanded: a copy to work in.
                dstate = dy.to(ctx.gradient_dtype, copy=True, memory_format=torch.contiguous_format)
            else:
                dstate = chain._lean_head.backward_(
                    state,
                    dy,
                    ctx.saved_by_head,
                    grads,
                    chain.state_format,
                    ctx.gradient_dtype,
                    *chain._for_head(context),
                )
            # Nobody needs the input of frozen first layers: the walk ends before them, unless somebody watches.
            ends_early = not ctx.needs_input_grad[0] and chain.observer is None
            until = chain.first_that_wants(grads, context) if ends_early else 0
            x, dx = chain.walk_back_(state, dstate, ctx.saved, grads, context, until)
        if not ctx.needs_input_grad[0]:
            dx = None
        elif dx.dtype != ctx.input_dtype:  # x has served its purpose: a narrower gradient fits into its storage
            fits = x.is_contiguous() and x.element_size() >= ctx.input_dtype.itemsize
            narrow = x.view(-1).view(ctx.input_dtype)[: dx.numel()].view(dx.shape) if fits else None
            dx = dx.to(ctx.input_dtype) if narrow is None else narrow.copy_(dx)
        return dx, None, None, *grads.values()


@contextmanager
def _place(index: int) -> Iterator[None]:
    """An error of the block says at which layer it happened, as in layers[1]: or layers[0].layers[1]:"""
    try:
        yield
    except RevtrainError as error:
        message = str(error)
        raise RevtrainError(f"layers[{index}]{'.' if message.startswith('layers[') else ': '}{message}") from error


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
