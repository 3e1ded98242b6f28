"""A training step on the CPU, side by side with that of another checkout: processor time, its ratio, convolutions.

    git worktree add ../before 75d77b0
    python scripts/step_times.py ../before
    python scripts/step_times.py ../before --archs hybrid --width 16 --batch 64 --repeats 9

Two processes, one for each tree, take turns, and which of them begins alternates: what else the machine does meets
both. A step is forward pass, cross-entropy and backward pass of random images in float32, one thread. What counts is
the time of the processor, not of the clock. Writes docs/figures/step_times.csv:

before, now     median over the repeats
ratio           of this tree's time to the other's in the same turn: median, and the middle half of the turns
convolutions    their share in the step of this tree, by torch's profiler
at least        the ratio that would be left if nothing but the convolutions took time
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

OWN = Path(__file__).resolve().parents[1]
COLUMNS = ("network", "before, s", "now, s", "ratio", "middle half", "convolutions, s", "convolutions, %", "at least")
CONVOLUTIONS = (
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "aten::_slow_conv2d_forward",
    "aten::thnn_conv2d",
)


# ---- one of the two ------------------------------------------------------------------------------


def worker(tree: Path, words: list[str], batch: int) -> None:
    """Do what each line of the standard input asks for, with the package of `tree`."""
    sys.path.insert(0, str(tree / "src"))
    where = tree / "conf"
    spec = importlib.util.spec_from_file_location(
        "revtrain.conf", where / "__init__.py", submodule_search_locations=[str(where)]
    )
    assert spec is not None and spec.loader is not None
    conf = sys.modules["revtrain.conf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    import torch
    import torch.nn.functional as F

    import revtrain
    from revtrain.models import build_model

    assert Path(revtrain.__file__).is_relative_to(tree), revtrain.__file__
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(conf.compose(["data=synthetic", *words]), 10, 32).train()
    with suppress(ImportError):  # the other tree may have none
        from revtrain.machine.device import place

        place(model, torch.device("cpu"))
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        F.cross_entropy(model(images), labels).backward()

    step()
    for line in sys.stdin:
        begin = time.process_time()
        if line.strip() == "step":
            step()
            print(json.dumps(time.process_time() - begin), flush=True)
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
            times = {each.key: each.self_cpu_time_total for each in profile.key_averages()}
            print(json.dumps([sum(times.get(name, 0) for name in CONVOLUTIONS), sum(times.values())]), flush=True)


class Tree:
    """A process that makes steps with the package of one tree."""

    def __init__(self, tree: Path, words: list[str], batch: int):
        command = [sys.executable, "-W", "ignore", __file__, str(tree), "--batch", str(batch), "--worker", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


# ---- the two side by side ------------------------------------------------------------------------


def row(other: Path, words: list[str], batch: int, repeats: int) -> list[str]:
    """A line of the table."""
    trees = Tree(other, words, batch), Tree(OWN, words, batch)
    turns = []
    for index in range(repeats):
        first = index % 2
        seconds = {which: trees[which].ask("step") for which in (first, 1 - first)}
        turns.append((seconds[0], seconds[1]))
    convolutions, total = trees[1].ask("profile")
    for tree in trees:
        tree.end()
    before, now = (statistics.median(column) for column in zip(*turns, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in turns)
    low, _, high = statistics.quantiles(ratios, n=4)
    share = convolutions / total
    return [
        " ".join(words).replace("arch=", "").replace("width=", "width "),
        f"{before:.3f}", f"{now:.3f}",
        f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}",
        f"{share * now:.3f}", f"{100 * share:.0f}", f"{share * now / before:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)  # overrides
    parser.add_argument(
        "--archs", nargs="+", default=["chunked", "hybrid", "layerwise", "irevnet", "revnet", "resnet18"]
    )
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OWN / "docs/figures/step_times.csv")
    options = parser.parse_args()
    other = options.other.resolve()
    if options.worker:
        worker(other, options.worker, options.batch)
        return
    rows = []
    for arch in options.archs:
        rows.append(row(other, [f"arch={arch}", f"width={options.width}"], options.batch, options.repeats))
        print(*rows[-1], sep=" | ", flush=True)
    with options.out.open("w", newline="") as file:
        file.write(f"# python scripts/step_times.py --batch {options.batch} --repeats {options.repeats}\n")
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
