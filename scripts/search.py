"""A search over architecture, size and recipe: test accuracy against bytes per pixel, ResNet-18 in the same run.

    python scripts/search.py --budget 30 --out outputs/search data.root=FOLDER      # FOLDER/train/CLASS/*, test/CLASS/*
    python scripts/search.py --budget 60 --runs-at-once 2 --sizes 2500k,11m --epochs 16 --out outputs/search \\
      --also "arch=chunked size=2500k residual_scale=1" scale=full precision=bf16 data.root=FOLDER          # on a GPU

Candidates are --archs x --sizes x --recipes, and what --also adds, in every recipe. All train for a part of the epochs,
the better half for twice as many, up to --epochs in the last of --rungs, there with all --seeds. Better: nearer to the
Pareto front. ResNet-18 is in every rung, at every size.

Each run is `revtrain -m ... hydra.sweep.dir=OUT/runs`: the same command again skips what is complete and goes on with
what Ctrl-C or the end of --budget cut off. Words KEY=VALUE are for all runs, beside data=imagefolder scale=small
probe.every=0 backward=store (the same network in less time; bytes are of backward=invert). OUT has search.csv and .png.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from revtrain.conf import compose
from revtrain.config import word
from revtrain.planning.plan import plan
from revtrain.report.group import pareto
from revtrain.runs import sweeps
from revtrain.runs.read import read_result

USUAL = ("data=imagefolder", "scale=small", "probe.every=0", "backward=store")
REFERENCE, ARCHS = "resnet18", "revnet,irevnet,layerwise,hybrid,chunked"


class Candidate:
    """A network and a recipe: the words for it, beside those of all runs.

    `accuracies` are of its runs, 0..1: epochs -> one for each seed; the bytes are those of backward=invert.
    """

    def __init__(self, own: Sequence[str], common: Sequence[str]):
        self.own, self.common = tuple(own), tuple(common)
        found = plan(compose([*common, *own, "backward=invert"]))
        self.arch, self.parameters, self.bytes_per_pixel = found.arch, found.parameters, found.bytes_per_pixel
        self.accuracies: dict[int, list[float]] = {}

    def run(self, epochs: int, seed: int) -> list[str]:
        return [*self.common, *self.own, f"epochs={epochs}", f"seed={seed}"]


def front_of(candidates: Sequence[Candidate], epochs: int) -> list[Candidate]:
    points = [(each.bytes_per_pixel, statistics.mean(each.accuracies[epochs])) for each in candidates]
    return [candidates[index] for index in pareto(points)]


def better_half(candidates: Sequence[Candidate], epochs: int) -> list[Candidate]:
    """Front by front, until half of them are there; ResNet-18 stays in any case."""
    kept = [each for each in candidates if each.arch == REFERENCE]
    left = [each for each in candidates if each.arch != REFERENCE]
    while left and len(kept) < (len(candidates) + 1) // 2:
        front = front_of(left, epochs)
        kept, left = [*kept, *front], [each for each in left if each not in front]
    return kept


def unlike(listed: Sequence[tuple[str, ...]], common: Sequence[str]) -> list[tuple[str, ...]]:
    """Without those that are what one before them is: a recipe may change nothing for an architecture."""
    found: dict[str, tuple[str, ...]] = {}
    for own in listed:
        found.setdefault(fingerprint_of([*common, *own]), own)
    return list(found.values())


def fingerprint_of(words: Sequence[str]) -> str:
    """Of the whole configuration, as in the name of a job's folder."""
    config: dict[str, Any] = OmegaConf.to_container(compose(words), resolve=True)  # type: ignore[assignment]
    return sweeps.fingerprint(config)


def accuracy_of(words: Sequence[str], out: Path) -> float | None:
    """The test accuracy, 0..1, of the completed job with these words in the sweep's folder."""
    results = [read_result(folder) for folder in (out / "runs").glob(f"*-{fingerprint_of(words)}")]
    return next((each["test_accuracy"] for each in results if each and each["status"] == "completed"), None)


def work_off(runs: Sequence[list[str]], out: Path, at_once: int, deadline: float) -> bool:
    """Train what is not complete, so many at a time; False where the time was up. What runs then saves its state."""
    left, target = [words for words in runs if accuracy_of(words, out) is None], word("hydra.sweep.dir", f"{out}/runs")
    running: list[subprocess.Popen[bytes]] = []
    with open(out / "search.log", "ab") as log:
        while left or running:
            running = [each for each in running if each.poll() is None]
            if time.monotonic() > deadline:
                for each in running:
                    each.terminate()
                for each in running:
                    each.wait()
                return False
            while left and len(running) < at_once:
                command = [sys.executable, "-m", "revtrain", "-m", *left.pop(0), target]
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(0.1)
    return True


