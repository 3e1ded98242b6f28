"""Draws the memory diagram of every architecture (Figures 1, 3, 4, 5, 8 and 9 of arXiv 1910.11127).

    python scripts/memory_figures.py                         # all, into docs/figures/memory_<arch>.png and .svg
    python scripts/memory_figures.py --arch hybrid width=16 precision=bf16
    python scripts/memory_figures.py --depth                 # memory_depth.png, .svg and .csv: memory against depth

Above: the network from input to loss as a row of modules. A bar shows what is alive while that module is at work, at
the moment when that is most, after the closed forms: what earlier modules keep, what this one keeps, what lives only
inside it, and gradients. Below: live storages over a whole training step, counted under fake tensors.

Memory against depth: lines are the closed forms, markers the same count, as a slope between two batches.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode

from revtrain.conf import compose
from revtrain.config import read
from revtrain.machine.device import DTYPES
from revtrain.memory.closed_form import MemoryModel, Module, Moment
from revtrain.memory.live import LiveStorages
from revtrain.models import analytic_memory, build_model, for_task, traits
from revtrain.optim import make_optimizer
from revtrain.planning.predict import StepPredictor

CLASSES = 10
MIB = 2**20
# what a bar is made of, from the bottom; colours that also differ in grey and for the colour-blind
PARTS = {
    "images": "#b8b8b8",
    "kept by earlier modules": "#9ecae1",
    "kept by this module": "#2171b5",
    "state, one buffer for the chain": "#41ab5d",
    "alive only inside": "#fe9929",
    "gradients": "#cb181d",
}
KEPT = list(PARTS)[:4]
PHASES = {"forward": "#eef4fb", "backward": "#fdf0ea", "optimizer": "#eeeeee"}


# ---------------------------------------------------------------- the diagram of modules


def parts_of(moment: Moment, module: Module, earlier: set[str]) -> dict[str, float]:
    """Bytes per pixel of each of PARTS at a moment; `earlier` names what the modules before it keep."""
    own = {term.name for term in module.stored}
    values = dict.fromkeys(PARTS, 0.0)
    for term in moment.terms:
        if term.name.startswith(("images", "labels")):
            part = "images"
        elif term.kind == "gradient":
            part = "gradients"
        elif term.bottleneck != "global":
            part = "alive only inside"
        elif term.name in own and term.name.startswith(("state", "output of stage")):
            part = "state, one buffer for the chain"
        else:
            part = "kept by earlier modules" if term.name in earlier else "kept by this module"
        values[part] += term.bytes_per_pixel
    return values


def draw_modules(axes: Axes, model: MemoryModel) -> None:
    """A bar for each module at its worst moment, and the two bottlenecks marked at the one that peaks."""
    kept: set[str] = set()
    bars, forward = [], []
    for index, module in enumerate(model.modules):
        worst = max((m for m in model.moments if m.module == index), key=lambda moment: moment.bytes_per_pixel)
        bars.append(parts_of(worst, module, kept))
        forward.append(worst.phase == "forward")
        kept |= {term.name for term in module.stored}
    bottoms = [0.0] * len(bars)
    for part, colour in PARTS.items():
        heights = [bar[part] for bar in bars]
        if max(heights) > 0:
            axes.bar(
                range(len(bars)), heights, 0.78, bottoms, color=colour, edgecolor="white", linewidth=0.4, label=part
            )
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    _mark_forward(axes, [(x, high) for x, high in enumerate(bottoms) if forward[x]])
    _mark_bottlenecks(axes, bars, bottoms.index(max(bottoms)))
    axes.set_xticks(range(len(bars)), [_short(module.name) for module in model.modules], fontsize=8.5)
    axes.set_xlim(-0.6, 1.24 * len(bars) - 0.4)
    axes.set_ylim(0, 1.32 * max(bottoms))
    axes.set_ylabel("bytes per input pixel")
    axes.set_xlabel("modules from the input (left) to the loss (right)", loc="left")
    axes.set_title("Alive while a module is at work, at its worst moment (closed form)", fontsize=11, loc="left")
    axes.legend(fontsize=9, loc="upper left", ncols=3, frameon=False, handlelength=1, columnspacing=1.2)


def _mark_forward(axes: Axes, tops: list[tuple[int, float]]) -> None:
    """A dashed outline around the bars that show a moment of the forward pass."""
    if tops:
        places, heights = zip(*tops, strict=True)
        axes.bar(
            places, heights, 0.78, fill=False, edgecolor="black", linestyle="--", linewidth=1,
            label="dashed: in its forward pass",
        )  # fmt: skip


def _mark_bottlenecks(axes: Axes, bars: list[dict[str, float]], peak: int) -> None:
    """Right of the bars: what the highest of them is made of, as global and local bottleneck and gradients."""
    bar = bars[peak]
    top = sum(bar.values())
    axes.annotate(
        f"peak {top:.0f}", (peak, top), (0, 4), textcoords="offset points", ha="center", fontsize=10, weight="bold"
    )
    sizes = {
        "global\nbottleneck": (sum(bar[part] for part in KEPT), "#08519c"),
        "local\nbottleneck": (bar["alive only inside"], "#d95f02"),
        "gradients": (bar["gradients"], "#cb181d"),
    }
    x, low, written = len(bars) - 0.35, 0.0, -1.0
    for name, (size, colour) in sizes.items():
        high = low + size
        axes.plot([peak + 0.39, x], [high, high], color=colour, linewidth=0.8, linestyle=":")
        if size > 0:
            axes.annotate("", (x, high), (x, low), arrowprops={"arrowstyle": "<->", "color": colour, "shrinkA": 0,
                                                               "shrinkB": 0})  # fmt: skip
        middle = max((low + high) / 2, written + 0.13 * top)
        text = f"{name}: {size:.0f}" if size else f"no {name}"
        axes.text(x + 0.02 * len(bars), middle, text, color=colour, fontsize=9.5, va="center")
        low, written = high, middle


def _short(name: str) -> str:
    """`stage 1, block 2` -> `stage 1`, `block 2` below it."""
    return name.replace(", ", "\n").replace(" pooling", "\npool")


# ---------------------------------------------------------------- the timeline


class Timed(LiveStorages):
    """Live bytes after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.after.append(self.live_bytes)
        return result


