"""The promise, checked on a model of the user's: `invert` computes what `store` computes, or what is wrong with it.

    report = revtrain.verify(model, images, loss=lambda y: F.cross_entropy(y, labels))
    print(report)           a short table
    assert report           for tests

Both modes run from the same weights, buffers and random numbers. What they leave behind is compared: results, gradients
of all tensors that get one in `store` (also of those that the model does not know), buffers, random numbers; and every
input of a layer that was rebuilt with what it was. In float64, where rounding is no excuse, a sound model agrees to
about ten digits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from revtrain.core.chain import InvertibleChain, observe
from revtrain.core.layer import InvertibleLayer
from revtrain.core.recompute import SIMPLE, Generators, held_generators
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB
from revtrain.memory.live import LiveStorages

# Relative errors that are still taken for rounding. Layer-wise chains amplify it: a fault is smaller only in float64.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}
# A gradient this much smaller than the model's largest is held to that: one that is 0 but for rounding has no digits.
SMALL_GRADIENT = 1e-3
MOST_ROWS, MOST_OF_A_KIND = 16, 5  # what is printed of a table and of findings


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    kind    "error" (what a mode raised), "output", "gradient", "missing gradient", "rebuild",
            "state" (buffers, attributes, random numbers), "statistics" (of a norm, not updated once),
            "non-determinism", "numbers" (that are not finite)
    module  where: a dotted path as in `named_modules()` or `named_parameters()`, "input 0", or "" for the whole model
    """

    kind: str
    module: str
    text: str


@dataclass(frozen=True)
class Cost:
    """Of a forward and backward pass; None if it raised.

    `peak_bytes`: of live tensors, without the model and its inputs.
    """

    seconds: float | None
    peak_bytes: int | None


@dataclass
class Verification:
    """What `verify` has found; true where nothing is wrong.

    layers, gradients   path of a layer -> relative error of its rebuilt input; name of a parameter or input -> relative
                        error of its gradient (infinite where it is missing)
    store, invert       what the two modes cost
    """

    tolerance: float
    findings: list[Finding] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # path of a layer -> its class
    store: Cost = Cost(None, None)
    invert: Cost = Cost(None, None)

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        count = len(self.findings)
        lines = ["invert is store, to rounding" if self else f"{count} finding{'s' if count > 1 else ''}"]
        of_kind: dict[str, int] = {}
        for each in self.findings:
            of_kind[each.kind] = of_kind.get(each.kind, 0) + 1
            if of_kind[each.kind] <= MOST_OF_A_KIND:
                first, *rest = each.text.splitlines()
                lines.append(f"  {each.kind}{f', {each.module}' if each.module else ''}: {first}")
                lines += [f"      {line}" for line in rest]
        for kind, found in of_kind.items():
            if found > MOST_OF_A_KIND:
                lines.append(f"  ... and {found - MOST_OF_A_KIND} more of the kind: {kind}")
        rows = [(path, self.kinds[path], self.layers.get(path), self._gradient_of(path)) for path in self.kinds]
        shown = sorted(rows, key=lambda row: -max(_rank(row[2]), _rank(row[3])))[:MOST_ROWS]
        width = max([len("largest error in"), *(len(f"{path} {kind}") for path, kind, *_ in shown)])
        lines += ["", f"{'relative errors':{width}}  {'input rebuilt':>13}  {'gradients':>9}"]
        for path, kind, rebuilt, gradient in [row for row in rows if row in shown]:
            lines.append(f"{f'{path} {kind}':{width}}  {_digits(rebuilt):>13}  {_digits(gradient):>9}")
        if len(rows) > len(shown):
            lines.append(f"... and {len(rows) - len(shown)} layers with smaller ones")
        elsewhere = [e for name, e in self.gradients.items() if not any(_is_in(name, path) for path in self.kinds)]
        if elsewhere:
            lines.append(f"{'all else, inputs':{width}}  {'':>13}  {_digits(max(elsewhere)):>9}")
        lines += ["", f"{'':7}{'store':>11}{'invert':>11}"]
        lines.append(f"{'time':7}{_milliseconds(self.store):>11}{_milliseconds(self.invert):>11}")
        lines.append(f"{'memory':7}{_mib(self.store):>11}{_mib(self.invert):>11}")
        return "\n".join(lines)

    def _gradient_of(self, path: str) -> float | None:
        return max((error for name, error in self.gradients.items() if _is_in(name, path)), default=None)


