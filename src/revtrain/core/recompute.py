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
import operator
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.prune import BasePruningMethod

from revtrain.core.precision import autocast_dtype, current_pass
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import WHOLE, Piece

SAMPLED_VALUES = 16  # of an input and an output: they tell whether two runs were one function
# Of the root mean square of the values, by how much a second run from the same input may differ. Other kernels and
# orders of summation round differently; another mask of a dropout differs by about one.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
NOISE_GAIN = 100.0  # an input that was rebuilt with noise may differ; its noise, so many times larger, is no fault
# two rows of signs, fixed: their sums differ wherever the values do
_SIGNS = [[1.0 if index * step % 7 < 4 else -1.0 for index in range(SAMPLED_VALUES)] for step in (1, 3)]
SMALL_BUFFER = 2**14  # values
SIMPLE = (int, float, bool, str, type(None))
ABSENT = object()  # in the place of an attribute or a buffer that a module did not have

# What stands in for parameters and buffers is visible to every thread: one puts it in at a time.
_SWAPPING = threading.RLock()


class Place(NamedTuple):
    """Where a parameter or a buffer stands; a parameter may stand in several places."""

    module: nn.Module
    held: dict[str, Any]  # of the module, or of a replica's attributes
    name: str
    tensor: Tensor


# ---- what a module consists of -------------------------------------------------------------------


def parameter_places(module: nn.Module) -> list[Place]:
    """All places of parameters inside `module`, also of a replica of `DataParallel`'s or in a functional call."""
    places = []
    for each in module.modules():
        # torch.nn.parallel.replicate leaves `_parameters` empty, and keeps them under this name and as attributes
        former = getattr(each, "_former_parameters", None)
        held = vars(each) if former else each._parameters
        places += [Place(each, held, name, t) for name, t in (former or held).items() if t is not None]
    return places


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Every parameter inside `module` once, in the order of `parameters()`; a replica's, too."""
    with _SWAPPING:  # not those that stand in for them while another thread recomputes
        return list({id(place.tensor): place.tensor for place in parameter_places(module)}.values())


def is_rewritten(module: nn.Module, *names: str) -> bool:
    """Whether a parameter of `module` is a function of others: pruned, or parametrised."""
    held = getattr(module, "_former_parameters", None) or module._parameters
    return not held.keys() >= set(names)


def effective(module: nn.Module, name: str) -> Tensor:
    """The value of `module`'s parameter; where it is pruned, as the hook of its next call would set it."""
    if name not in module._parameters:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                return hook.apply_mask(module)
    return getattr(module, name)


