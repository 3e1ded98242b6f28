"""One image as the whole batch: memory by its size, the time of tiles, and a real step beside its plan.

    python scripts/large_images.py                                   # memory alone: a minute, nothing is allocated
    python scripts/large_images.py --times 512 --measure 1024 2048   # real steps besides, on one thread: minutes
    python scripts/large_images.py --sizes 256 512 --settings "arch=chunked width=8"

Writes large_images.csv, large_images_times.csv and large_images_measured.csv into docs/figures, from where `python
scripts/docs_tables.py` takes them into docs/large-images.md. Columns:

bytes/px    what a step adds to parameters, their gradients and momentum, counted on fake tensors, for each pixel
scratch     of that, what is not a straight line through the two largest sizes
in all      the peak of a step, parameters and all
tiled       processor seconds of a step of one image in tiles, over those with the image whole; the least of each
process     by how much the process grew in a real step (the most resident memory), beside the plan
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from revtrain.conf import compose
from revtrain.kernels.pieces import set_chunk_mib
from revtrain.models import build_model
from revtrain.planning.predict import StepPredictor

MIB = 2**20
SETTINGS = ("arch=chunked width=32", "arch=chunked width=32 precision=bf16", "arch=chunked width=16 precision=bf16",
            "arch=layerwise width=32", "arch=hybrid width=32", "task=segment width=16",
            "task=segment width=16 precision=bf16")  # fmt: skip
TILES, WHOLE = (2, 8), 10**6  # MiB of a piece: what chunk_mib=auto is on a CPU, and more; the image is not cut
WARM_UP_SIDE = 256  # pixels: what libraries load is loaded then


def predicted(words: str, side: int):
    """Of a step of one square image, on fake tensors."""
    return StepPredictor(compose(words.split()), 10, side)(1)


def memory_rows(settings: list[str], sizes: list[int]) -> list[list[str]]:
    rows = []
    for words in settings:
        steps = {side: predicted(words, side) for side in sizes}
        added = {side: s.forward_backward - s.parameters - s.gradients - s.optimizer for side, s in steps.items()}
        small, large = sizes[-2:]
        slope = (added[large] - added[small]) / (large**2 - small**2)
        for side in sizes:
            scratch = (added[side] - slope * side**2) / MIB
            cells = f"{added[side] / side**2:.1f}", f"{slope:.1f}", f"{scratch:.1f}", f"{steps[side].peak / MIB:,.0f}"
            rows.append([words, str(side), *cells])
    return rows


def step(model: torch.nn.Module, side: int) -> float:
    """Processor seconds of a forward and a backward pass of one image."""
    images, labels = torch.randn(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    F.cross_entropy(model(images), labels).backward()
    return time.process_time() - start


def time_rows(words: str, side: int, repeats: int) -> list[list[str]]:
    model = build_model(compose(words.split()), 10, side).train()
    seconds: dict[int, list[float]] = {chunk_mib: [] for chunk_mib in (*TILES, WHOLE)}
    for _ in range(repeats):
        for chunk_mib, found in seconds.items():
            set_chunk_mib(model, chunk_mib)
            found.append(step(model, side))
    least = {chunk_mib: min(found) for chunk_mib, found in seconds.items()}
    return [
        [f"{words} chunk_mib={each}", str(side), f"{least[each]:.1f}", f"{least[WHOLE]:.1f}",
         f"{least[each] / least[WHOLE]:.2f}"]
        for each in TILES
    ]  # fmt: skip


def measure(words: str, side: int) -> None:
    """Print by how many MiB this process grows in a step."""
    model = build_model(compose(words.split()), 10, side).train()
    step(model, WARM_UP_SIDE)
    before = most_resident_mib()
    step(model, side)
    print(most_resident_mib() - before)


def most_resident_mib() -> float:
    """Of this process so far, on Linux; what `resource` tells begins with that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measured_row(words: str, side: int) -> list[str]:
    command = [sys.executable, __file__, "--in-this-process", "--settings", words, "--measure", str(side)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    planned = predicted(words, side)
    added = (planned.forward_backward - planned.parameters - planned.gradients - planned.optimizer) / MIB
    return [words, str(side), f"{added:,.0f}", f"{grown:,.0f}"]


def write(folder: Path, name: str, header: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    with (folder / name).open("w", newline="") as file:
        file.write(f"# python scripts/large_images.py\n# torch {torch.__version__}, one thread\n")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    for row in [header, *rows]:
        print("  ".join(row))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        default=[512, 1024, 2048, 4096, 8192],
        help="sides in pixels; none: leave the table as it is",
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="words of revtrain, one text each")
    parser.add_argument("--times", type=int, nargs="*", default=[], help="sides for tiled against whole")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=int, nargs="*", default=[], help="sides for a real step beside its plan")
    parser.add_argument("--real", default="arch=chunked width=16", help="settings of the real steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "figures")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.in_this_process:
        measure(args.settings[0], args.measure[0])
        return
    header = ["settings", "side, pixels", "bytes/px", "slope, bytes/px", "scratch, MiB", "in all, MiB"]
    write(args.out, "large_images.csv", header, memory_rows(args.settings, sorted(args.sizes)) if args.sizes else [])
    header = ["settings", "side, pixels", "in tiles, s", "whole, s", "tiled / whole"]
    rows = [row for side in args.times for row in time_rows(args.real, side, args.repeats)]
    write(args.out, "large_images_times.csv", header, rows)
    header = ["settings", "side, pixels", "planned, MiB", "process, MiB"]
    write(args.out, "large_images_measured.csv", header, [measured_row(args.real, each) for each in args.measure])


if __name__ == "__main__":
    main()
