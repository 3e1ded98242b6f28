"""The memory of every architecture in both backward modes: closed form, prediction and measurement side by side.

    python scripts/memory_table.py                           # all architectures, a batch of 512
    python scripts/memory_table.py --arch hybrid chunked width=16 precision=bf16
    python scripts/memory_table.py --measure-batch 0         # predictions only, no real step

Prints Markdown and writes it and a CSV of the same numbers into docs/figures. Columns:

analytic    closed form, bytes per input pixel (revtrain.measure.analytic)
predicted   peak of live storages over a training step under fake tensors; per pixel, the slope over the batch
measured    the same count over a real step on the CPU at a small batch, beside the prediction at that batch
CUDA        the allocator's peak over a real step at the full batch, allocated and reserved
batch in X  the largest batch whose predicted peak stays within X
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from revtrain.conf import compose
from revtrain.measure import measure_step_memory, training_step_memory
from revtrain.measure.analytic import analytic_memory
from revtrain.models import architectures, build_model
from revtrain.optim import make_optimizer

MIB = 2**20
LIMITS = {"500 MiB": 500 * MIB} | {f"{gib} GiB": gib * 1024 * MIB for gib in (1, 2, 4, 8, 16)}
NO_GPU = "not measured on a GPU yet"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = 10


@dataclass(frozen=True)
class Line:
    """Peak bytes as a line over the batch, through two predictions."""

    fixed: float
    per_image: float

    def largest_batch(self, limit: int) -> int:
        return max(0, int((limit - self.fixed) // self.per_image))


def predict(cfg: Any, image_size: int, batch: int) -> Line:
    """The line through the predicted peaks at `batch` and at half of it."""
    half = max(1, batch // 2)
    small = measure_step_memory(cfg, CLASSES, image_size, half).peak_bytes
    large = measure_step_memory(cfg, CLASSES, image_size, batch).peak_bytes
    per_image = (large - small) / max(1, batch - half)
    return Line(large - per_image * batch, per_image)


def largest_batch(cfg: Any, image_size: int, limit: int, line: Line, batch: int) -> int:
    """The largest batch within `limit` bytes.

    The peak is the largest of several lines, one for each moment of the step. Above `batch` the line through it
    holds; below, another moment may peak, so the line is drawn again near the answer.
    """
    found = line.largest_batch(limit)
    if 2 <= found < batch // 2:
        found = min(found, predict(cfg, image_size, found).largest_batch(limit))
    return found


def measure(cfg: Any, image_size: int, batch: int) -> int:
    """Peak live bytes of a real training step on the CPU."""

    def make():
        model = build_model(cfg, CLASSES, image_size)
        return model, make_optimizer(model, cfg)

    dtype = DTYPES.get(cfg.precision)
    autocast = None if dtype is None else lambda: torch.autocast("cpu", dtype=dtype)
    return training_step_memory(make, batch, image_size, CLASSES, autocast).step


def measure_cuda(cfg: Any, image_size: int, batch: int) -> str:
    """Allocated / reserved MiB at the peak of the second of two real steps on the GPU."""
    if not torch.cuda.is_available():
        return NO_GPU
    try:
        model = build_model(cfg, CLASSES, image_size).cuda().train()
        optimizer = make_optimizer(model, cfg)
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            images = torch.randn(batch, 3, image_size, image_size, device="cuda")
            labels = torch.zeros(batch, dtype=torch.int64, device="cuda")
            with torch.autocast("cuda", dtype=DTYPES.get(cfg.precision), enabled=cfg.precision != "fp32"):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            del images, labels, loss
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    return f"{torch.cuda.max_memory_allocated() / MIB:.0f} / {torch.cuda.max_memory_reserved() / MIB:.0f}"


def row(cfg: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All columns of one architecture and mode."""
    analytic = analytic_memory(cfg, CLASSES, args.image_size)
    line = predict(cfg, args.image_size, args.batch)
    cells: dict[str, Any] = {
        "arch": cfg.arch,
        "backward": cfg.backward,
        "parameters": analytic.parameters,
        "analytic B/px": round(analytic.bytes_per_pixel, 1),
        "predicted B/px": round(line.per_image / args.image_size**2, 1),
        f"predicted peak at {args.batch}, MiB": round((line.fixed + line.per_image * args.batch) / MIB, 1),
    }
    if args.measure_batch:
        real, fake = (
            [peak(size) for size in (args.measure_batch, 2 * args.measure_batch)]
            for peak in (
                lambda size: measure(cfg, args.image_size, size),
                lambda size: measure_step_memory(cfg, CLASSES, args.image_size, size).peak_bytes,
            )
        )
        pixels = args.measure_batch * args.image_size**2
        cells[f"measured B/px, {args.measure_batch} to {2 * args.measure_batch}"] = round(
            (real[1] - real[0]) / pixels, 1
        )
        cells[f"measured peak at {2 * args.measure_batch}, MiB"] = round(real[1] / MIB, 1)
        cells[f"predicted peak at {2 * args.measure_batch}, MiB"] = round(fake[1] / MIB, 1)
    cells[f"CUDA peak at {args.batch}, allocated / reserved MiB"] = measure_cuda(cfg, args.image_size, args.batch)
    for name, limit in LIMITS.items():
        cells[f"batch in {name}"] = largest_batch(cfg, args.image_size, limit, line, args.batch)
    return cells


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
    overrides = " ".join(args.overrides) or "defaults of each architecture"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU
    return "\n".join(
        [
            f"Images of {args.image_size}x{args.image_size} pixels; configuration: {overrides}; "
            f"torch {torch.__version__}; CUDA: {gpu}.",
            "",
            "B/px: bytes per input pixel of activations and their gradients at the peak; weights, their gradients "
            "and momentum are in the peaks in MiB.",
            "",
            markdown(rows, [name for name in columns if name not in limits]),
            "",
            "Largest batch within a limit:",
            "",
            markdown(rows, ["arch", "backward", *limits]),
            "",
        ]
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="configuration for all, e.g. width=16 precision=bf16")
    parser.add_argument("--arch", nargs="+", default=architectures(), choices=architectures(), metavar="ARCH")
    parser.add_argument("--backward", nargs="+", default=["invert", "store"], choices=["invert", "store"])
    parser.add_argument("--batch", type=int, default=512, help="images of the predicted step (512)")
    parser.add_argument("--measure-batch", type=int, default=16, help="smaller batch of the real steps; 0: none (16)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (32)")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (docs/figures)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for arch in args.arch:
        for mode in args.backward if arch != "resnet18" else args.backward[:1]:
            cfg = compose(["data=synthetic", f"arch={arch}", f"backward={mode}", *args.overrides])
            rows.append(row(cfg, args))
            if arch == "resnet18":
                rows[-1]["backward"] = "either"
    text = document(rows, args)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory_table.md").write_text(text)
    write_csv(args.output / "memory_table.csv", rows)


if __name__ == "__main__":
    main()
