"""What it costs to read parts of large images from disk while a network trains, against images in memory.

    python scripts/streaming.py                        # 16 images of 4,096 x 4,096, parts of 256 x 256; five minutes
    python scripts/streaming.py --side 2048 --steps 8

Random images (smoothed noise, which compresses as photographs do) are written to a temporary folder in each format,
and a small network takes training steps on parts of them: read ahead by threads, read when the step asks for them, and
the same parts lying in memory. Each format has a process of its own. Writes docs/figures/streaming.csv:

time         processor and waiting time of a step, over that of the same steps with images in memory: the median of
             `--rounds` rounds in which the three take turns
memory       by how much the process grows over its first step, at most, beside what the whole set would take as uint8
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from revtrain.conf import compose
from revtrain.config import read
from revtrain.data import Split, load_data
from revtrain.machine import device as devices
from revtrain.models import Images, build
from revtrain.step.feed import FromDisk, OnDevice
from revtrain.training.step import Step

OUT = Path(__file__).resolve().parents[1] / "docs/figures/streaming.csv"
COLUMNS = (
    "format", "images", "part", "a file, MiB", "set, MiB", "process grows by, MiB",
    "step, read ahead / in memory", "step, read when asked / in memory",
)  # fmt: skip
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "TIFF, tiles": ".tif"}
CPU, MIB, BATCH = torch.device("cpu"), 2**20, 4


def write_images(folder: Path, suffix: str, count: int, side: int) -> None:
    """Half of the images for each of two classes; the test set is one of each."""
    for index in range(count + 2):
        noise = np.random.default_rng(index).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        place = folder / ("train" if index < count else "test") / "ab"[index % 2] / f"{index}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".tif":
            import pyvips

            pyvips.Image.new_from_array(np.asarray(image)).tiffsave(
                str(place), tile=True, tile_width=256, tile_height=256, compression="deflate", predictor="horizontal"
            )
        else:
            image.save(place, quality=90)


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def measure(folder: Path, part: int, steps: int, rounds: int) -> dict[str, float]:
    """The figures of one format, in this process."""
    torch.set_num_threads(1)
    words = (
        "data=imagefolder", f"data.root={folder}", f"data.crop={part}", f"data.crops={steps}", "data.workers=1",
        "arch=chunked", "width=16", "depth=4", "pooling=[channel]", f"batch={BATCH}", "data.augment.cutout=0",
    )  # fmt: skip
    config = read(compose(list(words)))
    data = load_data(config.data, 2)
    model = devices.place(build(config.network, Images(2, data.image_size)), CPU)
    step = Step(model, config, BATCH, data, CPU)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: BATCH * (steps + 1)]
    batches = order.split(BATCH)
    step(batches[0], 0.01, batches[1])
    before, grown = resident_mib(), 0.0
    in_memory = OnDevice(Split(*data.train.read(order, 1)), CPU)  # the same parts

    def seconds(kind: str) -> float:
        nonlocal grown
        step.feed = in_memory if kind == "in memory" else FromDisk(data.train, CPU)
        begin = time.perf_counter()
        for index, batch in enumerate(batches[:-1]):
            picked = torch.arange(index * BATCH, (index + 1) * BATCH) if kind == "in memory" else batch
            step(picked, 0.01, batches[index + 1] if kind == "ahead" else None)
            grown = max(grown, resident_mib() - before)
        step.feed.close()
        return time.perf_counter() - begin

    kinds = ("ahead", "when asked", "in memory")
    found = [{kind: seconds(kind) for kind in kinds} for _ in range(rounds)]
    ratios = {kind: statistics.median(each[kind] / each["in memory"] for each in found) for kind in kinds[:2]}
    return {"grown": grown, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual, meaning in (
        ("images", 16, "in the training set"), ("side", 4096, "of an image, pixels"), ("part", 256, "side, pixels"),
        ("steps", 12, f"of {BATCH} parts, a round"), ("rounds", 5, "of steps"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{meaning} ({usual})")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.part, args.steps, args.rounds)))
        return
    rows = []
    for name, suffix in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), suffix, args.images, args.side)
            own = statistics.mean(each.stat().st_size for each in Path(folder).glob("train/*/*")) / MIB
            sizes = [f"--{each}={getattr(args, each)}" for each in ("part", "steps", "rounds")]
            words = [sys.executable, __file__, f"--measure={folder}", *sizes]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        whole = 3 * args.images * args.side**2 / MIB
        rows.append([
            name, f"{args.images} of {args.side} x {args.side}", f"{args.part} x {args.part}", f"{own:.1f}",
            f"{whole:,.0f}", f"{found['grown']:.0f}", f"{found['ahead']:.2f}", f"{found['when asked']:.2f}",
        ])  # fmt: skip
        print(*rows[-1], sep="  ", flush=True)
    with OUT.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