def record(cfg: Any, image_size: int, batch: int) -> tuple[list[float], dict[str, int]]:
    """Live MiB after each operation of the second of two training steps, and where its phases end."""
    dtype = DTYPES[cfg.precision]
    with FakeTensorMode(), torch.random.fork_rng([]), Timed() as counter:
        model = build_model(cfg, CLASSES, image_size).train()
        optimizer = make_optimizer(model, read(cfg).training)
        for parameter in model.parameters():  # the first step only makes the momentum
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        images = torch.empty(batch, 3, image_size, image_size, dtype=dtype).normal_()
        labels = torch.zeros(batch, dtype=torch.int64)
        counter.after.clear()
        ends = {}
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        ends["forward"] = len(counter.after)
        loss.backward()
        ends["backward"] = len(counter.after)
        del images, labels, loss
        optimizer.step()
        ends["optimizer"] = len(counter.after)
        return [live / MIB for live in counter.after], ends


def draw_timeline(axes: Axes, cfg: Any, model: MemoryModel, image_size: int, batch: int) -> None:
    """Live MiB over the operations of a step, above what is always there."""
    live, ends = record(cfg, image_size, batch)
    steps = range(len(live))
    start = 0
    for phase, colour in PHASES.items():
        end = ends[phase]
        axes.axvspan(start, end, color=colour, zorder=0)
        if end - start > 0.06 * len(live):
            axes.text((start + end) / 2, 0.97, phase, transform=axes.get_xaxis_transform(), ha="center", va="top",
                      fontsize=9.5, color="#555555")  # fmt: skip
        start = end
    always = (model.fixed_of("theta") + model.fixed_of("optimizer")) / MIB
    axes.fill_between(steps, live, always, step="post", color="#6baed6", alpha=0.75, linewidth=0, rasterized=True,
                      label="activations, gradients, scratch")  # fmt: skip
    axes.fill_between([0, len(live)], always, color="#969696", alpha=0.75, linewidth=0, label="weights and momentum")
    axes.plot(steps, live, drawstyle="steps-post", color="#08519c", linewidth=0.7, rasterized=True)
    peak = max(live)
    at = live.index(peak)
    phase = next(name for name, end in ends.items() if at < end)
    axes.plot([at], [peak], "o", color="#cb181d", markersize=6)
    right = at > 0.5 * len(live)
    axes.annotate(
        f"peak: {peak:,.0f} MiB, in the {phase} pass", (at, peak), (-8 if right else 8, 6),
        textcoords="offset points", ha="right" if right else "left", fontsize=9.5, weight="bold", color="#cb181d",
    )  # fmt: skip
    axes.set_xlim(0, len(live))
    axes.set_ylim(0, 1.27 * peak)
    axes.set_xlabel("operations of one training step", loc="left")
    axes.set_ylabel("live MiB")
    closed = model.peak_bytes(batch, image_size) / MIB
    axes.set_title(
        f"Counted over one step of {batch} images under fake tensors (peak by the closed form: {closed:,.0f} MiB)",
        fontsize=11, loc="left",
    )  # fmt: skip
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.9), frameon=False, handlelength=1)


# ---------------------------------------------------------------- memory against depth

