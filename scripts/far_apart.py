"""A task that patches cannot solve: one reversible network on whole images, and on patches of them.

    python scripts/far_apart.py --processes 2      # both, and what else sees the whole image: a quarter of an hour
    python scripts/far_apart.py --stages 256,256,4,0.01 --out FILE     # a small trial
    python scripts/far_apart.py --seeds                  # memory and time anew, accuracies as they are

The data are `data=far_apart`: two marks, one in the left and one in the right quarter; are they of the same kind? Both
ways train the same network from the same weights by the same optimizer, each image once, stage
after stage (STAGES). Whole: the image. Patches: its four quarters, with the label of the image, those of
all images shuffled, as many pixels a step; the answer for an image is the mean of its quarters' logits. Patches leave
out images whose quarters the network's poolings do not divide. Written anew after each training, so it may be stopped.

Writes docs/figures/far_apart.csv, one row for each way to train:

test accuracy  of each seed, at the size of the last stage; ways that compute the same are not trained
gradient of    the whole image, or patches of it
difference     |g - g_store| / |g_store|, Euclidean norms over all parameters, where both are of the whole image
bytes/px       live tensors of a step of one image (patch), parameters and their gradients apart, over its pixels
peak           of a step of one image (patch), all in all
CPU s          processor seconds of forward and backward pass of one image, one thread, the least of some
BN updates     times that a step moves the running statistics of a batch norm
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.conf import compose
from revtrain.config import read
from revtrain.data import Dataset, load_data, normalise
from revtrain.memory.live import LiveStorages
from revtrain.models import build_model

OUT = Path(__file__).resolve().parents[1] / "docs/figures/far_apart.csv"
NETWORK = (
    "arch=chunked width=2 depth=10 expansion=[1] pooling=[channel,batch,channel,batch,channel,batch,batch,batch,batch]"
)
MIB = 2**20
# Side in pixels, images, batch, greatest learning rate. The last stage has 2 x 2 values, and channels enough: with two
# channel poolings, a quarter of them, the network needs several times as many images.
STAGES = ((1024, 256, 4, 0.01),)
SETTLING = 16  # images that the batch norms' running statistics are taken of in the end
COLUMNS = (
    "trained on", "backward pass", "test accuracy, %", "gradient of", "difference", "bytes/px", "peak, MiB",
    "CPU s an image", "BN updates",
)  # fmt: skip


def network(words: str, side: int, backward: str = "invert") -> nn.Module:
    return build_model(compose([*words.split(), "data=far_apart", f"backward={backward}"]), 2, side).train()


class Checkpointed(nn.Module):
    """The stored network with its blocks run under torch's checkpoint: (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, stored: nn.Module, checkpoints: type[nn.Sequential]):
        super().__init__()
        self.stem, self.state_format = stored.stem, stored.trunk.state_format
        self.blocks, self.head = checkpoints(*stored.trunk.layers), stored.trunk.head  # in the order of the stored one

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.state_format.snap(self.stem(images))))


