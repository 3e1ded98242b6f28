"""Memory and time of one training step, side by side: revtrain, checkpointing, accumulation, other libraries.

    python scripts/benchmark_memory.py                          # everything, tables to docs/figures/
    python scripts/benchmark_memory.py --cases chain,chunked,memcnn --batch 32 --blocks 4
    python scripts/benchmark_memory.py --cases stack --norm hidden --out FOLDER
    pip install -e ".[bench]"                                   # MemCNN, RevTorch and revlib for the comparison

Stack cases: the same network, conv stem -> N reversible blocks -> sum over pixels, linear; the same F and G
(--norm input: BN, conv 3x3, ReLU, conv 3x3; --norm hidden: conv 3x3, BN, ReLU, conv 3x3) with the same weights,
trained by a different engine each. Arch cases: the whole
networks of revtrain, `invert` and `store`. Every case runs in a process of its own, next to a copy of the same
network under plain autograd (`store`), which all ratios and errors refer to. Sizes per pixel are slopes between
half the batch and the batch, so weights, their gradients and constant scratch fall out; see COLUMNS.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from revtrain.conf import compose
from revtrain.core.chain import InvertibleChain
from revtrain.core.state_format import PLAIN, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, Head, HiddenChunkCoupling, WideResidual
from revtrain.machine.device import DTYPES, autocast, choose_device, describe, synchronize
from revtrain.memory.live import LiveStorages
from revtrain.models import build_model, for_task, traits
from revtrain.models.chunked import residual
from revtrain.models.common import conv3x3

MIB = 2**20
IMAGE_SIZE, CLASSES = 32, 10
HIDDEN_CHUNKS = (4, 16)  # with --norm hidden: fewer hidden channels at a time, less memory, more time
COLUMNS = {
    "live_after_forward": "bytes per pixel alive after the forward pass, as live storages",
    "live_peak": "most bytes per pixel alive at any time of the step, as live storages",
    "allocator_peak": "the same as the allocator saw it, scratch inside kernels included (CPU: torch.profiler's "
    "allocation events, CUDA: max_memory_allocated)",
    "live_peak_mib": "the same in all at the full batch, weights and their gradients included",
    "time_ratio": "step time over that of `store`: median of the ratios of alternating pairs in one process",
    "bn_updates": "times that a step moves each BN's running statistics",
    "gradient_error": "|g - g_store| / |g_store| (Euclidean norms) of a parameter: the median over the parameters; for "
    "`store` itself, against `store` in float64",
    "gradient_error_max": "the largest of them. A hidden value so near zero that rounding moves it across the kink of "
    "the activation changes gradients by a jump, about 1e-3 here, in any engine and in `store` itself",
    "conv_forwards": "times that a step runs each convolution of the trunk forward over the whole batch",
    "conv_calls": "calls of aten.convolution + aten.convolution_backward in a step",
}
UNITS = {"live_after_forward": "B/px", "live_peak": "B/px", "allocator_peak": "B/px", "live_peak_mib": "MiB"}


@dataclass(frozen=True)
class Options:
    """What all cases share."""

    batch: int = 128
    blocks: int = 8
    channels: int = 32
    hidden: int = 32
    norm: str = "input"
    width: int = 16
    repeats: int = 7
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One row: how its network is made, and how the `store` network that it is compared with."""

    name: str
    group: str  # "stack" or "arch"
    label: str
    make: Callable[[Options], nn.Module]
    reference: Callable[[Options], nn.Module]
    micro_batches: int = 1
    norms: tuple[str, ...] = ("input", "hidden")  # where F and G may have their BN
    package: str | None = None  # on PyPI, where it is not torch's or ours
    baseline: bool = False  # this is `store` itself


@dataclass
class Row:
    """One measured case; None where there is nothing to say. Per-pixel figures in bytes, times in seconds."""

    case: str
    group: str
    label: str
    status: str = "ok"
    live_after_forward: float | None = None
    live_peak: float | None = None
    allocator_peak: float | None = None
    live_peak_mib: float | None = None
    step_seconds: float | None = None
    store_seconds: float | None = None
    time_ratio: float | None = None
    bn_updates: float | None = None
    gradient_error: float | None = None
    gradient_error_max: float | None = None
    conv_forwards: str | None = None
    conv_calls: str | None = None
    notes: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------------
# The networks


