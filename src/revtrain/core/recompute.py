"""A function of the user's, run twice as if once.

A reversible block runs F first without a graph, and once more on the way back. For the two to be one function, whatever
the first run depended on must be as it was: random numbers, buffers that it changed, simple attributes that it counted
up. What can be restored is restored, what cannot be is checked; see docs/engine.md, section 4.

    first = FirstRun(function, device)          before
    y = first(x)                                as often as there are pieces
    first.end()                                 keeps, as it was before, what the runs have changed
    ...
    with SecondRun(first, wanted) as again:
        y = again(leaf)                         the same pieces in the same order
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from revtrain.errors import RevtrainError

SAMPLED_VALUES = 32  # of an input and an output: they tell whether two runs were one function
# Of the root mean square of the values, by how much a second run from the same input may differ. Other kernels and
# orders of summation round differently; another mask of a dropout differs by about one.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
NOISE_GAIN = 100.0  # an input that was rebuilt with noise may differ; its noise, so many times larger, is no fault
# two rows of signs, fixed: their sums differ wherever the values do
_SIGNS = torch.tensor(
    [[1.0 if index * step % 7 < 4 else -1.0 for index in range(SAMPLED_VALUES)] for step in (1, 3)], dtype=torch.float64
)
SMALL_BUFFER = 2**14  # values
SIMPLE = (int, float, bool, str, type(None))

# What stands in for parameters and buffers is visible to every thread: one puts it in at a time.
_SWAPPING = threading.RLock()


class Place(NamedTuple):
    """Where a parameter stands; it may stand in several places."""

    module: nn.Module
    name: str
    tensor: Tensor


# ---- what a module consists of -------------------------------------------------------------------


def parameter_places(module: nn.Module) -> list[Place]:
    """All places of parameters inside `module`, also of a replica of `DataParallel`'s or in a functional call."""
    places = []
    for each in module.modules():
        # torch.nn.parallel.replicate leaves `_parameters` empty and keeps them under this name
        held = getattr(each, "_former_parameters", None) or each._parameters
        places += [Place(each, name, tensor) for name, tensor in held.items() if tensor is not None]
    return places


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Every parameter inside `module` once, in the order of `parameters()`; a replica's, too."""
    with _SWAPPING:  # not those that stand in for them while another thread recomputes
        return list({id(place.tensor): place.tensor for place in parameter_places(module)}.values())


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the two lie in one storage."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def is_dense(x: Tensor) -> bool:
    """Whether the values of x lie side by side in memory, in the usual order or channels last."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


# ---- random numbers ------------------------------------------------------------------------------


class Generators:
    """All generators of random numbers that a function may draw from, and their states at one moment.

    torch's on the CPU and on the devices given, Python's, numpy's, and those that modules hold as attributes.
    """

    def __init__(self, devices: Sequence[torch.device], held: Sequence[Any] = ()):
        self.devices, self.held = [each for each in devices if each.type in ("cuda", "mps")], list(held)
        self.states = self._read()

    def have_changed(self) -> bool:
        """Whether anybody has drawn since."""
        return any(not _same_state(a, b) for a, b in zip(self.states, self._read(), strict=True))

    def restore(self) -> None:
        """Put the states back."""
        cpu, python, numpys, *others = self.states
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpys)
        for device, state in zip(self.devices, others, strict=False):
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.mps.set_rng_state(state)
        for generator, state in zip(self.held, others[len(self.devices) :], strict=True):
            _set_state(generator, state)

    def now(self) -> Generators:
        """The same generators, as they are now."""
        return Generators(self.devices, self.held)

    def _read(self) -> list[Any]:
        of_devices = [
            torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()
            for device in self.devices
        ]
        own = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
        return [*own, *of_devices, *map(_get_state, self.held)]


def held_generators(modules: Sequence[nn.Module]) -> list[Any]:
    """Generators of torch's, numpy's and Python's kinds that are attributes of the modules."""
    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    found = {id(value): value for each in modules for value in vars(each).values() if isinstance(value, kinds)}
    return list(found.values())


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        # Read the bytes themselves: a tensor operation here would be seen, and refused, under fake tensors.
        return ctypes.string_at(a.data_ptr(), a.numel()) == ctypes.string_at(b.data_ptr(), b.numel())
    if isinstance(a, np.ndarray):
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_state(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and any(isinstance(each, np.ndarray) for each in a):
        return len(a) == len(b) and all(map(_same_state, a, b))
    return bool(a == b)


# ---- the first run -------------------------------------------------------------------------------


class FirstRun:
    """What the first run of a function depends on, taken before it; called in the place of the function.

    Args:
        function: any module.
        device: of its input.
        name: of the function, for messages; None: its class.
    """

    def __init__(self, function: nn.Module, device: torch.device, name: str | None = None):
        self.function, self.name = function, name or type(function).__name__
        self.run: Callable[..., Tensor] = function
        self.writes_its_input = self.must_be_pure = False
        self.modules = list(function.modules())
        self.modes = [each.training for each in self.modules]
        with _SWAPPING:
            self.places = parameter_places(function)
            self._buffers = [
                (each, name, tensor, _version(tensor), tensor.clone())
                for each in self.modules
                for name, tensor in each._buffers.items()
                if tensor is not None
            ]
        self._versions = {id(place.tensor): _version(place.tensor) for place in self.places}
        self._attributes = [_simple_attributes(each) for each in self.modules]
        devices = {str(each): each for each in (device, *(place.tensor.device for place in self.places))}
        self.generators: Generators | None = Generators(list(devices.values()), held_generators(self.modules))
        self.input_shape: torch.Size | None = None  # where it is an invertible layer
        self.outputs: list[tuple[torch.Size, torch.dtype]] = []
        self.samples: list[tuple[Tensor, Tensor] | None] = []
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []  # those that may have changed, as they were before
        self.changed_attributes: list[tuple[nn.Module, str, Any]] = []

    def __call__(self, x: Tensor, *context: Tensor) -> Tensor:
        """function(x, *context); x is not the caller's, so that the function may write into it."""
        given, version = sample(x), _version(x)
        y = self.run(x, *context)
        if not isinstance(y, Tensor):
            raise RevtrainError(
                f"{self.name} returned a {type(y).__name__}.\nExpected a tensor: wrap it in a module that returns one."
            )
        self.writes_its_input |= _version(x) != version
        self.outputs.append((y.shape, y.dtype))
        taken = None if given is None else sample(y)
        self.samples.append(None if given is None or taken is None else (given, taken))
        return y

    def end(self) -> FirstRun:
        """Let go of all that the runs have left as it was."""
        for each, name, tensor, version, before in self._buffers:
            # torch's batch norms write into their statistics without a trace: small buffers are kept in any case
            if _version(tensor) != version or tensor.numel() <= SMALL_BUFFER:
                self.buffers.append((each, name, before))
            elif each._buffers.get(name) is not tensor:
                self.buffers.append((each, name, tensor))
        for each, before in zip(self.modules, self._attributes, strict=True):
            now = vars(each)
            self.changed_attributes += [
                (each, name, value) for name, value in before.items() if name in now and now[name] != value
            ]
        self._buffers, self._attributes = [], []
        if self.generators is not None and not self.generators.have_changed():
            self.generators = None
        return self

    def begin_again(self) -> FirstRun:
        """For a first run that nobody has recorded: buffers and generators are to be as they are now."""
        self.buffers = [(each, name, before) for each, name, _, _, before in self._buffers]
        self.changed_attributes = [
            (each, name, value)
            for each, before in zip(self.modules, self._attributes, strict=True)
            for name, value in before.items()
        ]
        self._buffers, self._attributes = [], []
        return self

    def pure(self) -> FirstRun:
        """For an inverse without a forward pass: a run that draws random numbers or changes a state is refused."""
        self.must_be_pure = True
        return self.begin_again()

    def check(self) -> None:
        """Refuse a second run that cannot be the first: weights were stepped or modes switched in between.

        Raises:
            RevtrainError: names what has changed.
        """
        for module, name, tensor in self.places:
            if _version(tensor) != self._versions[id(tensor)]:
                raise RevtrainError(
                    f"{self.name}: its parameter {name} (of {type(module).__name__}) was changed between the forward "
                    "and the backward pass.\n"
                    "The backward pass recomputes this module and would compute other gradients: step the optimizer "
                    "after backward()."
                )
        for each, training in zip(self.modules, self.modes, strict=True):
            if each.training != training:
                raise RevtrainError(
                    f"{self.name}: {type(each).__name__} was switched to {'train' if each.training else 'eval'}() "
                    "between the forward and the backward pass.\n"
                    "The backward pass recomputes this module and would compute other gradients: switch after "
                    "backward()."
                )


def _simple_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, SIMPLE) and name != "training"}