def quarters(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> their quarters (4 B, C, H/2, W/2), those of an image one after the other."""
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, 2, height // 2, 2, width // 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(4 * batch, channels, height // 2, width // 2)


def stages(text: str) -> tuple[tuple[int, int, int, float], ...]:
    """256,256,4,0.01/512,128,4,0.005 as numbers."""
    found = (part.split(",") for part in text.split("/"))
    return tuple((int(side), int(images), int(batch), float(rate)) for side, images, batch, rate in found)


# ---- training ------------------------------------------------------------------------------------


def drawn(side: int, train: int, test: int, seed: int) -> Dataset:
    words = [f"data.image_size={side}", f"data.train_images={train}", f"data.test_images={test}", f"data.seed={seed}"]
    return load_data(read(compose(["data=far_apart", *words])).data)


def logits_of(model: nn.Module, images: Tensor, patches: bool) -> Tensor:
    """(B, classes): of the image, or the mean over its quarters."""
    return model(quarters(images)).view(len(images), 4, -1).mean(1) if patches else model(images)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, patches: bool) -> float:
    """Of the test images, in percent."""
    model.eval()
    hits = 0
    for images, labels in zip(data.test.images.split(2), data.test.labels.split(2), strict=True):
        logits = logits_of(model, normalise(images, data.mean, data.std), patches)
        hits += int((logits.argmax(1) == labels).sum())
    model.train()
    return 100 * hits / len(data.test)


@torch.no_grad()
def settle_statistics(model: nn.Module, data: Dataset, batch: int, patches: bool) -> None:
    """Running statistics as the mean over some training images: those of a short training lag behind the weights."""
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    usual, found = [each.momentum for each in norms], []
    for norm in norms:
        norm.momentum = 1.0  # they are the batch's then
    for images in data.train.images[:SETTLING].split(batch):
        logits_of(model, normalise(images, data.mean, data.std), patches)
        found.append([(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms])
    for norm, momentum, values in zip(norms, usual, zip(*found, strict=True), strict=True):
        means, variances = (torch.stack(each).mean(0) for each in zip(*values, strict=True))
        norm.momentum = momentum
        norm.running_mean.copy_(means)
        norm.running_var.copy_(variances)


def train(model: nn.Module, data: Dataset, batch: int, rate: float, patches: bool, seed: int) -> float:
    """One epoch; the mean loss of its last quarter."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    parts = 4 if patches else 1
    order = torch.randperm(parts * len(data.train), generator=torch.Generator().manual_seed(seed))
    steps = order.split(parts * batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    losses = []
    for chosen in steps:
        which, labels = chosen // parts, data.train.labels[chosen // parts]
        images = data.train.images[which]
        if patches:  # of different images: a batch norm must not see an image's other quarters
            images = torch.cat(
                [quarters(image[None])[part][None] for image, part in zip(images, chosen % parts, strict=True)]
            )
        loss = F.cross_entropy(model(normalise(images, data.mean, data.std)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def trained_accuracy(args: argparse.Namespace, seed: int, patches: bool) -> float:
    """Of the test images, in percent; a line for each size that says how far training got."""
    least = 2 ** len(compose(args.network.split()).pooling)  # pixels a side that the poolings divide
    plan = [each for each in args.stages if not each[0] // (2 if patches else 1) % least]
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    begin, model = time.process_time(), network(args.network, plan[0][0] // (2 if patches else 1))
    for number, (side, images, batch, rate) in enumerate(plan):
        last = number == len(plan) - 1
        data = drawn(side, images, args.test if last else 4, 10 * seed + number)
        loss = train(model, data, batch, rate, patches, seed)
        what = f"{'patches' if patches else 'whole images'}, seed {seed}, {side} x {side}"
        print(f"{what}: loss {loss:.3f}, {time.process_time() - begin:.0f} CPU s", flush=True)
    settle_statistics(model, data, batch, patches)
    found = accuracy(model, data, patches)
    print(f"{what}: test {found:.1f} %, {time.process_time() - begin:.0f} CPU s", flush=True)
    return found


def trained(args: argparse.Namespace, trainings: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, float]]:
    """(trained on, seed, accuracy in percent) of each training, as they end."""
    if args.processes == 1:
        for trained_on, seed in trainings:
            yield trained_on, seed, trained_accuracy(args, seed, trained_on == "patches")
        return
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:  # autograd's threads do not survive a fork
        running = {pool.submit(trained_accuracy, args, seed, on == "patches"): (on, seed) for on, seed in trainings}
        for each in as_completed(running):
            yield *running[each], each.result()


# ---- measuring -----------------------------------------------------------------------------------


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()


def peak_bytes(make: Callable[[], nn.Module], side: int) -> tuple[int, int]:
    """(most live bytes of the second of two steps on one square image, those of parameters and their gradients)."""
    with LiveStorages() as live:
        model = make()
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            images, labels = torch.randn(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
            live.reset_peak()
            step(model, images, labels)
            peak = live.peak_bytes
            del images, labels
    fixed = [*model.parameters(), *model.parameters(), *model.buffers()]
    return peak, sum(each.numel() * each.element_size() for each in fixed)


def least_seconds(model: nn.Module, images: Tensor, repeats: int) -> float:
    """Processor seconds of a step on all of these images, one at a time."""
    found = []
    for _ in range(repeats + 1):  # the first warms up
        begin = time.process_time()
        for image in images.split(1):
            step(model, image, torch.zeros(1, dtype=torch.int64))
        found.append(time.process_time() - begin)
    return min(found[1:])


def flat_gradient(model: nn.Module, images: Tensor) -> Tensor:
    step(model, images, torch.zeros(len(images), dtype=torch.int64))
    return torch.cat([each.grad.flatten().double() for each in model.parameters()])


def ways_to_train(words: str, side: int) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """(trained on, backward pass, how the network is made)."""
    from benchmark_memory import CheckpointEach, CheckpointSegments  # beside this file: there where it is run

    def stored() -> nn.Module:
        return network(words, side, "store")

    return [
        ("whole images", "inverted", lambda: network(words, side)),
        ("whole images", "stored", stored),
        ("whole images", "checkpoint, each block", lambda: Checkpointed(stored(), CheckpointEach)),
        ("whole images", "checkpoint, sqrt(N) segments", lambda: Checkpointed(stored(), CheckpointSegments)),
        ("patches", "inverted", lambda: network(words, side // 2)),
    ]


def measured_row(words: str, side: int, trained_on: str, make: Callable[[], nn.Module], repeats: int) -> list[str]:
    """Whose gradient it is, and the columns after it."""
    from benchmark_memory import bn_updates

    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, dtype=torch.int64)
    patches = trained_on == "patches"
    inputs = quarters(images) if patches else images
    peak, fixed = peak_bytes(make, inputs.shape[-1])
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    exact = flat_gradient(network(words, side, "store"), images)
    difference = float((flat_gradient(model, inputs) - exact).norm() / exact.norm())
    updates = bn_updates(model, lambda: step(model, inputs[:1], labels))
    return [
        "patches" if patches else "the whole image",
        "" if patches else f"{difference:.0e}" if difference else "0",
        f"{(peak - fixed) / inputs[0, 0].numel():.1f}",
        f"{peak / MIB:,.1f}",
        f"{least_seconds(model, inputs, repeats):.2f}",
        f"{max(updates):g}",
    ]


def write(args: argparse.Namespace, measured: Sequence[Sequence[str]], found: dict[str, list[str]]) -> None:
    """The accuracies stand with what was trained."""
    percent_of = {name: ", ".join(found.get(name, [])) for name in ("whole images", "patches")}
    rows = [[*row[:2], percent_of[row[0]] if row[1] == "inverted" else "", *row[2:]] for row in measured]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        plan = "; ".join(f"{side} x {side}: {images}, batch {batch}" for side, images, batch, _ in args.stages)
        file.write(
            f"# python scripts/far_apart.py\n# {args.network}\n# trained on {plan}; "
            f"{args.test} test images; an accuracy for each seed\n# torch {torch.__version__}, one thread, float32\n"
        )
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def rows_before(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(line for line in file if not line.startswith("#"))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0], help="of weights and images; none: leave accuracies as they are"
    )
    parser.add_argument("--stages", type=stages, default=STAGES, help="side,images,batch,rate of each; / between them")
    parser.add_argument("--side", type=int, default=1024, help="of images whose memory and time is measured (1024)")
    parser.add_argument("--test", type=int, default=64, help="test images (64)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed steps (2); 0: leave memory and time as they are in the file"
    )
    parser.add_argument("--network", default=NETWORK, help="words of revtrain")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, one thread each (1)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {"whole images": [], "patches": []}
    if not args.seeds and args.out.exists():
        found = {row[0]: row[2].split(", ") for row in rows_before(args.out) if row[2]} or found
    measured = [] if args.repeats else [[*row[:2], *row[3:]] for row in rows_before(args.out)]
    for trained_on, backward, make in ways_to_train(args.network, args.side) if args.repeats else ():
        measured.append([trained_on, backward, *measured_row(args.network, args.side, trained_on, make, args.repeats)])
        print("  ".join(measured[-1]), flush=True)
    write(args, measured, found)
    percent_of: dict[str, dict[int, str]] = {trained_on: {} for trained_on in found}
    for trained_on, seed, percent in trained(args, [(each, seed) for seed in args.seeds for each in found]):
        percent_of[trained_on][seed] = f"{percent:.1f}"
        found[trained_on] = [each for _, each in sorted(percent_of[trained_on].items())]
        write(args, measured, found)


if __name__ == "__main__":
    main()
