"""Whether a plan holds on the CPU: the largest batch within 500 MiB, planned, and the live bytes of real steps at it.

    python scripts/plan_table.py                # about 10 minutes of one core, 600 MiB
    python scripts/plan_table.py --limit 100MiB --archs chunked

The steps are those of training on random images. Writes docs/figures/plan_500mib.csv.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from revtrain import data, models
from revtrain.conf import compose
from revtrain.config import read
from revtrain.memory.live import LiveStorages
from revtrain.planning.plan import MIB, Plan, make_plan
from revtrain.training.step import Step

CPU, CLASSES, IMAGE_SIZE, IMAGES = torch.device("cpu"), 10, 32, 100_000
COLUMNS = (
    "", "parameters, gradients, momentum, MiB", "activations, MiB", "scratch and buffers, MiB", "beside the step, MiB",
    "largest batch", "a step, planned, bytes", "a real step and the order of its images (8 bytes each), bytes",
)  # fmt: skip


def live_peak(plan: Plan, words: list[str]) -> int:
    """Most live bytes of the second of two steps at the planned batch: the first one makes the momentum."""
    config, live = read(compose([*words, f"batch={plan.batch}"])), LiveStorages()
    pixels = torch.randint(0, 256, (plan.batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    split = data.Split(pixels, torch.randint(0, CLASSES, (plan.batch,)))
    dataset = data.Dataset(split, split, tuple("0123456789"), torch.full((3,), 0.5), torch.full((3,), 0.25))
    picked = torch.randperm(plan.batch)
    with live:
        model = models.build(config.network, models.Images(CLASSES, IMAGE_SIZE)).train()
        step = Step(model, config, plan.batch, dataset, CPU)
        for _ in range(2):
            live.reset_peak()
            step(picked, 0.01)
    return live.peak_bytes


def row(arch: str, limit: str) -> list[str]:
    words = ["data=synthetic", f"arch={arch}", f"memory_limit={limit}", "device=cpu"]
    plan = make_plan(compose([*words, "batch=auto"]), CPU, CLASSES, IMAGE_SIZE, IMAGES)
    weights = plan.parameter_bytes + plan.gradient_bytes + plan.optimizer_bytes
    sizes = weights, plan.activation_bytes, plan.scratch_bytes + plan.buffer_bytes, plan.loop_bytes
    measured = live_peak(plan, words)
    return [
        f"{arch}, width {plan.width}",
        *(f"{size / MIB:.1f}" for size in sizes),
        f"{plan.batch:,}",
        f"{plan.peak_bytes:,}",
        f"{measured:,}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["chunked", "hybrid", "resnet18"])
    parser.add_argument("--limit", default="500MiB")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/figures/plan_500mib.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for arch in options.archs:
        rows.append(row(arch, options.limit))
        print(*rows[-1], sep=" | ", flush=True)
    with options.out.open("w", newline="") as file:
        file.write(f"# command: python scripts/plan_table.py; torch {torch.__version__}\n")
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
