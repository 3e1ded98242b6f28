"""What a training step costs on a GPU: operations and bytes of all architectures, counted, as a table and a picture.

    python scripts/cost_table.py [--batch 512] [--out docs/figures]

Writes gpu_cost.csv, gpu_kinds.csv and, with matplotlib (extra figures), gpu_kinds.png: operations and bytes by kind,
beside those of the engine before its passes were fused (gpu_kinds_before.csv, counted in the same way at 75d77b0).
Needs no GPU. 20 seconds.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

import torch

from revtrain.conf import compose
from revtrain.config import read
from revtrain.planning.cost import CARDS, StepCost, step_cost

CASES = [
    ("chunked", "bf16"), ("chunked", "fp32"), ("layerwise", "fp32"), ("hybrid", "fp32"), ("hybrid", "bf16"),
    ("revnet", "fp32"), ("irevnet", "fp32"), ("resnet18", "fp32"), ("resnet18", "bf16"),
]  # fmt: skip
DRAWN = [("chunked", "bf16"), ("hybrid", "fp32"), ("layerwise", "fp32")]
KINDS = {
    "convolutions and matrices": ("convolution", "convolution_backward", "mm", "addmm"),
    "reading the state": ("read_part",),
    "adding to the state": ("add_to_part_",),
    "norms": ("channel_statistics", "norm_constants", "add_norm_gradient_", "add_norm_rest_", "split_sums",
              "normalise_activate_", "norm_activation_sums", "undo_norm_activation_", "native_batch_norm",
              "native_batch_norm_backward"),
    "activations": ("relu_", "relu", "threshold_backward", "leaky_relu", "leaky_relu_", "leaky_relu_backward"),
}  # fmt: skip
OTHERS = "copies, casts and others"
HERE = Path(__file__).resolve().parents[1]


def kind_of(operation: str) -> str:
    """The row of the picture that an operation belongs to."""
    return next((kind for kind, names in KINDS.items() if operation in names), OTHERS)


def by_kind(cost: StepCost) -> dict[str, tuple[int, float]]:
    """kind -> (operations, GB)."""
    launches: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for name, count in cost.operations.items():
        launches[kind_of(name)] += count
        moved[kind_of(name)] += cost.bytes_moved[name]
    return {kind: (launches[kind], moved[kind] / 1e9) for kind in (*KINDS, OTHERS)}


def counted(arch: str, precision: str, batch: int, *words: str) -> StepCost:
    return step_cost(read(compose([f"arch={arch}", f"precision={precision}", *words])), batch)


def write(path: Path, header: list[str], rows: list[list[str]], batch: int) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# python scripts/cost_table.py --batch {batch}; 32x32 pixels, default widths and depths; ")
        file.write(f"counted on fake tensors, torch {torch.__version__.partition('+')[0]}\n")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw(folder: Path) -> None:
    """Operations and bytes by kind, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tables = {}
    for when in ("before", "now"):
        name = "gpu_kinds_before.csv" if when == "before" else "gpu_kinds.csv"
        with (folder / name).open() as file:
            for row in csv.DictReader(line for line in file if not line.startswith("#")):
                tables[row["network"], when, row["kind"]] = float(row["operations"]), float(row["GB"])
    networks = list(dict.fromkeys(network for network, _, _ in tables))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    labels = [f"{network}, {when}" for network in networks for when in ("before", "now")]
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for which, (axis, title) in enumerate(zip(axes, ("operations of a step", "GB read and written"), strict=True)):
        left = [0.0] * len(labels)
        for colour, kind in zip(colours, (*KINDS, OTHERS), strict=False):
            values = [tables[n, when, kind][which] for n in networks for when in ("before", "now")]
            axis.barh(labels, values, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for place, value in enumerate(left):
            axis.text(value, place, f" {value:,.0f}", va="center", fontsize=8)
        axis.set_title(title)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(folder / "gpu_kinds.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, kinds = [], []
    for arch, precision in CASES:
        whole = counted(arch, precision, options.batch, "chunk_mib=4096")
        default = counted(arch, precision, options.batch, "chunk_mib=11")
        milliseconds = [1e3 * default.seconds(card, precision != "fp32") for card in CARDS]
        rows.append([
            f"{arch}, {precision}", f"{whole.launches:,}", f"{default.launches:,}", f"{whole.total_bytes / 1e9:.1f}",
            f"{whole.multiplications / 1e12:.2f}", *(f"{each:.0f}" for each in milliseconds),
        ])  # fmt: skip
        if (arch, precision) in DRAWN:
            for kind, (operations, gigabytes) in by_kind(whole).items():
                kinds.append([f"{arch} {precision}", kind, str(operations), f"{gigabytes:.2f}"])
        print(*rows[-1], sep="  ", flush=True)
    cards = [f"ms on {card.name}, estimated" for card in CARDS]
    header = ["network", "operations, one piece", "operations, chunk_mib=11", "GB moved", "T multiplications", *cards]
    write(options.out / "gpu_cost.csv", header, rows, options.batch)
    write(options.out / "gpu_kinds.csv", ["network", "kind", "operations", "GB"], kinds, options.batch)
    if (options.out / "gpu_kinds_before.csv").exists():
        draw(options.out)


if __name__ == "__main__":
    main()
