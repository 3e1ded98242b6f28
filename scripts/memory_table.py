"""The memory of every architecture in both backward modes: closed form, prediction and measurement side by side.

    python scripts/memory_table.py                           # all architectures, a batch of 512
    python scripts/memory_table.py --arch hybrid chunked width=16
    python scripts/memory_table.py --name memory_table_bf16 precision=bf16
    python scripts/memory_table.py --measure-batch 0         # predictions only, no real step

Prints Markdown and writes it and a CSV of the same numbers into docs/figures; and, as
NAME_equations.md, the paper's equations, filled in. `python scripts/docs_tables.py` takes the tables from there into
the pages. Columns:

analytic    closed form, bytes per input pixel (revtrain.models.analytic_memory)
predicted   peak of live storages over a training step under fake tensors (revtrain.planning.predict); per pixel, the
            slope between the batch and twice of it
measured    the same count over real steps on the CPU at small batches, beside the prediction at those
CUDA        where there is a GPU: the allocator's peak over a real step at the full batch, allocated and reserved
batch in X  the largest batch whose predicted peak stays within X
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from revtrain.conf import compose
from revtrain.config import read
from revtrain.machine.device import DTYPES
from revtrain.memory.closed_form import MemoryModel
from revtrain.models import analytic_memory, build_model, for_task, traits
from revtrain.optim import make_optimizer
from revtrain.planning.plan import MOST_IMAGES, largest_batch
from revtrain.planning.predict import StepPredictor

MIB = 2**20
LIMITS = {"500 MiB": 500 * MIB} | {f"{gib} GiB": gib * 1024 * MIB for gib in (1, 2, 4, 8, 16)}
NO_GPU = "not measured on a GPU yet"
CLASSES = 10


def measure(cfg: Any, image_size: int, batch: int) -> int:
    """Peak live bytes of a real training step on the CPU."""
    return StepPredictor(cfg, CLASSES, image_size, quick=False, device=torch.device("cpu"))(batch).peak


def measure_cuda(cfg: Any, image_size: int, batch: int) -> str:
    """Allocated / reserved MiB at the peak of the second of two real steps on the GPU."""
    dtype = DTYPES[cfg.precision]
    try:
        model = build_model(cfg, CLASSES, image_size).cuda().train()
        optimizer = make_optimizer(model, read(cfg).training)
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            images = torch.empty(batch, 3, image_size, image_size, device="cuda", dtype=dtype).normal_()
            labels = torch.zeros(batch, dtype=torch.int64, device="cuda")
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            del images, labels, loss
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    return f"{torch.cuda.max_memory_allocated() / MIB:.0f} / {torch.cuda.max_memory_reserved() / MIB:.0f}"


def row(cfg: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All columns of one architecture and mode."""
    batch, pixels = args.batch, args.image_size**2
    analytic, predict = analytic_memory(cfg, CLASSES, args.image_size), StepPredictor(cfg, CLASSES, args.image_size)

    def peak(size: int) -> int:
        return predict(size).peak

    per_image = (peak(2 * batch) - peak(batch)) / batch
    cells: dict[str, Any] = {
        "arch": cfg.arch,
        "backward": cfg.backward if traits(cfg.arch).reversible else "either",
        "parameters": analytic.parameters,
        "analytic B/px": round(analytic.bytes_per_pixel, 1),
        "predicted B/px": round(per_image / pixels, 1),
        f"predicted peak at {batch}, MiB": round(peak(batch) / MIB, 1),
    }
    for size in (args.measure_batch, 2 * args.measure_batch) if args.measure_batch else ():
        real = measure(cfg, args.image_size, size)
        cells[f"measured peak at {size}, MiB"] = round(real / MIB, 2)
        cells[f"predicted peak at {size}, MiB"] = round(peak(size) / MIB, 2)
        cells[f"difference at {size}, %"] = round(100 * (peak(size) / real - 1), 2)
    if torch.cuda.is_available():
        cells[f"CUDA peak at {batch}, allocated / reserved MiB"] = measure_cuda(cfg, args.image_size, batch)
    for name, limit in LIMITS.items():
        first = int((limit - peak(batch)) / per_image) + batch
        cells[f"batch in {name}"] = largest_batch(peak, limit, MOST_IMAGES, per_image, first)
    return cells


