"""A reversible U-Net and a plain one of the same size: overlap with the truth, and memory, on two kinds of images.

    python scripts/segmentation.py                                     # drawn discs and squares in noise
    pip download --no-deps stardist && python -m zipfile -e stardist-*.whl nuclei
    D=nuclei/stardist/data/images
    python scripts/segmentation.py --image $D/img2d.tif --mask $D/mask2d.tif              # nuclei under a microscope

The second is a real image of 512 x 512 pixels with the outline of every nucleus, from the 2018 Data Science Bowl, which
the package stardist ships. Networks are trained on crops of its left three quarters and judged on the rest, which no
crop has seen. Both networks have the same training: Adam, the same crops, the same number of steps.

    python scripts/segmentation.py --image $D/img2d.tif --mask $D/mask2d.tif --folder nuclei/8bit
    revtrain task=segment data=maskfolder data.root=nuclei/8bit data.binary=true data.crop=128 ...   # see the docs

writes both parts as 8-bit files, as `revtrain task=segment` reads them, and trains nothing.

Adds rows to docs/figures/segmentation.csv, those of the same data replaced:

IoU            pixels of a class that are found over those that are of it or taken for it; the mean of all classes but
               the background, mean and deviation over the seeds
bytes/px       live tensors of a training step, parameters apart: what two further sizes of an image add
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain
from revtrain.layers import (
    AdditiveCoupling,
    ChannelPooling,
    ChannelUnpooling,
    DenseHead,
    PartialChain,
    PreNorm,
    Stem,
    intersection_over_union,
)
from revtrain.memory.live import LiveStorages

OUT = Path(__file__).resolve().parents[1] / "docs/figures/segmentation.csv"
COLUMNS = ("data", "network", "parameters", "steps", "seeds", "IoU, %", "deviation", "bytes/px", "CPU s a step")
SLOPE, BATCH, NOISE = 0.2, 4, 0.3  # noise: standard deviation, of a contrast of 1
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # images (B, C, H, W) and labels (B, H, W)


# ---- networks ------------------------------------------------------------------------------------


class Reversible(nn.Module):
    """Couplings, and poolings down and up, in one chain; half of the channels passes each level by."""

    def __init__(self, inputs: int, classes: int, channels: int, levels: int):
        super().__init__()
        self.stem = Stem(inputs, channels, 3, padding=1)
        self.chain = InvertibleChain(self._level(channels, levels), head=DenseHead(channels, classes, SLOPE))

    def _level(self, channels: int, deeper: int) -> list[nn.Module]:
        if not deeper:
            return [self._block(channels), self._block(channels)]
        below = [ChannelPooling(), *self._level(2 * channels, deeper - 1), ChannelUnpooling()]
        return [self._block(channels), PartialChain(channels, below), self._block(channels)]

    @staticmethod
    def _block(channels: int) -> AdditiveCoupling:
        half = channels // 2

        def function() -> PreNorm:
            convolutions = [nn.Conv2d(half, half, 3, padding=1, bias=bias) for bias in (False, True)]
            return PreNorm(
                half, nn.Sequential(nn.LeakyReLU(SLOPE), convolutions[0], nn.LeakyReLU(SLOPE), convolutions[1])
            )

        return AdditiveCoupling(channels, function(), function())

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.chain(self.stem(images), labels).mean()

    def forward(self, images: Tensor) -> Tensor:
        return self.chain(self.stem(images))


class Plain(nn.Module):
    """U-Net as it is usually built: two convolutions a level, max-pooling, skips that are joined on."""

    def __init__(self, inputs: int, classes: int, channels: int, levels: int):
        super().__init__()
        widths = [channels * 2**i for i in range(levels + 1)]
        pairs = zip([inputs, *widths], widths, strict=False)
        self.down = nn.ModuleList(self._two(before, after) for before, after in pairs)
        ups = list(pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, own, 2, stride=2) for own, below in ups)
        self.joined = nn.ModuleList(self._two(2 * own, own) for own, _ in ups)
        self.last = nn.Conv2d(channels, classes, 1)

    @staticmethod
    def _two(before: int, after: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [
                nn.Conv2d(channels, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for index, level in enumerate(self.down):
            x = level(x if not index else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, joined in reversed(list(zip(self.up, self.joined, strict=True))):
            x = joined(torch.cat([skips.pop(), up(x)], 1))
        return self.last(x)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(images), labels)


def parameters_of(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def of_equal_size(inputs: int, classes: int, channels: int, levels: int) -> dict[str, Callable[[], nn.Module]]:
    """The reversible network, and the plain one whose number of parameters is nearest to it."""
    size = parameters_of(Reversible(inputs, classes, channels, levels))
    widths = range(1, 4 * channels)
    width = min(widths, key=lambda each: abs(parameters_of(Plain(inputs, classes, each, levels)) - size))
    return {
        "reversible": lambda: Reversible(inputs, classes, channels, levels),
        "plain": lambda: Plain(inputs, classes, width, levels),
    }


# ---- images --------------------------------------------------------------------------------------


def drawn_shapes(count: int, generator: torch.Generator, side: int = 64) -> tuple[Tensor, Tensor]:
    """Discs (class 1) and squares (class 2), two of each an image, of the same brightness, in noise."""
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    labels = torch.zeros(count, side, side, dtype=torch.int64)
    for kind in (1, 2, 1, 2):
        centres = 8 + (side - 16) * torch.rand(count, 2, 1, 1, generator=generator)
        radii = 4 + 5 * torch.rand(count, 1, 1, generator=generator)
        dy, dx = y - centres[:, 0], x - centres[:, 1]
        inside = dy**2 + dx**2 < radii**2 if kind == 1 else torch.maximum(dy.abs(), dx.abs()) < 0.88 * radii
        labels[inside] = kind
    return ((labels > 0) + NOISE * torch.randn(labels.shape, generator=generator))[:, None].float(), labels


class Nuclei:
    """Crops of the left three quarters of an image, and the rest: background (0) and nucleus (1)."""

    def __init__(self, image: Path, mask: Path, side: int = 128):
        pixels, objects = (torch.from_numpy(np.array(Image.open(each)).astype(np.float32)) for each in (image, mask))
        if pixels.dim() != 2 or pixels.shape != objects.shape:
            raise SystemExit(f"{image} and {mask}: expected grey images of one size, the mask 0 where nothing is.")
        pixels = (pixels - pixels.mean()) / pixels.std()
        cut = 3 * pixels.shape[1] // 4 // 32 * 32
        self.least, self.most = pixels.min(), pixels.max()
        labels = (objects > 0).long()
        self.seen, self.unseen = ((pixels[:, part], labels[:, part]) for part in (slice(0, cut), slice(cut, None)))
        self.side = side

    def crops(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found = []
        for _ in range(count):
            row, column = (
                int(torch.randint(size - self.side + 1, (1,), generator=generator)) for size in self.seen[0].shape
            )
            crop = torch.stack([each[row : row + self.side, column : column + self.side].float() for each in self.seen])
            turns, mirrored = (int(torch.randint(most, (1,), generator=generator)) for most in (4, 2))
            crop = crop.rot90(turns, (1, 2))
            found.append(crop.flip(2) if mirrored else crop)
        both = torch.stack(found)
        return both[:, :1].contiguous(), both[:, 1].long()

    def write(self, folder: Path) -> None:
        """Both parts as `data=maskfolder` reads them; brightness from the least to the greatest in 8 bits."""
        for split, (pixels, labels) in (("train", self.seen), ("test", self.unseen)):
            bright = 255 * (pixels - self.least) / (self.most - self.least)
            for name, values in (("images", bright), ("masks", labels)):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.round().numpy().astype(np.uint8)).save(folder / split / name / "nuclei.png")

    def rest(self) -> tuple[Tensor, Tensor]:
        pixels, labels = self.unseen
        return pixels[None, None].contiguous(), labels[None]


# ---- measuring -----------------------------------------------------------------------------------


def train(network: nn.Module, draw: Draw, steps: int, seed: int) -> float:
    """Processor seconds a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    begin = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        network.loss(*draw(BATCH, generator)).backward()
        optimizer.step()
        schedule.step()
    return (time.process_time() - begin) / steps


