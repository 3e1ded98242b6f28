"""What a GPU makes of revtrain: is it right, does it keep to its plan, how fast is it, and beside others?

    python scripts/gpu_check.py                          # everything within 240 s: a table, outputs/gpu_check.json
    python scripts/gpu_check.py --budget 60 --parts memory,speed --batch 256 --output FOLDER/check.json

The parts, each of which survives the failure of another:

    operators   every operator of the engine on the device against its specification on the CPU
    gradients   invert against store: are the logits the same bits, how far apart are the gradients
    memory      the plan against what a training step allocates and reserves
    speed       a training step: invert, store, store under torch.compile
    launches    of a step: counted beforehand, seen by the profiler, and the share of the time that the GPU is busy
    rivals      checkpointing, accumulation, MemCNN, RevTorch, revlib and revtrain around the same F and G
    limit       20 steps of a real run under memory_limit=500MiB

Without CUDA the same code runs with small sizes, and says what can be counted: no times, no allocator.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revtrain import data, kernels, models
from revtrain.conf import compose
from revtrain.config import Config, read
from revtrain.machine import device as devices
from revtrain.memory.live import LiveStorages
from revtrain.numerics.gradients import compare
from revtrain.numerics.probing import loss_gradients, on_the_side, storing
from revtrain.planning import plan as planning
from revtrain.training.run import train
from revtrain.training.step import WARM_UP, Step

MIB = 2**20
CLASSES, IMAGE_SIZE = 10, 32
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
REPEATS = 5
LIMIT = "500MiB"
ARCHITECTURES = ("chunked", "hybrid", "layerwise", "revnet", "irevnet", "resnet18")


@dataclass
class Part:
    """What was found; rows have one key a column."""

    name: str
    status: str = "ok"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Check:
    """One call of the script.

    Args:
        device: cuda, or cpu for the counted columns.
        budget: seconds; cases that would begin later are left out, and say so.
        batch: images of a step.
        words: for every network. archs: of those that are looked at.
    """

    def __init__(self, device: torch.device, budget: float, batch: int, words: tuple[str, ...], archs: tuple[str, ...]):
        self.device, self.batch, self.repeats, self.words, self.archs = device, batch, REPEATS, words, archs
        self.on_gpu = device.type == "cuda"
        self.budget, self.started = budget, time.perf_counter()
        self.parts: list[Part] = []

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def run(self, name: str, share: float) -> None:
        """One part, in at most its share of the seconds that are left."""
        part, begin = Part(name), time.perf_counter()
        self.parts.append(part)
        self.until = begin + share * max(0.0, self.left())
        try:
            PARTS[name](self, part)
        except Exception as error:
            part.status = _explained(error)
            traceback.print_exc()
        wrong = [row for row in part.rows if str(row.get("status", "ok")).startswith(("failed", "WRONG"))]
        if wrong and part.status == "ok":
            part.status = f"{len(wrong)} of {len(part.rows)} failed"
        part.seconds = round(time.perf_counter() - begin, 1)
        _forget(self.device)
        print(table(part), flush=True)

    def case(self, part: Part, measure: Callable[..., dict[str, Any]], *args: Any, **named: Any) -> None:
        """A row of a part: what it is called, and what `measure(*args)` finds or why it does not."""
        if time.perf_counter() > self.until:
            part.rows.append({**named, "status": "left out: the time is up"})
            return
        try:
            found: dict[str, Any] = measure(*args)
        except Exception as error:  # each case is on its own
            found = {"status": _explained(error)}
        part.rows.append({**named, **found})
        _forget(self.device)

    # ---- what several parts need ---------------------------------------------------------------------

    def config(self, arch: str, precision: str, backward: str = "invert", **more: Any) -> Config:
        words = [f"arch={arch}", f"precision={precision}", f"backward={backward}", f"batch={self.batch}", *self.words]
        config = read(compose(["data=synthetic", *words, *(f"{key}={value}" for key, value in more.items())]))
        return planning.on_device(config, self.device)

    def step(self, config: Config) -> Step:
        """A step of training on this device; its images lie outside of its memory."""
        torch.manual_seed(0)
        model = devices.place(models.build(config.network, models.Images(CLASSES, IMAGE_SIZE)), self.device)
        images = torch.randint(0, 256, (2 * self.batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        split = data.Split(images, torch.randint(0, CLASSES, (len(images),)))
        dataset = data.Dataset(split, split, tuple("0123456789"), torch.full((3,), 0.5), torch.full((3,), 0.25))
        return Step(model.train(), config, self.batch, dataset, self.device)

    def steps(self, step: Step, count: int) -> Tensor:
        """So many steps; the last loss."""
        loss = step.loss
        for index in range(count):
            picked = torch.arange(self.batch) + index % 2 * self.batch
            loss, _ = step(picked, 0.01)
        return loss

    def seconds(self, step: Step) -> float | None:
        """A step takes, when it is warm; None without a GPU."""
        self.steps(step, WARM_UP + 2 if self.on_gpu else 1)
        if not self.on_gpu:
            return None
        found = []
        for _ in range(self.repeats):
            devices.synchronize(self.device)
            begin = time.perf_counter()
            self.steps(step, 3)
            devices.synchronize(self.device)
            found.append((time.perf_counter() - begin) / 3)
        return statistics.median(found)


def _is_reversible(arch: str) -> bool:
    return models.traits(arch).reversible


def _explained(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {text}"[:160]


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- operators -------------------------------------------------------------------------------------------


def operators(check: Check, part: Part) -> None:
    for name, function, make in operator_cases():
        check.case(part, partial(operator, check, function, make), operator=name)


def operator(check: Check, function: Callable[..., Any], make: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
    """The same call here and there: the largest difference, relative to the largest value, in units of the type."""
    expected = _tensors(function(*make()))
    given = tuple(each.to(check.device) if isinstance(each, Tensor) else each for each in make())
    got = [each.cpu() for each in _tensors(function(*given))]
    worst, same = 0.0, True
    for one, other in zip(got, expected, strict=True):
        same &= one.dtype == other.dtype and torch.equal(one, other)
        if one.is_floating_point():
            scale = other.double().abs().max().clamp_min(1e-30)
            unit = EPSILON.get(one.dtype, 2.0**-23)
            worst = max(worst, ((one.double() - other.double()).abs().max() / scale).item() / unit)
        elif not torch.equal(one, other):
            worst = float("inf")
    return {"same bits": same, "roundings": round(worst, 2), "status": "ok" if worst <= 16 else "WRONG"}


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [each for each in found if isinstance(each, Tensor)] if isinstance(found, tuple | list) else []


def operator_cases() -> Iterator[tuple[str, Callable[..., Any], Callable[[], tuple[Any, ...]]]]:
    """(name, function, its arguments): what it writes into, it returns."""
    shape, piece_bytes = (7, 24, 9, 16), MIB

    def given(*kinds: str) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for kind in kinds:
            x = torch.randn(shape if kind[0] == "x" else shape[1:2], generator=generator)
            made.append((x * 300).to(torch.int16) if kind == "x16" else x.bfloat16() if kind == "xb" else x)
        return tuple(made)

    def positive(*kinds: str) -> tuple[Tensor, ...]:
        return tuple(each.abs() + 0.5 if kind == "s" else each for kind, each in zip(kinds, given(*kinds), strict=True))

    def read(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, unit: float) -> Tensor:
        return kernels.read_part(x, dtype, unit=unit, scale=scale, shift=shift)

    def add(part: Tensor, residual: Tensor, step: float) -> tuple[Tensor, ...]:
        overflows = torch.zeros((), dtype=torch.int64, device=part.device)
        kernels.add_to_part_(part, residual, 0.5, step=step, limit=2.0**7, overflows=overflows, piece_bytes=piece_bytes)
        return part, overflows

    def normalise(x: Tensor, mean: Tensor, deviation: Tensor, gain: Tensor, bias: Tensor) -> tuple[Any, ...]:
        signs = kernels.normalise_activate_(
            x, mean, deviation, gain, bias, 0.2, with_signs=True, piece_bytes=piece_bytes
        )
        return x, signs

    def undo(y: Tensor, dy: Tensor, mean: Tensor, deviation: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        count = y.numel() // y.shape[1]
        sums = kernels.norm_activation_sums(y, dy, None, gain, bias, 0.2, piece_bytes=piece_bytes)
        kernels.undo_norm_activation_(
            y, dy, None, mean, deviation, gain, bias, 0.2, sums, count, piece_bytes=piece_bytes
        )
        return y, dy, sums

    def gradient(dpart: Tensor, du: Tensor, part: Tensor, mean: Tensor, scale: Tensor, deviation: Tensor) -> Any:
        sums = kernels.add_norm_gradient_(dpart, du, part, mean, scale, None)
        count = part.numel() // part.shape[1]
        kernels.add_norm_rest_(dpart, part, mean, deviation, scale, sums, count, piece_bytes=piece_bytes)
        return (dpart, sums, *kernels.split_sums(sums, divisor=deviation))

    def constants(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, ...]:
        running = kernels.Running(torch.zeros_like(mean), torch.ones_like(mean), None, 0.1, 100)
        found = kernels.norm_constants(mean, variance, weight, bias, 1e-5, epsilon_i=0.1, running=running)
        return (*found, running.mean, running.variance)

    yield "read_part float32 to bfloat16", read, lambda: (*given("x", "c", "c"), torch.bfloat16, 1.0)
    yield "read_part int16 to float32", read, lambda: (*given("x16", "c", "c"), torch.float32, 2.0**-8)
    yield "add_to_part_ float32", add, lambda: (*given("x", "x"), 0.0)
    yield "add_to_part_ float32 on the grid", add, lambda: (*given("x", "xb"), 2.0**-16)
    yield "add_to_part_ int16", add, lambda: (*given("x16", "x"), 2.0**-8)
    yield (
        "channel_statistics",
        lambda x: kernels.channel_statistics(x, dtype=torch.float32, piece_bytes=piece_bytes),
        lambda: given("x"),
    )
    yield "norm_constants", constants, lambda: positive("c", "s", "c", "c")
    yield "normalise_activate_", normalise, lambda: positive("x", "c", "s", "s", "c")
    yield "undo_norm_activation_, sums", undo, lambda: positive("x", "xg", "c", "s", "s", "c")
    yield "add_norm_gradient_, rest", gradient, lambda: positive("xg", "xb", "x", "c", "c", "s")


# ---- invert against store --------------------------------------------------------------------------------


def gradients(check: Check, part: Part) -> None:
    for arch in filter(_is_reversible, check.archs):
        for precision in ("fp32", "bf16"):
            check.case(part, partial(both_modes, check, arch, precision), arch=arch, precision=precision)


def both_modes(check: Check, arch: str, precision: str) -> dict[str, Any]:
    config, count = check.config(arch, precision), min(check.batch, 64)
    torch.manual_seed(0)
    model = devices.place(models.build(config.network, models.Images(CLASSES, IMAGE_SIZE)), check.device).train()
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE).to(check.device, devices.DTYPES[precision])
    labels = torch.randint(0, CLASSES, (count,)).to(check.device)

    def measured() -> tuple[Tensor, list[Tensor | None]]:
        with on_the_side(model, check.device), devices.autocast(check.device, precision):
            with torch.no_grad():
                logits = model(images)
            return logits, loss_gradients(model, images, labels)

    rebuilt, ours = measured()
    with storing(model):
        stored, theirs = measured()
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    error = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
    size = sum(b.square().sum().item() for _, b in pairs) ** 0.5
    return {
        "logits": "same bits" if torch.equal(rebuilt, stored) else f"{(rebuilt - stored).abs().max().item():.1e} apart",
        "gradients, relative error": f"{error / size:.1e}",
        "least cosine": round(min(compare(a, b).cosine for a, b in pairs), 5),
    }


# ---- memory ----------------------------------------------------------------------------------------------


def modes(arch: str) -> tuple[str, ...]:
    return ("invert", "store") if _is_reversible(arch) else ("store",)


def memory(check: Check, part: Part) -> None:
    for arch in check.archs:
        for precision in ("fp32", "bf16"):
            for backward in modes(arch):
                named = {"arch": arch, "precision": precision, "mode": backward}
                check.case(part, partial(plan_and_step, check, arch, precision, backward), **named)


def plan_and_step(check: Check, arch: str, precision: str, backward: str) -> dict[str, Any]:
    """The plan of a step, and a real one: live bytes, and on CUDA what the allocator had."""
    config = check.config(arch, precision, backward)
    planned = planning.make_plan(config, check.device, CLASSES, IMAGE_SIZE).peak_bytes
    live = LiveStorages()
    with live:
        step = check.step(replace_graph(config))
        check.steps(step, 2)
        live.reset_peak()
        devices.reset_peak(check.device)
        check.steps(step, 1)
    found: dict[str, Any] = {"planned MiB": planned / MIB, "live MiB": live.peak_bytes / MIB}
    if check.on_gpu:
        vram = devices.peak_vram_mib(check.device) or {}
        found |= {"allocated MiB": vram["allocated"], "reserved MiB": vram["reserved"]}
        found["kept"] = abs(vram["allocated"] - planned / MIB) <= 0.05 * planned / MIB + 32
    return found


def replace_graph(config: Config) -> Config:
    """The same without a graph, whose memory is one block to the allocator."""
    config.machine.graph = "off"
    return config


# ---- speed -----------------------------------------------------------------------------------------------


def speed(check: Check, part: Part) -> None:
    for arch in check.archs:
        for precision in ("bf16", "fp32"):
            for mode in (*modes(arch), "store, compiled"):
                named = {"arch": arch, "precision": precision, "mode": mode}
                check.case(part, partial(timed, check, arch, precision, mode), **named)


def timed(check: Check, arch: str, precision: str, mode: str) -> dict[str, Any]:
    backward, _, compiled = mode.partition(", ")
    if compiled and not check.on_gpu:
        return {"status": "left out: without a GPU there is nothing to time"}
    step = check.step(check.config(arch, precision, backward))
    if compiled:
        step.wrapped = torch.compile(step.model, dynamic=False)
    seconds = check.seconds(step)
    found: dict[str, Any] = {"graph": step.is_captured, "loss is finite": bool(step.loss.isfinite())}
    if seconds is not None:
        found |= {"ms a step": 1000 * seconds, "images/s": round(check.batch / seconds)}
        found["peak MiB"] = (devices.peak_vram_mib(check.device) or {})["allocated"]
    return found


# ---- launches --------------------------------------------------------------------------------------------


def launches(check: Check, part: Part) -> None:
    for arch in check.archs:
        for precision in ("bf16", "fp32"):
            check.case(part, partial(launched, check, arch, precision), arch=arch, precision=precision)


def launched(check: Check, arch: str, precision: str) -> dict[str, Any]:
    config = check.config(arch, precision, modes(arch)[0])
    found: dict[str, Any] = {}
    try:
        from revtrain.planning.cost import step_cost

        cost = step_cost(config, check.batch)
        found = {"counted operations": cost.launches, "counted GB": cost.total_bytes / 1e9}
    except Exception as error:  # the profiler's columns stand without it
        found = {"status": _explained(error)}
    step = check.step(config)
    seconds = check.seconds(step)
    if seconds is None:
        return found
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        check.steps(step, 1)
        devices.synchronize(check.device)
    events = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(each.time_range.elapsed_us() for each in events) / 1e6
    return found | {"kernels": len(events), "busy ms": 1000 * busy, "busy share": round(busy / seconds, 3)}


# ---- beside others ---------------------------------------------------------------------------------------

RIVALS = ("store", "checkpoint", "checkpoint_sqrt", "accumulate", "memcnn", "revtorch", "revlib", "chain", "chunked")


def rivals(check: Check, part: Part) -> None:
    bench = _benchmark()
    for name in RIVALS:
        check.case(part, partial(rival, check, bench, name), engine=bench.all_cases()[name].label)


def rival(check: Check, bench: Any, name: str) -> dict[str, Any]:
    """The benchmark's case: live bytes of a step, on CUDA its time and its bytes of the allocator."""
    case = bench.all_cases()[name]
    if missing := bench.missing_package(case):
        return {"status": missing}
    size = {} if check.on_gpu else {"blocks": 2, "channels": 8, "hidden": 8}
    options = bench.Options(batch=check.batch, repeats=check.repeats, device=str(check.device), **size)
    found: dict[str, Any] = {"live MiB": bench.live_bytes(case, options, check.batch)[1] / MIB}
    if check.on_gpu:
        ((_, seconds, _),) = bench.time_in_turn([case], options)
        found |= {
            "ms a step": 1000 * seconds,
            "allocated MiB": bench.allocator_peak_bytes(case, options, check.batch) / MIB,
        }
    return found