def verify(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, tolerance: float | None = None
) -> Verification:
    """Compare `invert` with `store` on one batch: gradients, rebuilt activations, state, time and memory.

    Six forward and backward passes, three of them with all activations stored; use a small batch. The model is left as
    it was: weights, `.grad`, buffers, random numbers, attributes. (Objects that it holds and changes, such as lists,
    cannot be put back; lazy modules are materialised.) Training or evaluation mode and autocast are the caller's.

    Args:
        model: contains `InvertibleChain`s; what their `backward` is does not matter. Of `DistributedDataParallel`, the
            module inside.
        inputs: of the model, on its device. All of them in floating point are given a gradient.
        loss: from the model's result to a number. None: a fixed linear function of all tensors in it.
        tolerance: the largest relative error that is taken for rounding. None: 1e-6 in float64, 1e-2 in float32, 0.2 in
            16 bit. Only float64, as in `verify(model.double(), x.double())`, tells small faults from noise.

    Raises:
        RevtrainError: there is no chain, or nothing in the result depends on a parameter or input.
        Exception: what `store`, which is ordinary autograd, raises.
    """
    chains = {path: each for path, each in model.named_modules() if isinstance(each, InvertibleChain)}
    if not chains:
        raise RevtrainError(
            f"verify was given a {type(model).__name__} without an InvertibleChain.\n"
            "Expected a model that has at least one: there is nothing to compare."
        )
    if any(is_lazy(each) for each in [*model.parameters(), *model.buffers()]):
        with torch.no_grad(), _backward_mode(chains, "store"):
            model(*inputs)
    if tolerance is None:
        tolerance = max((TOLERANCES.get(dtype, 1e-6) for dtype in _dtypes(model, inputs)), default=1e-6)
    report = Verification(tolerance)
    _Comparison(model, chains, inputs, loss or linear_loss, report).run()
    return report


def linear_loss(result: Any) -> Tensor:
    """A fixed linear function of every floating-point tensor in `result`; no two values weigh alike."""
    total: Any = 0.0
    for y in tree_leaves(result):
        if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()):
            y = (torch.view_as_real(y) if y.is_complex() else y).flatten()
            y = y if y.dtype == torch.float64 else y.float()
            total = total + y @ torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device).cos()
    return total


# ---- one run -------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What a forward and backward pass leaves behind."""

    results: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    foreign: dict[str, Tensor] = field(default_factory=dict)  # leaves of the graph that the model does not know
    state: dict[str, Any] = field(default_factory=dict)  # see `_Snapshot.state`
    generators: Generators | None = None
    entered: dict[str, list[Tensor]] = field(default_factory=dict)  # path of a layer -> its inputs, call by call
    rebuilt: list[tuple[str, float]] = field(default_factory=list)  # path of a layer, error; in the order of the walk
    error: Exception | None = None
    seconds: float = 0.0