class Stack(nn.Module):
    """Images (B, 3, H, W) -> logits: stem, N pairs (F, G) run by the engine that `trunk` makes of them, head.

    The pairs are drawn before the engine exists, so one seed gives every engine the same weights, in the same
    order of `parameters()`.
    """

    # MemCNN, RevTorch and revlib recompute without the forward pass's autocast state (on the CPU at least) and fail
    # on mixed types. Their backward pass runs inside autocast: the one concession made to them.
    autocast_backward = False

    def __init__(self, options: Options, trunk: Callable[[list[tuple[nn.Module, nn.Module]], Options], nn.Module]):
        super().__init__()
        half = options.channels // 2
        self.stem = conv3x3(3, options.channels)
        self.head = Head(options.channels, CLASSES)
        make = partial(residual, activation="relu") if options.norm == "input" else WideResidual
        self.functions = nn.ModuleList(make(half, options.hidden) for _ in range(2 * options.blocks))
        self.trunk = trunk(list(zip(self.functions[::2], self.functions[1::2], strict=True)), options)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(images)))


def stream_of(options: Options) -> StateFormat:
    return PLAIN if options.precision == "fp32" else StateFormat("int16")


def couplings(pairs, options: Options, stream: StateFormat = PLAIN) -> list[nn.Module]:
    # In a Sequential F and G are modules like any other: recomputed and differentiated as a whole.
    return [AdditiveCoupling(options.channels, nn.Sequential(f), nn.Sequential(g), stream=stream) for f, g in pairs]


def trunk_store(pairs, options):
    return nn.Sequential(*couplings(pairs, options))


def trunk_chain(pairs, options):
    stream = stream_of(options)
    return InvertibleChain(couplings(pairs, options, stream), stream=stream, reuse_output=True)


def trunk_chunked(pairs, options, hidden_chunk=None):
    """Over chunks of the batch where BN comes first; else of the hidden channels, `hidden_chunk` at a time."""
    stream, blocks = stream_of(options), []
    for f, g in pairs:
        if hidden_chunk is None:
            blocks.append(AdditiveCoupling(options.channels, f, g, stream=stream, channels_last=True))
        else:
            block = HiddenChunkCoupling(options.channels, options.hidden, hidden_chunk=hidden_chunk, stream=stream)
            block.f, block.g = f, g
            blocks.append(block)
    return InvertibleChain(blocks, stream=stream, reuse_output=True)


class CheckpointEach(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def trunk_checkpoint(pairs, options):
    return CheckpointEach(*couplings(pairs, options))


class CheckpointSegments(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self, max(1, round(math.sqrt(len(self)))), x, use_reentrant=False)


def trunk_checkpoint_sqrt(pairs, options):
    return CheckpointSegments(*couplings(pairs, options))


def trunk_memcnn(pairs, options):
    import memcnn

    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in pairs))


def trunk_revtorch(pairs, options):
    import revtorch

    return revtorch.ReversibleSequence(nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in pairs))


def trunk_revlib(pairs, options):
    import revlib

    return revlib.ReversibleSequential(*(function for pair in pairs for function in pair))


def _chunked(hidden_chunk: int):
    return partial(trunk_chunked, hidden_chunk=hidden_chunk)


def make_stack(trunk, options: Options) -> nn.Module:
    torch.manual_seed(options.seed)
    stack = Stack(options, trunk).to(options.device)
    stack.autocast_backward = trunk in (trunk_memcnn, trunk_revtorch, trunk_revlib)
    return stack