def search(args: argparse.Namespace, common: Sequence[str]) -> list[Candidate]:
    """All candidates, with what their runs came to."""
    deadline, recipes = time.monotonic() + 60 * args.budget, args.recipes.split(",")
    archs = dict.fromkeys([REFERENCE, *args.archs.split(",")])
    listed = [(f"arch={arch}", f"size={size}") for size, arch in product(args.sizes.split(","), archs)]
    listed += [tuple(shlex.split(each)) for each in args.also]
    everyone = candidates = [
        Candidate(own, common) for own in unlike([(*own, f"recipe={r}") for own, r in product(listed, recipes)], common)
    ]
    for halvings in reversed(range(args.rungs)):
        epochs, seeds = max(1, args.epochs >> halvings), 1 if halvings else args.seeds
        runs = [each.run(epochs, seed) for seed in range(seeds) for each in candidates]
        in_time = work_off(runs, args.out, args.runs_at_once, deadline)
        for each in candidates:
            found = [accuracy_of(each.run(epochs, seed), args.out) for seed in range(seeds)]
            each.accuracies |= {epochs: known} if (known := [value for value in found if value is not None]) else {}
        candidates = [each for each in candidates if epochs in each.accuracies]
        print(f"{epochs} epochs: {len(candidates)} candidates{'' if in_time else '; the time is up'}", flush=True)
        if not in_time:
            break
        candidates = better_half(candidates, epochs)
    return everyone


def rows_of(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A row for each candidate and rung, the longest training first; `front` marks the Pareto front of each rung."""
    rows = []
    for epochs in sorted({each for candidate in candidates for each in candidate.accuracies}, reverse=True):
        there = sorted((c for c in candidates if epochs in c.accuracies), key=lambda c: c.bytes_per_pixel)
        for each in there:
            found = [100 * value for value in each.accuracies[epochs]]
            rows.append({
                "epochs": epochs, "arch": each.arch, "settings": " ".join(each.own[1:]),
                "parameters": f"{each.parameters:,}", "bytes/px": f"{each.bytes_per_pixel:.0f}",
                "test accuracy, %": f"{statistics.mean(found):.2f}",
                "deviation": f"{statistics.stdev(found):.2f}" if len(found) > 1 else "",
                "seeds": str(len(found)), "front": "yes" if each in front_of(there, epochs) else "",
            })  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]], caption: str, path: Path) -> None:
    """Accuracy against bytes per pixel, a front for each rung: the longest training full, shorter ones hollow."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes, archs = figure.subplots(), sorted({row["arch"] for row in rows})
    for epochs in sorted({row["epochs"] for row in rows}, reverse=True):
        rung, last, front = [row for row in rows if row["epochs"] == epochs], epochs == rows[0]["epochs"], []
        for row in rung:
            point, colour = (float(row["bytes/px"]), float(row["test accuracy, %"])), f"C{archs.index(row['arch'])}"
            axes.plot(*point, "o", color=colour, fillstyle="full" if last else "none", markersize=9 if last else 6)
            if row["front"]:
                front.append(point)
                axes.annotate(row["settings"], point, (0, 7), textcoords="offset points", fontsize=7, ha="center")
        line = {"color": "#888888", "linestyle": "-" if last else ":", "label": f"Pareto front, epochs: {epochs}"}
        axes.step(*zip(*front, strict=True), where="post", **line)
    for index, arch in enumerate(archs):
        axes.plot([], [], "o", color=f"C{index}", label=arch)
    axes.set(xscale="log", xlabel="bytes per input pixel, backward=invert", ylabel="test accuracy, %")
    axes.set_title(caption, fontsize=8)
    axes.margins(0.12)
    figure.legend(fontsize=8, loc="outside right center")  # beside the points, not over one
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--also", action="append", default=[], help='as in "arch=chunked size=180k depth=9"')
    parser.add_argument("--out", type=Path, default=Path("outputs/search"), help="folder (outputs/search)")
    for name, usual, meaning in (
        ("budget", 30.0, "minutes"), ("runs-at-once", 1, "processes"), ("archs", ARCHS, f"beside {REFERENCE}"),
        ("sizes", "180k", "of conf/size"), ("recipes", "paper,fast", "of conf/recipe"),
        ("epochs", 4, "of the last rung"), ("rungs", 2, "each of twice the epochs"), ("seeds", 1, "of the last rung"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(usual), default=usual, help=f"{meaning} ({usual})")
    args = parser.parse_intermixed_args(argv)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    given = {each.partition("=")[0] for each in args.words}
    common = [*(each for each in USUAL if each.partition("=")[0] not in given), *args.words]
    rows = rows_of(search(args, common))
    if not rows:
        print(f"Nothing was completed: give a larger --budget, or see {args.out}/search.log.")
        return 1
    typed = ["data.root=FOLDER" if each.startswith("data.root=") else each for each in argv or sys.argv[1:]]
    command = shlex.join(["python", "scripts/search.py", *typed])
    cfg = compose(common)
    images = f"{cfg.data.name}, {cfg.data.train_limit or 'all'} training images"
    data = f"{images}, batch {cfg.batch}, backward={cfg.backward}"
    with open(args.out / "search.csv", "w", newline="", encoding="utf-8") as file:
        file.write(f"# command: {command}\n# data: {data}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, f"{data}; parameters and seeds: search.csv\n{command}", args.out / "search.png")
    print(f"{args.out}/search.csv, search.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