# ---- the paper's equations: which of its symbols, in words, and what it is of the closed form --------------
EQUATIONS: list[tuple[str, str, Callable[[MemoryModel], float]]] = [
    (
        "6, 7, 10, 12, 30",
        "M_z, kept over the pass (global bottleneck), images included",
        lambda memory: memory.of(kind="activation", bottleneck="global"),
    ),
    (
        "11, 12, 4.2",
        "M_z, alive inside one module (local bottleneck)",
        lambda memory: memory.of(kind="activation") - memory.of(kind="activation", bottleneck="global"),
    ),
    ("9, 12, 13, 30", "M_g, gradients of activations at the peak", lambda memory: memory.of(kind="gradient")),
    ("5", "M_theta + M_z + M_g per pixel, analytic", lambda memory: memory.bytes_per_pixel),
]


def equations(memories: list[MemoryModel], rows: list[dict[str, Any]], widths: list[int], batch: int) -> str:
    """The terms of Eq. 5 for each architecture, bytes per input pixel at the peak; weights and the total in MiB."""
    names = [f"{memory.arch}, c={width}" for memory, width in zip(memories, widths, strict=True)]
    lines = ["| equation | symbol | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for number, symbol, value in EQUATIONS:
        lines.append(f"| {number} | {symbol} | " + " | ".join(f"{value(memory):.0f}" for memory in memories) + " |")
    total = f"predicted peak at {batch}, MiB"
    theta = "M_theta: weights and running statistics, MiB (their gradients and the momentum take as much again, each)"
    for symbol, cells in {
        "the same, predicted by a fake step": [f"{cells['predicted B/px']:.0f}" for cells in rows],
        theta: [f"{memory.fixed_of('theta') / MIB:.1f}" for memory in memories],
        f"total at batch {batch}, predicted, MiB": [f"{cells[total]:.0f}" for cells in rows],
    }.items():
        lines.append(f"| 5 | {symbol} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The chosen columns as a table, numbers to the right."""
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---:" if isinstance(rows[0][name], int | float) else "---" for name in columns) + "|")
    for cells in rows:
        lines.append("| " + " | ".join(_format(cells[name]) for name in columns) + " |")
    return "\n".join(lines)


def _format(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def document(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    columns = list(rows[0])
    limits = [name for name in columns if name.startswith("batch in")]
    steps = [name for name in columns if name.startswith(("measured", "difference", "CUDA"))]
    steps += [name for name in columns if name.startswith("predicted peak") and f"at {args.batch}," not in name]
    overrides = " ".join(args.overrides) or "defaults of each architecture"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU
    return "\n".join(
        [
            f"Images of {args.image_size}x{args.image_size} pixels; configuration: {overrides}; "
            f"torch {torch.__version__}; CUDA: {gpu}.",
            "",
            "B/px: bytes per input pixel of activations and their gradients at the peak of a large batch (predicted: "
            f"{args.batch} to {2 * args.batch}); weights, their gradients and momentum are in the peaks in MiB.",
            "",
            markdown(rows, [name for name in columns if name not in limits + steps]),
            "",
            "Real steps beside the prediction of the same:",
            "",
            markdown(rows, ["arch", "backward", *(name for name in columns if name in steps)]),
            "",
            "Largest batch within a limit:",
            "",
            markdown(rows, ["arch", "backward", *limits]),
            "",
        ]
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="configuration for all, e.g. width=16 precision=bf16")
    parser.add_argument("--arch", nargs="+", default=for_task("classify"), choices=for_task("classify"), metavar="ARCH")
    parser.add_argument("--backward", nargs="+", default=["invert", "store"], choices=["invert", "store"])
    parser.add_argument("--batch", type=int, default=512, help="images of the predicted step (512)")
    parser.add_argument("--measure-batch", type=int, default=16, help="smaller batch of the real steps; 0: none (16)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (32)")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (docs/figures)")
    parser.add_argument("--name", default="memory_table", help="of the files, without suffix (memory_table)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, memories, widths, inverted = [], [], [], []
    for arch in args.arch:
        for mode in args.backward if traits(arch).reversible else args.backward[:1]:
            cfg = compose(["data=synthetic", f"arch={arch}", f"backward={mode}", *args.overrides])
            rows.append(row(cfg, args))
            if mode == args.backward[0]:
                memories.append(analytic_memory(cfg, CLASSES, args.image_size))
                inverted.append(rows[-1])
                widths.append(cfg.width)
    text = document(rows, args)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}.md").write_text(text)
    (args.output / f"{args.name}_equations.md").write_text(equations(memories, inverted, widths, args.batch))
    write_csv(args.output / f"{args.name}.csv", rows)


if __name__ == "__main__":
    main()