def make_arch(arch: str, backward: str, options: Options) -> nn.Module:
    torch.manual_seed(options.seed)
    cfg = compose([f"arch={arch}", f"backward={backward}", f"width={options.width}", "data=synthetic"])
    return build_model(cfg, CLASSES, IMAGE_SIZE).to(options.device)


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order of the tables."""
    store = partial(make_stack, trunk_store)

    def stack(name, label, trunk, **more) -> Case:
        return Case(name, "stack", label, partial(make_stack, trunk), store, **more)

    cases = [
        stack("store", "plain autograd (`store`)", trunk_store, baseline=True),
        stack("checkpoint", "torch checkpoint, every block", trunk_checkpoint),
        stack("checkpoint_sqrt", "torch checkpoint, sqrt(N) segments", trunk_checkpoint_sqrt),
        stack("accumulate", "gradient accumulation, 4 micro-batches", trunk_store, micro_batches=4),
        stack("memcnn", "MemCNN InvertibleModuleWrapper", trunk_memcnn, package="memcnn"),
        stack("revtorch", "RevTorch ReversibleSequence", trunk_revtorch, package="revtorch"),
        stack("revlib", "revlib ReversibleSequential", trunk_revlib, package="revlib"),
        stack("chain", "revtrain AdditiveCoupling", trunk_chain),
        stack("chunked", "revtrain chunked: PreNorm over chunks of the batch", trunk_chunked, norms=("input",)),
        *(
            stack(
                f"chunked_k{k}",
                f"revtrain HiddenChunkCoupling, {k} hidden channels at a time",
                _chunked(k),
                norms=("hidden",),
            )
            for k in HIDDEN_CHUNKS
        ),
    ]
    for arch in for_task("classify"):
        arch_store = partial(make_arch, arch, "store")
        cases.append(Case(f"{arch}:store", "arch", f"{arch}, store", arch_store, arch_store, baseline=True))
        if traits(arch).reversible:
            cases.append(
                Case(f"{arch}:invert", "arch", f"{arch}, invert", partial(make_arch, arch, "invert"), arch_store)
            )
    return {case.name: case for case in cases}


# --------------------------------------------------------------------------------------------------------------------
# One step, and what is measured of it


def draw_batch(options: Options, batch: int) -> tuple[Tensor, Tensor]:
    """The same images (B, 3, H, W) and labels for every case."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return images.to(options.device, DTYPES[options.precision]), labels.to(options.device)


def run_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: Options,
    micro_batches: int = 1,
    after_forward: Callable[[], None] = lambda: None,
) -> None:
    """Forward and backward of the mean loss, without the optimizer; gradients start from none.

    The backward pass runs outside autocast, as torch advises, but for an engine that cannot.
    """
    device = torch.device(options.device)
    backward_precision = options.precision if getattr(model, "autocast_backward", False) else "fp32"
    model.zero_grad(set_to_none=True)
    micro_batches = min(micro_batches, len(images))
    for part, target in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        with autocast(device, options.precision):
            loss = F.cross_entropy(model(part), target) * (len(part) / len(images))
        after_forward()
        with autocast(device, backward_precision):
            loss.backward()


class ResizableStorages(LiveStorages):
    """`LiveStorages` that follows `storage.resize_` as well: MemCNN empties its inputs' storages by it, and no
    dispatch mode sees that."""

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int):
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._change(storage.nbytes() - self._sizes[storage._cdata])
                self._sizes[storage._cdata] = storage.nbytes()
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", followed)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exc):
        self._patch.stop()
        return super().__exit__(*exc)

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._sizes.setdefault(storage._cdata, storage.nbytes())
        super()._add(storage)

    def _remove(self, key: int, size: int) -> None:
        super()._remove(key, self._sizes.pop(key, size))


def live_bytes(case: Case, options: Options, batch: int) -> tuple[int, int]:
    """(after the forward pass, at the peak) of the second of two steps; weights and gradients included."""
    after: list[int] = []
    with ResizableStorages() as counter:
        model = case.make(options)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            images, labels = draw_batch(options, batch)
            counter.reset_peak()
            after.clear()
            run_step(model, images, labels, options, case.micro_batches, lambda: after.append(counter.live_bytes))
            peak = counter.peak_bytes
            del images, labels
    return max(after), peak


def allocator_peak_bytes(case: Case, options: Options, batch: int) -> int:
    """Most bytes that one step (batch included, weights not) holds at a time, as the allocator sees it."""
    device = torch.device(options.device)
    model = case.make(options)
    run_step(model, *draw_batch(options, batch), options, case.micro_batches)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_step(model, *draw_batch(options, batch), options, case.micro_batches)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_step(model, *draw_batch(options, batch), options, case.micro_batches)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class ConvolutionCounter(TorchDispatchMode):
    """Counts convolutions: `forward_calls`, `backward_calls`, and `work` (multiply-adds of the forward calls) by
    the storage of the weight, so that a convolution run in pieces counts as what it is in all."""

    def __init__(self):
        super().__init__()
        self.forward_calls = self.backward_calls = 0
        self.work: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            weight = args[1]
            self.forward_calls += 1
            key = weight.untyped_storage().data_ptr()
            self.work[key] = self.work.get(key, 0) + result.numel() * weight[0].numel()
        elif function is torch.ops.aten.convolution_backward.default:
            self.backward_calls += 1
        return result


def count_convolutions(model: nn.Module, options: Options, micro_batches: int = 1) -> ConvolutionCounter:
    """The convolutions of one step in float32: under autocast the weights would be copies, unknown by storage."""
    options = replace(options, precision="fp32")
    images, labels = draw_batch(options, options.batch)
    with ConvolutionCounter() as counter:
        run_step(model, images, labels, options, micro_batches)
    return counter


