"""The gradient of a whole training set in one pass, its memory planned first and its values checked afterwards.

    python scripts/full_batch.py data=imagefolder data.root=FOLDER        # CIFAR-10 as a folder of images
    python scripts/full_batch.py --images 2000 width=8                    # drawn images, a short trial

Default: arch=chunked width=16, all images of the training set in one batch. Three passes:

train       one step's gradient with batch normalisation over all images: the peak of live bytes against the plan
eval        the same with running statistics, which makes the loss a sum over images
accumulated the sum of the gradients of small batches, also with running statistics: must equal the second pass

Prints the plan, the measured peaks and the relative differences of the gradients.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.conf import compose
from revtrain.config import read
from revtrain.data import load_data, normalise
from revtrain.memory.live import LiveStorages
from revtrain.models import build_model
from revtrain.planning.plan import StepPredictor

MIB = 2**20
DEFAULTS = ("arch=chunked", "width=16", "data=synthetic")


def gradient(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[float, list[Tensor], float]:
    """(mean loss, its gradient for every parameter, seconds) over `images` in batches of `batch`."""
    model.zero_grad(set_to_none=True)
    started, total = time.perf_counter(), 0.0
    for some, their in zip(images.split(batch), labels.split(batch), strict=True):
        loss = F.cross_entropy(model(some), their, reduction="sum") / len(labels)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters()], time.perf_counter() - started


def relative_difference(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """|a - b| / |b| of all parameters together, and of the worst single one."""
    pairs = [((x - y).double().norm().item(), y.double().norm().item()) for x, y in zip(a, b, strict=True)]
    whole = sum(d * d for d, _ in pairs) ** 0.5 / sum(n * n for _, n in pairs) ** 0.5
    return whole, max(d / n for d, n in pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="configuration, e.g. data=imagefolder data.root=FOLDER width=8")
    parser.add_argument("--images", type=int, help="so many of the training set (all)")
    parser.add_argument("--small-batch", type=int, default=1000, help="of the accumulated gradients (1000)")
    args = parser.parse_intermixed_args(argv)
    cfg = compose([*DEFAULTS, *args.overrides])

    data = load_data(read(cfg).data)
    count = min(args.images or len(data.train.labels), len(data.train.labels))
    predicted = StepPredictor(cfg, len(data.classes), data.image_size)(count)
    print(
        f"{cfg.arch}, width {cfg.width}, depth {cfg.depth}: {count:,} images of {data.image_size} "
        f"in one batch\nplanned    {predicted.peak / MIB:,.1f} MiB at the peak, "
        f"{predicted.peak / count / data.image_size.pixels:.1f} bytes per pixel with weights and all",
        flush=True,
    )
    torch.manual_seed(cfg.seed)
    images = normalise(data.train.images[:count], data.mean, data.std)
    labels = data.train.labels[:count].clone()
    with LiveStorages() as live:
        model = build_model(cfg, len(data.classes), data.image_size).train()
        live.reset_peak()
        loss, _, seconds = gradient(model, images, labels, count)
        print(
            f"train      loss {loss:.6f}; peak {live.peak_bytes / MIB:,.1f} MiB live, {_resident_mib():,.0f} MiB "
            f"resident in all; {seconds:.0f} s",
            flush=True,
        )
        model.eval()
        live.reset_peak()
        loss, whole, seconds = gradient(model, images, labels, count)
        print(f"eval       loss {loss:.6f}; peak {live.peak_bytes / MIB:,.1f} MiB live; {seconds:.0f} s", flush=True)
    loss, summed, seconds = gradient(model, images, labels, args.small_batch)
    print(f"accumulated loss {loss:.6f} over batches of {args.small_batch:,}; {seconds:.0f} s")
    together, worst = relative_difference(whole, summed)
    print(f"gradients  one pass against accumulated: relative difference {together:.1e}, worst parameter {worst:.1e}")


def _resident_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (MIB if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