def _benchmark() -> Any:
    path = Path(__file__).with_name("benchmark_memory.py")
    spec = importlib.util.spec_from_file_location("benchmark_memory", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


# ---- a run under a limit ---------------------------------------------------------------------------------


def limit(check: Check, part: Part) -> None:
    for arch in [each for each in ("chunked", "hybrid", "resnet18") if each in check.archs]:
        check.case(part, partial(limited, check, arch), arch=arch, limit=LIMIT if check.on_gpu else "none")


def limited(check: Check, arch: str) -> dict[str, Any]:
    """A real run of 20 steps, planned and capped; on the CPU of two."""
    steps, words = (20, [f"memory_limit={LIMIT}", "batch=auto"]) if check.on_gpu else (2, [f"batch={check.batch}"])
    words = [f"arch={arch}", f"device={check.device}", "probe.every=0", "epochs=1", "lr=0.01", *check.words, *words]
    plan = planning.plan(compose(["data=synthetic", "data.train_images=100000", *words]))
    words = [each for each in words if each != "batch=auto"] + [f"batch={plan.batch}"] * check.on_gpu
    words += [f"data.train_images={max(steps * plan.batch, 2 * CLASSES)}", "data.test_images=100"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train(compose(["data=synthetic", *words]), Path(folder) / "run")
        finally:
            planning.cap_memory(None, check.device)
    vram = result["peak_vram_mib"]
    found: dict[str, Any] = {"batch": plan.batch, "planned MiB": plan.peak_bytes / MIB, "status": result["status"]}
    if vram is not None:
        found |= {"allocated MiB": vram["allocated"], "reserved MiB": vram["reserved"]}
        found["images/s"] = round(result["images_per_second"] or 0)
    return found


# ---- what is told ----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Check, Part], None]] = {
    "operators": operators,
    "gradients": gradients,
    "memory": memory,
    "speed": speed,
    "launches": launches,
    "rivals": rivals,
    "limit": limit,
}
# of the seconds that are left when it begins
SHARES = {
    "operators": 0.1,
    "gradients": 0.15,
    "memory": 0.25,
    "speed": 0.45,
    "launches": 0.4,
    "rivals": 0.5,
    "limit": 1.0,
}


def table(part: Part) -> str:
    """A part for the terminal."""
    columns = list(dict.fromkeys(key for row in part.rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in part.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)] if columns else []
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"\n{part.name}: {part.status}, {part.seconds} s", *(lines if part.rows else [])])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    found = {name: of(name) for name in ("revtrain", "triton", "memcnn", "revtorch", "revlib")}
    return {"python": platform.python_version(), "torch": torch.__version__, **found, "cuda": torch.version.cuda}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order (all)")
    parser.add_argument("--archs", default=",".join(ARCHITECTURES), help="which architectures (all)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto: the first GPU, else the CPU")
    parser.add_argument("--batch", type=int, help="images of a step (512, without CUDA 4)")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check.json"), help="%(default)s")
    parser.add_argument("words", nargs="*", help="for every network, as in width=16")
    chosen = parser.parse_args(argv)
    for given, known in ((chosen.parts, tuple(PARTS)), (chosen.archs, ARCHITECTURES)):
        if unknown := sorted(set(given.split(",")) - set(known)):
            parser.error(f"{', '.join(unknown)} was given; there are {', '.join(known)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """0, unless a part has failed as a whole."""
    chosen = parse(argv)
    device = devices.choose_device(chosen.device)
    on_gpu = device.type == "cuda"
    devices.make_current(device)
    words = (*(() if on_gpu else ("width=8",)), *chosen.words)
    batch = chosen.batch or (512 if on_gpu else 4)
    check = Check(device, chosen.budget, batch, words, tuple(chosen.archs.split(",")))
    about = {"device": devices.describe(device), "versions": versions(), "batch": check.batch, "budget": chosen.budget}
    print(f"{about['device']['title']}, batch {check.batch}; {about['versions']}", flush=True)
    if not on_gpu:
        print("Without CUDA: small sizes, and only what can be counted.")
    for name in chosen.parts.split(","):
        check.run(name, SHARES[name])
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        found = {**about, "parts": [asdict(each) for each in check.parts]}
        chosen.output.write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(f"\n{check.budget - check.left():.0f} s; written to {chosen.output}")
    return int(any(part.status != "ok" for part in check.parts))


if __name__ == "__main__":
    sys.exit(main())