class _Comparison:
    """The runs in both modes, and what they differ in."""

    def __init__(
        self,
        model: nn.Module,
        chains: dict[str, InvertibleChain],
        inputs: tuple[Any, ...],
        loss: Callable[[Any], Tensor],
        report: Verification,
    ):
        self.model, self.chains, self.inputs, self.loss, self.report = model, chains, inputs, loss, report
        self.modules = dict(model.named_modules())
        self.layers: dict[nn.Module, str] = {
            layer: f"{path}.layers.{index}".lstrip(".")
            for path, chain in chains.items()
            for index, layer in enumerate(chain.layers)
        }
        report.kinds = {path: type(layer).__name__ for layer, path in self.layers.items()}
        tensors = [*model.parameters(), *model.buffers(), *_tensors(inputs)]
        self.devices = list({x.device for x in tensors})
        self.before = _Snapshot(model, self.devices)
        self.foreign: dict[str, Tensor] | None = None  # None: still to be found

    def run(self) -> None:
        """Fill the report in; the model is as before afterwards."""
        try:
            store = self._pass("store", watch=True)
            self.foreign = store.foreign
            invert = self._pass("invert", watch=True)
            self._errors(store, invert)
            self.report.store = self._again("store", store)
            if store.error is None and invert.error is None:
                if self._results(store, invert):
                    self._rebuilt(invert)
                    self._gradients(store, invert)
                self._state(store, invert)
            self.report.invert = self._again("invert", invert)
        finally:
            self.before.restore()

    def _pass(self, mode: str, watch: bool = False, live: LiveStorages | None = None) -> _Run:
        """One forward and backward pass in this mode, from the state of before."""
        self.before.restore()
        run = _Run()
        watcher = _Watcher(self.layers, self.chains, run)
        inputs, leaves = _fresh(self.inputs)
        with ExitStack() as stack:
            stack.enter_context(_backward_mode(self.chains, mode))
            stack.enter_context(torch.enable_grad())
            if watch:
                stack.enter_context(observe(self.model, watcher) if mode == "invert" else watcher.hooks())
            _synchronise(self.devices)
            start = time.perf_counter()
            try:
                if live is None:
                    self._step(run, inputs, leaves, retain=True)
                else:
                    with live:
                        for each in (*self.model.parameters(), *self.model.buffers(), *_tensors(inputs)):
                            each.detach()  # seen now: what is there in any case
                        there = live.live_bytes
                        self._step(run, inputs, leaves, retain=bool(self.foreign))
                    live.peak_bytes -= there
            except Exception as error:
                run.error = error
            _synchronise(self.devices)
            run.seconds = time.perf_counter() - start
        run.state, run.generators = self.before.state(), self.before.generators.now()
        return run

    def _step(self, run: _Run, inputs: Any, leaves: dict[str, Tensor], retain: bool) -> None:
        # the model may write into its inputs, but not into leaves of the graph
        result = self.model(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))
        run.results = [y.detach() for y in _tensors(result)]
        loss = self.loss(result)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise RevtrainError(
                "verify: the loss depends on no parameter or input that asks for a gradient.\n"
                "Expected a number computed from the model's result by operations of torch."
            )
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad} | leaves
        if self.foreign is None:
            known = {id(each) for each in wanted.values()}
            found = [leaf for leaf in _leaves_of(loss) if id(leaf) not in known]
            run.foreign = {f"tensor {i} from outside, {tuple(leaf.shape)}": leaf for i, leaf in enumerate(found)}
        wanted |= run.foreign if self.foreign is None else self.foreign
        # The graph of a tensor from outside belongs to somebody else: it must not be freed.
        gradients = torch.autograd.grad(loss, list(wanted.values()), retain_graph=retain, allow_unused=True)
        run.gradients = dict(zip(wanted, gradients, strict=True))

    # -- what they differ in

    def _find(self, kind: str, module: str, text: str) -> None:
        self.report.findings.append(Finding(kind, module, text))

    def _close(self, error: float) -> bool:
        return error <= self.report.tolerance

    def _errors(self, store: _Run, invert: _Run) -> None:
        """A mode that raised is a finding; what plain autograd raises by itself is the caller's."""
        if store.error is not None and not any(isinstance(run.error, RevtrainError) for run in (store, invert)):
            raise store.error
        for mode, run in (("store", store), ("invert", invert)):
            if run.error is not None and not (mode == "invert" and str(run.error) == str(store.error)):
                text = str(run.error) or type(run.error).__name__
                self._find("error", self._place(run.error), f"{mode} raised: {text}")

    def _place(self, error: Exception) -> str:
        """The innermost module of the model that the error came through."""
        paths = {module: path for path, module in self.modules.items()}
        place, trace = "", error.__traceback__
        while trace is not None:
            holder = trace.tb_frame.f_locals.get("self")
            first = getattr(holder, "first", None)
            for each in (holder, getattr(holder, "function", None), getattr(first, "function", None)):
                if isinstance(each, nn.Module):
                    place = paths.get(each, place)
            trace = trace.tb_next
        return place

    def _again(self, mode: str, first: _Run) -> Cost:
        """Twice more: for the time and for the memory, and to see whether a mode agrees with itself."""
        if first.error is not None:
            return Cost(None, None)
        second, live = self._pass(mode), LiveStorages()
        measured = self._pass(mode, live=live)
        self._determinism(mode, first, second)
        return Cost(
            None if second.error else second.seconds,
            None if measured.error else live.peak_bytes,
        )

    def _determinism(self, mode: str, first: _Run, second: _Run) -> None:
        if second.error is not None:
            # A wrong inverse is refused where nobody measures what it gives, as the first time.
            self._find("error", self._place(second.error), f"{mode} raised the second time: {second.error}")
            return
        if mode == "store":  # a tensor that the model makes anew each time is nobody's
            self.foreign = {
                name: leaf for name, leaf in first.foreign.items() if second.gradients.get(name) is not None
            }
        names = [name for name in first.gradients if name not in first.foreign or name in (self.foreign or {})]
        true = {name: first.gradients[name] for name in names}
        errors = self._errors_of_gradients(second.gradients, true)
        errors[""] = max(map(_error, second.results, first.results), default=0.0)
        worst = "" if not self._close(errors[""]) else max(errors, key=errors.__getitem__)
        if not self._close(errors[worst]):
            self._find(
                "non-determinism",
                worst,
                f"the {'gradient' if worst else 'result'} of {mode} is another one the second time, by "
                f"{errors[worst]:.1e}, from the same state.\nSomething takes part that nobody can restore: a generator "
                "in a closure, a clock, a file, a list that grows.",
            )

    def _results(self, store: _Run, invert: _Run) -> bool:
        """Both modes compute the same function; if not, where they part. False: there is nothing to compare further."""
        comparable = True
        for index, (ours, true) in enumerate(zip(invert.results, store.results, strict=False)):
            which = "the result" if len(store.results) == 1 else f"tensor {index} of the result"
            if not _is_finite(true) and not _is_finite(ours):
                self._find("numbers", "", f"{which} is not finite in store either: nothing can be compared")
                comparable = False
            elif not self._close(error := _error(ours, true)):
                self._find("output", self._parting(store, invert), f"{which} differs from store's by {error:.1e}")
        return comparable

    def _parting(self, store: _Run, invert: _Run) -> str:
        """The layer after which the two modes differ, as far as the inputs of layers tell."""
        passed: list[str] = []
        for path, true in store.entered.items():
            ours = invert.entered.get(path, [])
            if len(ours) == len(true) and not self._close(max(map(_error, ours, true))):
                beside = [each for each in passed if _chain_of(each) == _chain_of(path)]
                return (beside or passed or [path])[-1]
            passed.append(path)
        outermost = [path for path in passed if not any(_is_in(path, other) for other in passed if other != path)]
        return outermost[-1] if outermost else ""

    def _rebuilt(self, invert: _Run) -> None:
        """Of each chain, the first layer whose input was rebuilt wrongly: those before it cannot be right, then."""
        blamed = set()
        for path, error in invert.rebuilt:
            self.report.layers[path] = max(error, self.report.layers.get(path, 0.0))
            if not self._close(error) and _chain_of(path) not in blamed:
                blamed.add(_chain_of(path))
                text = f"{self.report.kinds[path]} rebuilds an input that is off by {error:.1e}"
                self._find("rebuild", path, f"{text}: is its inverse that of its forward?{self._noise()}")

    def _gradients(self, store: _Run, invert: _Run) -> None:
        foreign = self.foreign or {}
        true = {name: g for name, g in store.gradients.items() if name not in store.foreign or name in foreign}
        self.report.gradients = self._errors_of_gradients(invert.gradients, true)
        for name, error in self.report.gradients.items():
            expected, actual = true[name], invert.gradients[name]
            if expected is not None and not _is_finite(expected) and actual is not None and not _is_finite(actual):
                self._find("numbers", name, "its gradient is not finite in store either: nothing can be compared")
            elif self._close(error):
                continue
            elif expected is not None and (actual is None or not actual.any()):
                hint = "\nHand it over as a side input: chain(x, tensor)." if name in foreign else ""
                self._find("missing gradient", name, f"in store it has one, of size {_rms(expected):.1e}{hint}")
            else:
                self._find("gradient", name, f"off by {error:.1e}{self._noise()}")

    def _noise(self) -> str:
        if self.report.tolerance <= TOLERANCES[torch.float64]:
            return ""
        return "\nRounding alone may do this to deep chains: in float64, verify(model.double(), ...) tells."

    def _errors_of_gradients(
        self, ours: Mapping[str, Tensor | None], true: Mapping[str, Tensor | None]
    ) -> dict[str, float]:
        largest = max((_rms(each) for each in true.values() if each is not None and _is_finite(each)), default=0.0)
        errors = {}
        for name, expected in true.items():
            actual = ours.get(name)
            if expected is None or actual is None:
                there = expected if actual is None else actual
                errors[name] = math.inf if there is not None and there.any() else 0.0
            else:
                errors[name] = _error(actual, expected, SMALL_GRADIENT * largest)
        return errors

    def _state(self, store: _Run, invert: _Run) -> None:
        for path in {**store.state, **invert.state}:
            before, true, ours = (each.get(path) for each in (self.before.known, store.state, invert.state))
            if _moved_alike(before, true, ours, self.report.tolerance):
                continue
            module = self.modules.get(path.rpartition(".")[0])
            name = type(module).__name__
            changed = [each for each in (before, true, ours) if isinstance(each, Tensor)]
            if hasattr(module, "running_mean") and len(changed) == 3:
                truly, moved = (_distance(each, changed[0]) for each in changed[1:])
                far = f"{moved / truly:.3g} times as far as in store" if truly else "and does not in store"
                self._find("statistics", path, f"{name}: it moves {far}; a norm is updated once a step")
            else:
                self._find("state", path, f"{name}: {_brief(ours)} after invert, {_brief(true)} after store")
        if store.generators is not None and invert.generators is not None:
            store.generators.restore()
            if invert.generators.have_changed():
                self._find("state", "", "random numbers go on from another place after invert than after store")