# ---- the second run ------------------------------------------------------------------------------


class SecondRun:
    """The same runs once more, inside the `with` block; nothing that the first runs have changed changes again.

    Args:
        first: the ended first run.
        wanted: parameters whose gradient is asked for; `leaves` stand in for them, in this order. A gradient that is
            taken piece by piece with respect to these passes no hook of the real parameters, which then fire once, when
            the chain returns the whole gradient through autograd.
    """

    def __init__(self, first: FirstRun, wanted: Sequence[Tensor] = ()):
        self.first, self.piece = first, 0
        self.leaves = [each.detach().requires_grad_() for each in wanted]
        self._leaf_of = {id(each): leaf for each, leaf in zip(wanted, self.leaves, strict=True)}
        self._now: Generators | None = None

    def __enter__(self) -> SecondRun:
        self.first.check()
        self._buffers = [(each, name, before.clone()) for each, name, before in self.first.buffers]
        self._attributes = list(self.first.changed_attributes)
        if self.first.generators is not None:
            self._now = self.first.generators.now()
            self.first.generators.restore()
        return self

    def __exit__(self, *error: object) -> None:
        impure = self.first.must_be_pure and error[0] is None and self._has_changed_something()
        if self._now is not None:
            self._now.restore()
        if impure:
            raise RevtrainError(
                f"{self.first.name} draws random numbers or changes a state, such as statistics, in this mode: its "
                "inverse needs what the forward pass saved.\nCall eval() first, or hand over the `saved` that forward_ "
                "returned."
            )

    def _has_changed_something(self) -> bool:
        drew = self.first.generators is not None and self.first.generators.have_changed()
        buffers = zip(self.first.buffers, self._buffers, strict=True)
        return (
            drew
            or any(before is not now and not torch.equal(before, now) for (*_, before), (*_, now) in buffers)
            or self._attributes != self.first.changed_attributes
        )

    def __call__(self, x: Tensor, *context: Tensor) -> Tensor:
        """function(x, *context), with a graph from x, context and `leaves` where gradients are enabled.

        Raises:
            RevtrainError: this run was not the first one again, or a tensor from outside asks for a gradient.
        """
        given = sample(x)
        # An operation in place on a leaf is refused by autograd, and would change what the coupling reads once more.
        own = x.clone() if self.first.writes_its_input else x
        y = self.within(self.first.run, own, *context)
        if not self.first.must_be_pure:
            self._compare(given, y)
        if y.grad_fn is not None:
            self._refuse_foreign_leaves(y, (x, *context))
        self.piece += 1
        return y

    def within(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """run(*inputs) with everything as it was at the first run, and leaves in the place of parameters."""
        with self._stand_ins():
            return run(*inputs)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        swapped: list[tuple[dict[str, Any], str, Any]] = []

        def put(held: dict[str, Any], name: str, value: Any) -> None:
            swapped.append((held, name, held.get(name)))
            held[name] = value

        with _SWAPPING:
            for module, name, tensor in self.first.places:
                held = vars(module) if getattr(module, "_former_parameters", None) else module._parameters
                put(held, name, self._leaf_of.get(id(tensor), tensor))
            for each, name, value in self._attributes:
                put(vars(each), name, value)
            for each, name, buffer in self._buffers:
                put(each._buffers, name, buffer)
            try:
                yield
            finally:
                # the next piece goes on from what this one has left
                self._attributes = [(each, name, vars(each).get(name)) for each, name, _ in self._attributes]
                self._buffers = [(each, name, each._buffers[name]) for each, name, _ in self._buffers]
                for held, name, value in reversed(swapped):
                    held[name] = value

    def _compare(self, given: Tensor | None, y: Tensor) -> None:
        first = self.first
        shape, dtype = first.outputs[self.piece]
        if (y.shape, y.dtype) != (shape, dtype):
            raise RevtrainError(
                f"{first.name} returned {tuple(shape)} {dtype} in the forward pass and {tuple(y.shape)} {y.dtype} when "
                "it was recomputed.\n"
                "Expected the same function both times: docs/library.md says what a chain can restore."
            )
        before = first.samples[self.piece]
        if before is None or given is None:
            return
        again = sample(y)
        tolerance = TOLERANCES.get(y.dtype, 0.1) + NOISE_GAIN * _difference(before[0], given)
        if again is not None and not _difference(before[1], again) <= tolerance:
            raise RevtrainError(
                f"{first.name} computed something else when it was recomputed from the same input.\n"
                "It depends on what a chain cannot see and restore: a random generator outside of its modules, a file, "
                "a clock, an object that counts.\n"
                "Make that a buffer or a number of the module, or hand it over as a side input: chain(x, tensor)."
            )

    def _refuse_foreign_leaves(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        """A gradient that would go nowhere must be impossible to overlook: the graph of y is known."""
        known = {*map(id, self.leaves), *map(id, inputs)}
        stack: list[Any] = [y.grad_fn]
        seen = set(stack)
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise RevtrainError(
                    f"{self.first.name} uses a tensor of shape {tuple(leaf.shape)} that asks for a gradient and is "
                    "none of its parameters.\n"
                    "Recomputed inside of a chain, it would not get one. Hand it over as a side input, "
                    "chain(x, tensor), or make it a parameter of the module; detach() it where none is wanted."
                )
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)


def sample(x: Tensor) -> Tensor | None:
    """What tells x from other tensors: two sums of a few of its values, with signs, and their size, (3,) float64.

    The values are evenly spread over the memory of x. None under fake tensors, where there are no
    values, and on a GPU, for which it would have to wait.
    """
    if isinstance(x, FakeTensor) or x.device.type != "cpu" or x.numel() == 0 or not x.is_floating_point():
        return None
    count = min(SAMPLED_VALUES, x.numel())
    x = x.detach()
    x = x if is_dense(x) else x.contiguous()
    values = x.as_strided((count,), (x.numel() // count,), x.storage_offset()).double()
    return torch.cat([_SIGNS[:, :count] @ values, values.square().sum(0, keepdim=True).sqrt_()])


def _difference(a: Tensor, b: Tensor) -> float:
    """By how much two samples differ, relative to the first; 0 where that is not finite: nothing can be compared."""
    one, other, size = a.tolist()
    if not math.isfinite(size):
        return 0.0
    difference = max(abs(one - b[0].item()), abs(other - b[1].item()))
    return difference / size if size else float(difference > 0)