DEPTHS = (3, 6, 12, 24, 48)
COLOURS = {"hybrid": "#d95f02", "chunked": "#08519c", "layerwise": "#41ab5d"}  # differ in grey, too


def memory_against_depth(overrides: list[str], image_size: int, batch: int) -> list[dict[str, Any]]:
    """Bytes per input pixel of each architecture, mode and depth: closed form, and counted between two batches."""
    rows = []
    for arch in COLOURS:
        for mode in ("store", "invert"):
            for depth in DEPTHS:
                words = ["data=synthetic", f"arch={arch}", f"backward={mode}", f"depth={depth}", *overrides]
                cfg = compose(words)
                predict = StepPredictor(cfg, CLASSES, image_size)
                slope = (predict(2 * batch).peak - predict(batch).peak) / (batch * image_size**2)
                analytic = analytic_memory(cfg, CLASSES, image_size).bytes_per_pixel
                rows.append({"arch": arch, "backward": mode, "depth": depth, "analytic B/px": round(analytic, 1),
                             "counted B/px": round(slope, 1)})  # fmt: skip
    return rows


def draw_depth(rows: list[dict[str, Any]]) -> Figure:
    """Stored activations grow with depth, recomputed ones do not."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    ends: dict[tuple[float, str], list[tuple[str, str]]] = {}  # (bytes at the end, mode): whose, and its colour
    for arch, colour in COLOURS.items():
        for mode, line in (("store", "--"), ("invert", "-")):
            own = [row for row in rows if (row["arch"], row["backward"]) == (arch, mode)]
            depths = [row["depth"] for row in own]
            axes.plot(depths, [row["analytic B/px"] for row in own], line, color=colour, linewidth=1.6)
            axes.plot(depths, [row["counted B/px"] for row in own], "o", color=colour, markersize=4,
                      mfc=colour if mode == "invert" else "white")  # fmt: skip
            ends.setdefault((own[-1]["counted B/px"], mode), []).append((arch, colour))
    place = 0.0  # of the label below, kept clear of the next
    for (value, mode), curves in sorted(ends.items()):
        place = max(value, 1.3 * place)
        text = f"{' and '.join(arch for arch, _ in curves)}, {mode}: {value:,.0f}"
        colour = curves[0][1] if len(curves) == 1 else "black"
        axes.text(1.08 * DEPTHS[-1], place, text, va="center", fontsize=9.5, color=colour)
    axes.set(xscale="log", yscale="log", xlim=(DEPTHS[0] * 0.93, DEPTHS[-1] * 2.6))
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.set_yticks(ticks := (100, 300, 1000, 3000, 10000, 30000), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth: repeated units of the network", loc="left")
    axes.set_ylabel("bytes per input pixel")
    axes.set_title("Memory of a training step: stored (dashed) and recomputed (solid)", loc="left", fontsize=11)
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_depth(args: argparse.Namespace) -> Path:
    rows = memory_against_depth(args.overrides, args.image_size, args.batch // 8)
    path = args.output / "memory_depth.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure = draw_depth(rows)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=120)
    plt.close(figure)
    return path


# ---------------------------------------------------------------- the figure


def draw(overrides: list[str], image_size: int, batch: int) -> Figure:
    """Both panels of one configuration."""
    cfg = compose(overrides)
    model = analytic_memory(cfg, CLASSES, image_size)
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 8.4), layout="constrained", height_ratios=[1.25, 1])
    draw_modules(above, model)
    draw_timeline(below, cfg, model, image_size, batch)
    mode = "" if not traits(cfg.arch).reversible else f"backward={cfg.backward}, "
    figure.suptitle(
        f"{cfg.arch}: {model.bytes_per_pixel:.0f} bytes per input pixel   "
        f"(width {cfg.width}, depth {cfg.depth}, {cfg.precision}, {mode}{model.parameters / 1e6:.1f} M parameters)",
        fontsize=12.5, weight="bold",
    )  # fmt: skip
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="configuration for all, e.g. width=16 precision=bf16")
    parser.add_argument("--arch", nargs="+", default=for_task("classify"), choices=for_task("classify"), metavar="ARCH")
    parser.add_argument("--depth", action="store_true", help="memory against depth instead")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (32)")
    parser.add_argument("--batch", type=int, default=512, help="images of the recorded step (512)")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (docs/figures)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.depth:
        show(str(write_depth(args)))
        return
    for arch in args.arch:
        overrides = ["data=synthetic", f"arch={arch}", *args.overrides]
        figure = draw(overrides, args.image_size, args.batch)
        for suffix in ("png", "svg"):
            path = args.output / f"memory_{arch}.{suffix}"
            figure.savefig(path, dpi=120)
            show(str(path))
        plt.close(figure)


if __name__ == "__main__":
    main()