class AsItWas:
    """A module's parameters, buffers and modes, and side inputs, at the time of a forward pass.

    The backward pass needs them as they were. Other objects in the place of parameters, as torch.func.functional_call
    puts them there, or a pass around this one, are put back for the backward pass; changed values are refused.
    """

    def __init__(self, module: nn.Module, context: Sequence[Tensor] = ()):
        self.module, self.context = module, context
        with _SWAPPING:
            self.places = parameter_places(module)
            self.buffers = [
                Place(each, each._buffers, name, tensor)
                for each in module.modules()
                for name, tensor in each._buffers.items()
                if tensor is not None
            ]
        self.parameters = list({id(place.tensor): place.tensor for place in self.places}.values())
        self._versions = [_version(each) for each in (*self.parameters, *context)]
        self._modes = [each.training for each in module.modules()]

    def check(self) -> None:
        """Raise `RevtrainError` where weights were stepped, or modes switched, since: names what has changed."""
        for index, (tensor, version) in enumerate(zip((*self.parameters, *self.context), self._versions, strict=True)):
            if _version(tensor) != version:
                side = index - len(self.parameters)
                what = f"side input {side}" if side >= 0 else f"its parameter {self._path(tensor)}"
                raise RevtrainError(
                    f"{type(self.module).__name__}: {what} was changed between the forward and the backward pass.\n"
                    "The backward pass recomputes the functions that use it and would compute other gradients: step "
                    "the optimizer, or write to it, after backward()."
                )
        for (path, each), training in zip(self.module.named_modules(), self._modes, strict=True):
            if each.training != training:
                raise RevtrainError(
                    f"{type(self.module).__name__}: {path or 'it'}, a {type(each).__name__}, was switched to "
                    f"{'train' if each.training else 'eval'}() between the forward and the backward pass.\n"
                    "The backward pass recomputes it and would compute other gradients: switch after backward()."
                )

    def _path(self, tensor: Tensor) -> str:
        place = next(place for place in self.places if place.tensor is tensor)
        path = next(path for path, each in self.module.named_modules() if each is place.module)
        return f"{path}.{place.name}" if path else place.name

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The block finds the tensors of the forward pass in their places."""
        with _SWAPPING:
            others = [
                place for place in (*self.places, *self.buffers) if place.held.get(place.name) is not place.tensor
            ]
            if others:
                now = [place.held.get(place.name, ABSENT) for place in others]
                for place in others:
                    place.held[place.name] = place.tensor
                try:
                    yield
                finally:
                    for place, value in zip(others, now, strict=True):
                        _put(place.held, place.name, value)
                return
        yield


def _put(held: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


def memory_of(x: Tensor) -> int:
    """What tells the storage of x from others."""
    return x.untyped_storage()._cdata


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the two lie in one storage."""
    return memory_of(a) == memory_of(b)


def users_of_memory(x: Tensor) -> int:
    """How many tensors, and others, hold the storage of x."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


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
        own = [torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)]
        return [*own, *of_devices, *map(_get_state, self.held)]


def held_generators(modules: Sequence[nn.Module]) -> list[Any]:
    """Generators of torch's, numpy's and Python's kinds that are attributes of the modules."""
    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    found = {id(value): value for each in modules for value in vars(each).values() if isinstance(value, kinds)}
    return list(found.values())


# Exactly these, not their subclasses, which may draw, and write into buffers. To look at the generators costs more than
# to look at a function.
_DRAWS_NOTHING: set[type] = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d),
    *(nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Identity),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Sequential),
}


def draws_nothing(module: nn.Module) -> bool:
    """Whether it is known that a module alone, its children apart, draws no random numbers and writes to no buffers.

    A module of one's own says so by an attribute `draws_nothing = True` of its class itself; hooks may do anything.
    torch's norms write into their running statistics, which is seen to (see `takes_statistics`).
    """
    kind = type(module)
    known = kind in _DRAWS_NOTHING or vars(kind).get("draws_nothing", False)
    return known and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def takes_statistics(module: nn.Module) -> bool:
    """Whether a module is one of torch's norms that only takes its input into running statistics which it does not
    read: a second run leaves them alone if it is told to keep none."""
    known = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return known and module.training and bool(module.track_running_stats) and module.running_mean is not None


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
    if isinstance(a, tuple) and a and a[0] == "MT19937":  # an old one of numpy's, with an array inside
        return len(a) == len(b) and all(map(_same_state, a, b))
    return bool(a == b)


# ---- 16-bit weights --------------------------------------------------------------------------------