def trunk_convolutions(model: nn.Module) -> list[Tensor]:
    """The weights of the convolutions that an engine may run again; all of them where there is no engine."""
    if isinstance(model, Stack):
        roots = list(model.functions)
    else:
        roots = [m for m in model.modules() if isinstance(m, InvertibleChain)] or [model]
    weights = {id(p): p for root in roots for p in root.parameters() if p.ndim == 4}
    return list(weights.values())


def forward_passes(case: Case, options: Options) -> tuple[list[float], ConvolutionCounter]:
    """How often a step runs each convolution of the trunk forward: distinct values, sorted; and the counts."""
    reference, model = case.reference(options), case.make(options)
    plain, counted = count_convolutions(reference, options), count_convolutions(model, options, case.micro_batches)
    passes = set()
    for one, other in zip(trunk_convolutions(model), trunk_convolutions(reference), strict=True):
        work = counted.work.get(one.untyped_storage().data_ptr(), 0)
        passes.add(round(work / plain.work[other.untyped_storage().data_ptr()], 2))
    return sorted(passes), counted


def bn_updates(model: nn.Module, step: Callable[[], None]) -> list[float]:
    """How often `step` moves the running statistics of each BN of the model: distinct values, sorted.

    From the statistics themselves: k updates with momentum m pull a mean of far outside to (1 - m)^k of itself.
    This holds for any BN, also where a library's or our own keeps no num_batches_tracked.
    """
    far = 1e6
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    before = [m.running_mean.clone() for m in norms]
    for norm in norms:
        norm.running_mean.fill_(far)
    step()
    counts = set()
    for norm, mean in zip(norms, before, strict=True):
        pull = norm.running_mean.double().mean().item() / far
        counts.add(round(math.log(pull) / math.log(1 - norm.momentum), 2))
        norm.running_mean.copy_(mean)
    return sorted(counts)


def exact_step(model: nn.Module, images: Tensor, labels: Tensor, options: Options) -> None:
    """`run_step` in float64; the model stays in it."""
    run_step(model.double(), images.double(), labels, replace(options, precision="fp32"))


def gradient_errors(model: nn.Module, reference: nn.Module) -> list[float]:
    """|g - g_ref| / |g_ref| of every parameter, Euclidean norms, sorted; inf where a gradient is missing."""
    errors = []
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if q.grad is None or q.grad.norm() == 0:
            continue
        true = q.grad.double()
        errors.append(math.inf if p.grad is None else ((p.grad.double() - true).norm() / true.norm()).item())
    return sorted(errors)