@torch.no_grad()
def overlap(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> float:
    """Mean intersection over union, 0..1, of all classes but the background."""
    network.eval()
    taken = torch.cat([network(each).argmax(1) for each in images.split(BATCH)])
    table = torch.bincount((labels * classes + taken).flatten(), minlength=classes**2).view(classes, classes)
    return float(intersection_over_union(table)[1:].mean())


def bytes_a_pixel(network: nn.Module, inputs: int) -> float:
    """What a larger image adds to the live tensors of a step; its gradients are there before."""
    peaks, sides = [], (256, 384)
    for side in (sides[0], *sides):
        images, labels = torch.randn(1, inputs, side, side), torch.zeros(1, side, side, dtype=torch.int64)
        with LiveStorages() as live:
            network.loss(images, labels).backward()
        peaks.append(live.peak_bytes)
    return (peaks[2] - peaks[1]) / (sides[1] ** 2 - sides[0] ** 2)


def rows_for(name: str, draw: Draw, test: tuple[Tensor, Tensor], classes: int, args: argparse.Namespace) -> list[list]:
    rows = []
    for kind, build in of_equal_size(1, classes, args.channels, args.levels).items():
        found, seconds = [], 0.0
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            network = build().train()
            seconds = train(network, draw, args.steps, seed)
            found.append(100 * overlap(network, *test, classes))
            print(f"{name}, {kind}, seed {seed}: IoU {found[-1]:.2f} %", flush=True)
        deviation = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        network = build().train()
        rows.append([
            name, kind, f"{parameters_of(network):,}", args.steps, args.seeds, f"{statistics.mean(found):.2f}",
            deviation, f"{bytes_a_pixel(network, 1):.0f}", f"{seconds:.2f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a grey image; without it: drawn shapes")
    parser.add_argument("--mask", type=Path, help="of the same size, 0 where there is nothing")
    parser.add_argument("--folder", type=Path, help="write the images for `revtrain task=segment` there, and end")
    for name, usual, meaning in (
        ("steps", 300, f"each of {BATCH} images"), ("seeds", 3, "runs of each network"),
        ("channels", 16, "of the reversible network"), ("levels", 2, "below the first"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{meaning} ({usual})")
    args = parser.parse_args()
    if (args.image is None) != (args.mask is None):
        parser.error("--image and --mask belong together")
    if args.image is None:
        test = drawn_shapes(64, torch.Generator().manual_seed(10**6))
        rows = rows_for("discs and squares, 64 x 64", drawn_shapes, test, 3, args)
    else:
        nuclei = Nuclei(args.image, args.mask)
        if args.folder is not None:
            nuclei.write(args.folder)
            return
        height, width = nuclei.unseen[0].shape
        rows = rows_for(f"nuclei, tested on {height} x {width}", nuclei.crops, nuclei.rest(), 2, args)
    before = []
    if OUT.exists():
        with OUT.open(newline="", encoding="utf-8") as file:
            before = [each for each in csv.reader(file) if each and each[0] not in (rows[0][0], COLUMNS[0])]
    with OUT.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *before, *rows])


if __name__ == "__main__":
    main()