def narrow_weights(modules: Sequence[nn.Module], device: torch.device) -> dict[int, Tensor]:
    """id of a weight -> its copy in autocast's type, for convolutions and linear layers; empty without autocast.

    Autocast would make the same copies itself, one by one, for each call and so for each piece of the batch. Only where
    all modules are of known kinds: others may read a weight in another way.
    """
    dtype = autocast_dtype(device.type)
    if dtype is None or not all(_is_known(each) for each in modules):
        return {}
    weights = {
        id(weight): weight
        for each in modules
        if isinstance(each, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        for weight in (getattr(each, "_former_parameters", None) or each._parameters).values()
        if weight is not None and weight.dtype == torch.float32
    }
    if not weights:
        return {}
    with torch.no_grad():
        copies = [torch.empty_like(each, dtype=dtype) for each in weights.values()]
        torch._foreach_copy_(copies, [each.detach() for each in weights.values()])
    return dict(zip(weights, copies, strict=True))


def _is_known(module: nn.Module) -> bool:
    of_ours = type(module).__module__.startswith("revtrain.")
    return draws_nothing(module) and (type(module) in _DRAWS_NOTHING or of_ours)


# ---- the first run -------------------------------------------------------------------------------


class _Counter:
    """In the place of a norm's count of batches: what it is asked to add."""

    def __init__(self) -> None:
        self.count = 0

    def add_(self, more: int) -> None:
        self.count += more


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
        quiet = list(map(draws_nothing, self.modules))
        # those that write to no buffers, or into statistics that they do not read
        self.statistics = [
            each for each, known in zip(self.modules, quiet, strict=True) if known and takes_statistics(each)
        ]
        written = [each for each, is_quiet in zip(self.modules, quiet, strict=True) if not is_quiet or _may_write(each)]
        self.needs_slow_path = any(isinstance(each, _WITH_FAST_PATH) for each in self.modules)
        with _SWAPPING:
            self._buffers = [
                (each, name, tensor, _version(tensor), tensor.clone())
                for each in written
                for name, tensor in each._buffers.items()
                if tensor is not None
            ]
            self._names = {
                (id(each), name)
                for each in self.modules
                for name, tensor in each._buffers.items()
                if tensor is not None
            }
            devices = {str(device): device}
            for each in self.modules:
                devices |= {str(p.device): p.device for p in each._parameters.values() if p is not None and p.is_cuda}
        self._attributes = [dict(vars(each)) for each in self.modules]
        self._narrow = narrow_weights(self.modules, device)
        self._places = [each for each in parameter_places(function) if id(each.tensor) in self._narrow]
        # their counts of batches go up together at the end: one operation rather than one a norm
        self._counters = [
            (each, each.num_batches_tracked, _Counter())
            for each in self.statistics
            if each.momentum is not None and each.num_batches_tracked is not None
        ]
        self.device = device
        self.generators: Generators | None = None
        if not all(quiet):
            self.generators = Generators(list(devices.values()), held_generators(self.modules))
        self.pieces: list[Piece] = []
        self.input_shape: torch.Size | None = None  # where it is an invertible layer
        self.outputs: list[tuple[torch.Size, torch.dtype]] = []
        self.samples: list[tuple[Sample, Sample] | None] = []
        # those that may have changed, as they were before
        self.buffers: list[tuple[nn.Module, str, Any]] = []
        self.changed_attributes: list[tuple[nn.Module, str, Any]] = []

    def __call__(self, x: Tensor, *context: Tensor) -> Tensor:
        """function(x, *context); x is not the caller's, so that the function may write into it."""
        given, version = sample(x), _version(x)
        watching = _watching.get()
        with torch.enable_grad() if watching else nullcontext(), _slow_path(self.needs_slow_path), self._stand_ins():
            y = self.run(x, *context)
        if not isinstance(y, Tensor):
            raise RevtrainError(
                f"{self.name} returned a {type(y).__name__}.\nExpected a tensor: wrap it in a module that returns one."
            )
        if watching and y.requires_grad:
            raise _foreign(self.name, y)
        self.writes_its_input |= _version(x) != version
        self.outputs.append((y.shape, y.dtype))
        taken = None if given is None else sample(y)
        self.samples.append(None if given is None or taken is None else (given, taken))
        return y

    def in_pieces(self, pieces: Iterable[Piece], read: Callable[[Piece], Tensor], *context: Tensor):
        """(piece, function(read(piece), *context)) for all `pieces`, one after the other.

        A function that changes a state of its own with each call is run once, on the whole batch.
        """
        self.pieces = list(pieces)
        start = 0
        if len(self.pieces) > 1:
            result = [self(read(self.pieces[0]), *context)]
            if self._keeps_a_state():
                result.clear()
                self._undo()
                self.pieces = [WHOLE]
            else:
                start = 1
                yield self.pieces[0], result.pop()
        for piece in self.pieces[start:]:
            yield piece, self(read(piece), *context)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        if not (self._places or self._counters):
            yield
            return
        with _SWAPPING:
            for place in self._places:
                place.held[place.name] = self._narrow[id(place.tensor)]
            for norm, _, counter in self._counters:
                norm._buffers["num_batches_tracked"] = cast(Tensor, counter)
            try:
                yield
            finally:
                for place in self._places:
                    place.held[place.name] = place.tensor
                for norm, tensor, _ in self._counters:
                    norm._buffers["num_batches_tracked"] = cast(Tensor, tensor)

    def end(self) -> FirstRun:
        """Let go of all that the runs have left as it was."""
        counted = [(tensor, counter.count) for _, tensor, counter in self._counters if counter.count]
        if counted:
            torch._foreach_add_(*map(list, zip(*counted, strict=True)))
        self._counters = []
        self._narrow, self._places = {}, []
        self.buffers, self.changed_attributes = list(self._changed_buffers()), list(self._changed_attributes())
        self._buffers, self._attributes = [], []
        if self.generators is not None and not self.generators.have_changed():
            self.generators = None
        return self

    def begin_again(self) -> FirstRun:
        """For a first run that nobody has recorded: buffers and generators are to be as they are now."""
        self._narrow, self._places = {}, []
        self.buffers = [(each, name, before) for each, name, _, _, before in self._buffers]
        self.changed_attributes = [
            (each, name, value)
            for each, before in zip(self.modules, self._attributes, strict=True)
            for name, value in before.items()
            if isinstance(value, SIMPLE) and name != "training"
        ]
        self._buffers, self._attributes = [], []
        return self

    def pure(self) -> FirstRun:
        """For an inverse without a forward pass: a run that draws random numbers or changes a state is refused."""
        self.must_be_pure = True
        return self.begin_again()

    def _changed_buffers(self) -> Iterator[tuple[nn.Module, str, Any]]:
        for each, name, tensor, version, before in self._buffers:
            if _version(tensor) != version or _may_have_changed(each, tensor, before):
                yield each, name, before
            elif each._buffers.get(name) is not tensor:
                yield each, name, tensor
        for each in self.modules:
            for name, late in each._buffers.items():
                if late is not None and (id(each), name) not in self._names:
                    yield each, name, ABSENT

    def _changed_attributes(self) -> Iterator[tuple[nn.Module, str, Any]]:
        for each, before in zip(self.modules, self._attributes, strict=True):
            now = vars(each)
            for name, value in before.items():
                if now.get(name, ABSENT) is not value and name != "training":
                    yield each, name, value
            if len(now) > len(before):
                for name in now.keys() - before.keys():
                    yield each, name, ABSENT

    def _keeps_a_state(self) -> bool:
        """Whether the first call has changed a buffer or a number of the function's."""
        written = any(
            _version(tensor) != version or each._buffers.get(name) is not tensor
            for each, name, tensor, version, _ in self._buffers
        )
        return (
            written
            or any(value is ABSENT for _, _, value in self._changed_buffers())
            or any(
                isinstance(value, SIMPLE) and isinstance(vars(each).get(name), SIMPLE)
                for each, name, value in self._changed_attributes()
            )
        )

    def _undo(self) -> None:
        """As if there had been no call yet."""
        for each, name, value in self._changed_buffers():
            if value is ABSENT:
                del each._buffers[name]
        for each, name, tensor, _, before in self._buffers:
            tensor.copy_(before)
            each._buffers[name] = tensor
        self._buffers = [
            (each, name, tensor, _version(tensor), before) for each, name, tensor, _, before in self._buffers
        ]
        for each, name, value in list(self._changed_attributes()):
            _put(vars(each), name, value)
        if self.generators is not None:
            self.generators.restore()
        self.outputs.clear()
        self.samples.clear()


def _may_write(module: nn.Module) -> bool:
    """Whether a module of a known kind writes into buffers that it may read."""
    return isinstance(module, _NormBase) and not takes_statistics(module) and module.training


def _may_have_changed(module: nn.Module, buffer: Tensor, before: Tensor) -> bool:
    """Whether a buffer may have been written to without a trace, as torch's batch norms write into their statistics."""
    if isinstance(buffer, FakeTensor) or buffer.is_meta:
        return isinstance(module, _NormBase)
    small = buffer.numel() <= SMALL_BUFFER
    return small and (buffer.device.type != "cpu" or not torch.equal(buffer, before))  # a GPU would have to wait


_watching: ContextVar[bool] = ContextVar("watching", default=False)


@contextmanager
def watching_for_gradients(watching: bool) -> Iterator[None]:
    """The block runs functions of which nothing known asks for a gradient: tensors from outside that do are refused."""
    token = _watching.set(watching)
    try:
        yield
    finally:
        _watching.reset(token)


# These have a faster way of their own where there is no graph, which rounds in another way.
_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_slow_paths = [0, True]  # how many wish for the slow path at the moment; what was set before


@contextmanager
def _slow_path(needed: bool) -> Iterator[None]:
    """Both runs go the way that the one with a graph goes. torch's switch is one for all threads."""
    if not needed:
        yield
        return
    with _SWAPPING:
        if not _slow_paths[0]:
            _slow_paths[1] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _slow_paths[0] += 1
    try:
        yield
    finally:
        with _SWAPPING:
            _slow_paths[0] -= 1
            if not _slow_paths[0]:
                torch.backends.mha.set_fastpath_enabled(bool(_slow_paths[1]))


def _foreign(name: str, leaf: Tensor) -> RevtrainError:
    return RevtrainError(
        f"{name} uses a tensor of shape {tuple(leaf.shape)} that asks for a gradient and is none of its parameters.\n"
        "Recomputed inside of a chain, it would not get one. Hand it over as a side input, chain(x, tensor), or make "
        "it a parameter of the module; detach() it where none is wanted."
    )


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
        narrow = narrow_weights(first.modules, first.device)
        self.leaves = [narrow.get(id(each), each).detach().requires_grad_() for each in wanted]
        self._leaf_of = narrow | {id(each): leaf for each, leaf in zip(wanted, self.leaves, strict=True)}
        self._now: Generators | None = None

    def __enter__(self) -> SecondRun:
        first = self.first
        with _SWAPPING:
            places = parameter_places(first.function) if self._leaf_of else []
        self._places = [place for place in places if id(place.tensor) in self._leaf_of]
        self._buffers = [
            (each, name, before if before is ABSENT else before.clone()) for each, name, before in first.buffers
        ]
        self._attributes = [
            *first.changed_attributes,
            *((each, "track_running_stats", False) for each in first.statistics),
        ]
        if first.generators is not None:
            self._now = first.generators.now()
            first.generators.restore()
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
        if self.first.statistics:
            return True
        drew = self.first.generators is not None and self.first.generators.have_changed()
        buffers = zip(self.first.buffers, self._buffers, strict=True)
        return (
            drew
            or any(
                before is not now and not torch.equal(before, cast(Tensor, now)) for (*_, before), (*_, now) in buffers
            )
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
        if y.grad_fn is not None and torch.is_grad_enabled():
            self._refuse_foreign_leaves(y, (x, *context))
        self.piece += 1
        return y

    def within(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """run(*inputs) with everything as it was at the first run, and leaves in the place of parameters."""
        with self._stand_ins(), _slow_path(self.first.needs_slow_path):
            return run(*inputs)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        swapped: list[tuple[dict[str, Any], str, Any]] = []

        def put(held: dict[str, Any], name: str, value: Any) -> None:
            swapped.append((held, name, held.get(name, ABSENT)))
            _put(held, name, value)

        with _SWAPPING:
            for place in self._places:
                put(place.held, place.name, self._leaf_of[id(place.tensor)])
            for each, name, value in self._attributes:
                put(vars(each), name, value)
            for each, name, buffer in self._buffers:
                put(each._buffers, name, buffer)
            try:
                yield
            finally:
                # the next piece goes on from what this one has left
                self._attributes = [(each, name, vars(each).get(name, ABSENT)) for each, name, _ in self._attributes]
                self._buffers = [(each, name, each._buffers.get(name, ABSENT)) for each, name, _ in self._buffers]
                for held, name, value in reversed(swapped):
                    _put(held, name, value)

    def _compare(self, given: Sample | None, y: Tensor) -> None:
        first = self.first
        shape, dtype = first.outputs[self.piece]
        if (y.shape, y.dtype) != (shape, dtype):
            raise RevtrainError(
                f"{first.name} returned {tuple(shape)} {dtype} in the forward pass and {tuple(y.shape)} {y.dtype} when "
                "it was recomputed.\n"
                "Expected the same function both times: docs/library.md says what a chain can restore."
            )
        before = first.samples[self.piece]
        if before is not None and given is not None:
            current, noise = current_pass(), difference(before[0], given)
            noise = noise if current is None else current.saw(noise)
            if difference(before[1], sample(y)) > tolerance(y.dtype, noise):
                raise something_else(first.name)

    def _refuse_foreign_leaves(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        """A gradient that would go nowhere must be impossible to overlook: the graph of y is known."""
        known = {*map(id, self.leaves), *map(id, inputs)}
        if y.grad_fn is None:
            if id(y) not in known:
                raise _foreign(self.first.name, y)
            return
        stack: list[Any] = [y.grad_fn]
        seen = set(stack)
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise _foreign(self.first.name, leaf)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)


def something_else(name: str) -> RevtrainError:
    """The error of a second run that was not the first one again."""
    return RevtrainError(
        f"{name} computed something else when it was recomputed from the same input.\n"
        "It depends on what a chain cannot see and restore: a random generator outside of its modules, a file, "
        "a clock, an object that counts.\n"
        "Make that a buffer or a number of the module, or hand it over as a side input: chain(x, tensor)."
    )


def tolerance(dtype: torch.dtype, noise: float) -> float:
    """By how much two runs may differ, relative, if their inputs differ by `noise`."""
    return TOLERANCES.get(dtype, 0.1) + NOISE_GAIN * noise


class Sample(NamedTuple):
    """What tells a tensor from others: two sums of a few of its values, with signs, and their size."""

    one: float
    other: float
    size: float


def sample(x: Tensor) -> Sample | None:
    """Of values from places that are evenly spread over the memory of x.

    None where there are no values (fake tensors, meta), and on a GPU, for which it would have to wait.
    """
    size = x.numel()
    if not (x.is_cpu and size and x.is_floating_point()) or isinstance(x, FakeTensor):
        return None
    x = x.detach() if x.requires_grad else x
    x = x if is_dense(x) else x.contiguous()
    # Four at a time lie in one line of the cache. In plain numbers: whoever counts live tensors would see further ones.
    rows = SAMPLED_VALUES // 4
    if size >= SAMPLED_VALUES:
        a, b, c, d = x.as_strided((rows, 4), (size // rows, 1)).tolist()
        values = [*a, *b, *c, *d]
    else:
        values = x.as_strided((size,), (1,)).tolist()
    return Sample(
        sum(map(operator.mul, _SIGNS[0], values)),
        sum(map(operator.mul, _SIGNS[1], values)),
        math.sqrt(sum(map(operator.mul, values, values))),
    )


def difference(a: Sample, b: Sample | None) -> float:
    """By how much two samples differ, relative to the first; 0 where one is not finite: nothing can be compared."""
    if b is None or not (math.isfinite(a.size) and math.isfinite(b.size)):
        return 0.0
    largest = max(abs(a.one - b.one), abs(a.other - b.other))
    return largest / a.size if a.size else float(largest > 0)