def _chain_of(path: str) -> str:
    """Of the path of a layer, that of the chain it is in, with `layers` at its end."""
    return path.rpartition(".")[0]


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


# ---- watching ------------------------------------------------------------------------------------


class _Watcher:
    """Keeps what enters every layer, and compares with it what the backward pass rebuilds (see `observe`)."""

    def __init__(self, layers: Mapping[nn.Module, str], chains: Mapping[str, InvertibleChain], run: _Run):
        self.layers, self.chains, self.run = layers, chains, run
        self.to_come: dict[str, list[Tensor]] = {}

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        path = self.layers.get(layer)
        if path is None:  # of a replica
            return
        self.to_come.setdefault(path, []).append(x.detach().clone())
        chain = self.chains[_chain_of(path).removesuffix("layers").rstrip(".")]
        floating = x.detach().clone() if x.is_floating_point() else chain.state_format.decode(x)
        self.run.entered.setdefault(path, []).append(floating)

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        path = self.layers.get(layer)
        if path is not None and self.to_come.get(path):
            self.run.rebuilt.append((path, _error(x.detach(), self.to_come[path].pop())))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The same under ordinary autograd, where a chain calls its layers as modules."""
        hooks = [
            layer.register_forward_pre_hook(lambda module, inputs: self.on_input(module, inputs[0]))
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _backward_mode(chains: Mapping[str, InvertibleChain], mode: str) -> Iterator[None]:
    before = [(chain, chain.backward_mode) for chain in chains.values()]
    for chain, _ in before:
        chain.backward_mode = mode
    try:
        yield
    finally:
        for chain, former in before:
            chain.backward_mode = former


# ---- the state of a model ------------------------------------------------------------------------


class _Snapshot:
    """Weights, buffers, attributes and random numbers of a model at one moment."""

    TABLES = ("_parameters", "_buffers", "_modules")

    def __init__(self, model: nn.Module, devices: list[torch.device]):
        self.modules = dict(model.named_modules())
        held = [module.__dict__ for module in self.modules.values()]
        self.tables = [(each[name], dict(each[name])) for each in held for name in self.TABLES]
        self.attributes = [(each, {k: v for k, v in each.items() if k not in self.TABLES}) for each in held]
        self.values = [(each, each.detach().clone()) for each in (*model.parameters(), *model.buffers())]
        self.value_of = {id(each): value for each, value in self.values}
        self.generators = Generators(devices, held_generators(list(self.modules.values())))
        self.known = self.state()

    def state(self) -> dict[str, Any]:
        """Path -> a buffer (a copy), a simple attribute, or what has become of a parameter."""
        state: dict[str, Any] = {}
        for path, module in self.modules.items():
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                value = self.value_of.get(id(parameter))
                changed = value is not None and parameter is not None and not _same_values(parameter, value)
                replaced = value is None and parameter is not None
                state[prefix + name] = "another tensor" if replaced else "other values" if changed else "as it was"
            for name, buffer in module._buffers.items():
                if buffer is not None and not (name == "overflows" and isinstance(module, InvertibleLayer)):
                    state[prefix + name] = buffer.detach().clone()
            for name, value in vars(module).items():
                if isinstance(value, SIMPLE) and name != "backward_mode":
                    state[prefix + name] = value
        return state

    def restore(self) -> None:
        """Put everything back."""
        for table, entries in self.tables:
            table.clear()
            table.update(entries)
        for attributes, entries in self.attributes:
            for name in [name for name in attributes if name not in entries and name not in self.TABLES]:
                del attributes[name]
            attributes.update(entries)
        with torch.no_grad():
            for tensor, value in self.values:
                if not _same_values(tensor, value):
                    tensor.copy_(value)
        self.generators.restore()


def _same_values(a: Tensor, b: Tensor) -> bool:
    return bool((a == b).all()) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _moved_alike(before: Any, true: Any, ours: Any, tolerance: float) -> bool:
    """Whether both runs have changed a piece of state in the same way: measured by how far it has moved."""
    if not isinstance(true, Tensor) or not isinstance(ours, Tensor):
        return type(true) is type(ours) and bool(true == ours)
    if true.shape != ours.shape or true.dtype != ours.dtype:
        return False
    if not true.is_floating_point():
        return torch.equal(true, ours)
    moved = _distance(true, before) if isinstance(before, Tensor) and before.shape == true.shape else 0.0
    rounding = 10 * torch.finfo(true.dtype).eps * math.sqrt(true.numel()) * (_rms(true) + 1)
    return _error(ours, true) == 0 or _distance(ours, true) <= tolerance * moved + rounding


# ---- numbers -------------------------------------------------------------------------------------


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _fresh(inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """A copy of the inputs, and those that are given a gradient, by name."""
    leaves: dict[str, Tensor] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        if x.is_floating_point() or x.is_complex():
            leaves[f"input {len(leaves)}"] = x.requires_grad_()
        return x

    return tree_map(copy, inputs), leaves


def _leaves_of(y: Tensor) -> list[Tensor]:
    """All tensors that the gradient of y arrives at."""
    found: dict[int, Tensor] = {}
    stack: list[Any] = [y.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        following = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(following)
        stack += following
    return list(found.values())


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).norm().item()


def _error(actual: Tensor, true: Tensor, least_rms: float = 0.0) -> float:
    """|actual - true| / |true|, where the root mean square of `true` counts as `least_rms` at least; in float64."""
    if actual.shape != true.shape:
        return math.inf
    if true.is_complex():
        actual, true = torch.view_as_real(actual), torch.view_as_real(true)
    if not _is_finite(true) or not _is_finite(actual):
        return 0.0 if bool(((actual == true) | (actual.isnan() & true.isnan())).all()) else math.inf
    distance = _distance(actual, true)
    size = max(_rms(true), least_rms) * math.sqrt(true.numel())
    return distance / size if size else (math.inf if distance else 0.0)


def _dtypes(model: nn.Module, inputs: Any) -> set[torch.dtype]:
    """In which the model computes."""
    tensors = [x for x in (*model.parameters(), *model.buffers(), *_tensors(inputs)) if x.is_floating_point()]
    kinds = {x.device.type for x in tensors}
    cast = {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return {x.dtype for x in tensors} | cast


def _synchronise(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return str(value.tolist()) if value.numel() <= 4 else f"{tuple(value.shape)} of size {_rms(value):.6g}"


def _rank(error: float | None) -> float:
    return -1.0 if error is None else error


def _digits(error: float | None) -> str:
    return "-" if error is None else "missing" if math.isinf(error) else f"{error:.1e}"


def _milliseconds(cost: Cost) -> str:
    return "-" if cost.seconds is None else f"{1000 * cost.seconds:.1f} ms"


def _mib(cost: Cost) -> str:
    return "-" if cost.peak_bytes is None else f"{cost.peak_bytes / MIB:.2f} MiB"