def time_steps(
    step: Callable[[], None], reference_step: Callable[[], None], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """(seconds of a step, of the reference, ratio): medians over `repeats` pairs in alternating order."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(repeats + 1):  # the first pair warms up
        for which in (0, 1) if index % 2 else (1, 0):
            synchronize(device)
            start = time.perf_counter()
            (step, reference_step)[which]()
            synchronize(device)
            if index:
                times[which].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def time_in_turn(cases: list[Case], options: Options) -> list[tuple[Case, float, float]]:
    """(case, median seconds of a step, median ratio to the first case): all in this process, a step each in turn.

    What the machine does besides then hits all alike: the fairest comparison of times, if not of memory.
    """
    device = torch.device(options.device)
    images, labels = draw_batch(options, options.batch)
    steps = [partial(run_step, case.make(options), images, labels, options, case.micro_batches) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for index in range(options.repeats + 1):  # the first round warms up
        for step, found in zip(steps, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if index:
                found.append(time.perf_counter() - start)
    return [
        (case, statistics.median(found), statistics.median(a / b for a, b in zip(found, times[0], strict=True)))
        for case, found in zip(cases, times, strict=True)
    ]


def measure(case: Case, options: Options) -> Row:
    """Everything about one case, in this process."""
    row = Row(case.name, case.group, case.label)
    device = torch.device(options.device)
    if case.package and options.precision != "fp32":
        row.notes.append("backward pass inside autocast: outside, as torch advises, it fails on mixed types")
    half = max(1, options.batch // 2)
    pixels = (options.batch - half) * IMAGE_SIZE**2
    if not pixels:
        raise RevtrainError(f"batch={options.batch} has no slope.\nExpected 2 images or more.")
    (after_half, peak_half), (after, peak) = (live_bytes(case, options, size) for size in (half, options.batch))
    row.live_after_forward = (after - after_half) / pixels
    row.live_peak = (peak - peak_half) / pixels
    row.live_peak_mib = peak / MIB
    allocated_half, allocated = (allocator_peak_bytes(case, options, size) for size in (half, options.batch))
    row.allocator_peak = (allocated - allocated_half) / pixels

    passes, counted = forward_passes(case, options)
    row.conv_forwards = _range(passes)
    row.conv_calls = f"{counted.forward_calls} + {counted.backward_calls}"

    model, reference = case.make(options), case.reference(options)
    images, labels = draw_batch(options, options.batch)
    step = partial(run_step, model, images, labels, options, case.micro_batches)
    reference_step = partial(run_step, reference, images, labels, options)
    row.bn_updates = max(bn_updates(model, step), default=None)
    row.step_seconds, row.store_seconds, row.time_ratio = time_steps(step, reference_step, options.repeats, device)
    if case.baseline:
        exact_step(reference, images, labels, options)
    errors = gradient_errors(model, reference)
    row.gradient_error, row.gradient_error_max = statistics.median(errors), errors[-1]
    return row


def _range(values: list[float]) -> str:
    return "-".join(f"{value:g}" for value in sorted({values[0], values[-1]})) if values else ""


# --------------------------------------------------------------------------------------------------------------------
# One process per case


def missing_package(case: Case) -> str | None:
    """ "not installed: pip install X", or None."""
    if case.package is None:
        return None
    try:
        version(case.package)
    except PackageNotFoundError:
        return f"not installed: pip install {case.package}"
    return None


@contextmanager
def third_party_warnings(row_notes: list[str]) -> Iterator[None]:
    """Collect the warnings of other libraries, once each: they belong into the table, not into the terminal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for each in caught:
        note = f"{each.category.__name__}: {str(each.message).splitlines()[0][:160]}"
        if note not in row_notes:
            row_notes.append(note)


def measure_or_explain(case: Case, options: Options) -> Row:
    """`measure`, with the reason as status where the case cannot run."""
    row = Row(case.name, case.group, case.label, status=missing_package(case) or "ok")
    if row.status != "ok":
        return row
    notes: list[str] = []
    try:
        with third_party_warnings(notes):
            if case.package:
                importlib.import_module(case.package)
            row = measure(case, options)
    except Exception as error:  # of any library, on any version of torch: it belongs into the table
        row.status = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    row.notes += notes
    return row


def measure_in_subprocess(case: Case, options: Options) -> Row:
    """`measure_or_explain` in a fresh process: no case finds another's caches, threads or fragments."""
    job = json.dumps({"case": case.name, "options": asdict(options)})
    done = subprocess.run([sys.executable, __file__, "--worker", job], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Row(case.name, case.group, case.label, status=f"failed: exit status {done.returncode}: {last}")
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Tables


def shown(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None:
        return ""
    if column.startswith("gradient_error"):
        return "0" if value == 0 else f"{value:.1e}"
    if column == "time_ratio":
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 10 else f"{value:.3g}"
    return str(value)


def heading(column: str) -> str:
    """`live_peak_mib` -> "live peak (MiB)"."""
    words = column.removesuffix("_mib").replace("_", " ")
    return f"{words} ({UNITS[column]})" if column in UNITS else words


def markdown_table(rows: list[Row]) -> str:
    lines = ["| case | " + " | ".join(map(heading, COLUMNS)) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        if row.status == "ok":
            lines.append(f"| {row.label} | " + " | ".join(shown(row, column) for column in COLUMNS) + " |")
        else:
            lines.append(f"| {row.label} | {row.status.replace('|', '/')} |" + " |" * (len(COLUMNS) - 1))
    return "\n".join(lines)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("revtrain", "memcnn", "revtorch", "revlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from the source tree" if package == "revtrain" else "not installed"
    return found


def report(rows: list[Row], options: Options) -> str:
    """The Markdown page: settings, hardware, versions, both tables, what the columns mean, the libraries' notes."""
    device = describe(torch.device(options.device))
    hardware = f"{cpu_name()}, {device['cpu_threads']} threads" + (
        f", {device['title']}" if options.device != "cpu" else ""
    )
    parts = [
        "# Memory benchmark",
        f"Images 3 x {IMAGE_SIZE} x {IMAGE_SIZE}, batch {options.batch}, {options.precision}, {options.device}; "
        f"medians over {options.repeats} pairs.  \nHardware: {hardware}.  \nVersions: "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + ".",
    ]
    stack, arch = ([row for row in rows if row.group == group] for group in ("stack", "arch"))
    if stack:
        parts += [
            f"## The same {options.blocks} reversible blocks, c = {options.channels}, {options.hidden} hidden, "
            + ("BN at the input" if options.norm == "input" else "BN at the hidden channels"),
            markdown_table(stack),
        ]
    if arch:
        parts += [f"## Whole networks of width {options.width}, default depth", markdown_table(arch)]
    parts += ["## Columns", "\n".join(f"- **{heading(name)}**: {text}" for name, text in COLUMNS.items())]
    parts += [
        "Each row is a process of its own and is timed against a `store` copy of the same network in that process; "
        "the ratio of a `store` row to its own copy shows the noise. Gradient accumulation normalises every "
        "micro-batch by its own statistics: its gradient is that of another function, not an inexact one."
    ]
    notes = [f"- {row.label}: {note}" for row in rows for note in row.notes]
    if notes:
        parts += ["## Notes and warnings of the libraries", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def write_tables(rows: list[Row], options: Options, out: Path) -> list[Path]:
    """benchmark_memory.md and .csv in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "benchmark_memory.md", out / "benchmark_memory.csv"]
    paths[0].write_text(report(rows, options))
    with paths[1].open("w", newline="") as file:
        settings = {**asdict(options), **versions(), "cpu": cpu_name(), "threads": torch.get_num_threads()}
        writer = csv.DictWriter(file, [*asdict(rows[0]), *settings], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), "notes": "; ".join(row.notes), **settings})
    return paths


# --------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in {
        "batch": "images a step; the slope is taken from half of it",
        "blocks": "reversible blocks of the stack",
        "channels": "c, channels of the stack's stream, even",
        "hidden": "m, hidden channels of F and of G",
        "width": "width of the whole networks",
        "repeats": "timed pairs of steps; at least 7 for a figure to quote",
        "seed": "of weights and images",
    }.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--norm", choices=("input", "hidden"), default=defaults.norm, help="BN in F and G (input)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default=defaults.precision)
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda, cuda:1, auto (%(default)s)")
    parser.add_argument("--cases", default="all", help=f"names, or: all, stack, arch. Known: {', '.join(all_cases())}")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the tables (%(default)s)")
    parser.add_argument("--times", action="store_true", help="only time the cases, in turn in one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen_cases(names: str, norm: str = "input") -> list[Case]:
    """The cases called `names` (comma-separated; all, stack and arch stand for many), in the tables' order; of the
    groups only those that F and G allow with their BN at `norm`.

    Raises `RevtrainError` for a name that does not exist.
    """
    cases = all_cases()
    asked = {name.strip() for name in names.split(",") if name.strip()}
    unknown = asked - set(cases) - {"all", "stack", "arch"}
    if unknown or not asked:
        raise RevtrainError(
            f"--cases {names}: {', '.join(sorted(unknown)) or 'nothing'} is unknown.\n"
            f"Expected some of: all, stack, arch, {', '.join(cases)}."
        )
    return [
        case for case in cases.values() if case.name in asked or (asked & {"all", case.group} and norm in case.norms)
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        job = json.loads(args.worker)
        row = measure_or_explain(all_cases()[job["case"]], Options(**job["options"]))
        print(json.dumps(asdict(row)))
        return 0
    try:
        device = str(choose_device(args.device))
        options = Options(
            **{name: getattr(args, name) for name in asdict(Options()) if name != "device"}, device=device
        )
        cases = chosen_cases(args.cases, options.norm)
    except RevtrainError as error:
        print(error, file=sys.stderr)
        return 2
    if args.times:
        with third_party_warnings([]):
            timed = time_in_turn([case for case in cases if not missing_package(case)], options)
        print(
            "\n".join(f"{case.label:<52} {seconds:7.3f} s  {ratio:.3f} x the first" for case, seconds, ratio in timed)
        )
        return 0
    rows = []
    for case in cases:
        print(f"[{len(rows) + 1}/{len(cases)}] {case.label} ...", end=" ", flush=True)
        row = measure_in_subprocess(case, options)
        rows.append(row)
        print(
            row.status if row.status != "ok" else f"{row.live_peak:.0f} B/px, {row.time_ratio:.2f} x store", flush=True
        )
    print()
    print(report(rows, options))
    for path in write_tables(rows, options, args.out):
        print(f"written: {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
