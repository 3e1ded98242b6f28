"""Draws Figures 10 to 13 of arXiv 1910.11127: the SNR along whole networks, and what it does to accuracy.

    python scripts/network_figures.py 10 12 data=imagefolder data.root=FOLDER      # at initialisation
    revtrain -m experiment=fig11_depth data.root=FOLDER            # and fig11_slope, fig13_depth, fig13_slope
    python scripts/network_figures.py 11 13 --runs outputs/sweeps                  # from the runs so far, at any time
    python scripts/network_figures.py precision data=imagefolder data.root=FOLDER  # a table: what 16 bit costs

Each writes PNG, SVG and the numbers as CSV into docs/figures. Figures 10 and 12: width 32, 256 images, n = 0.2; lines
are the theory of `numerics.theory` where it applies, markers measurements. Figures 11 and 13 are of the runs
that have ended, averaged over seeds; an experiment of which there are none keeps the rows that it has in the CSV.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from revtrain.conf import compose
from revtrain.config import read
from revtrain.data import load_data, normalise
from revtrain.machine.device import autocast
from revtrain.models import build_model
from revtrain.numerics.fidelity import summarise_gradients
from revtrain.numerics.gradients import probe_gradients
from revtrain.numerics.snr import SNR_CEILING_DB, probe_snr
from revtrain.numerics.theory import predict_snr_db
from revtrain.runs.read import Epoch, gather

FIGURES = Path("docs/figures")
CPU = torch.device("cpu")
VARIED = {"depth": "depth N (units of the trunk)", "slope": "negative slope n of LeakyReLU"}
AT_ONE_SIZE = "depth N (units of the trunk), at one number of parameters"
CHANCE = 10.0  # %, of ten classes: where a run that diverged is drawn
COLOURS = ("#08519c", "#d95f02", "#41ab5d", "#7b3294")  # differ in grey, too, and for the colour-blind
# curves of Figure 10: label, arch, what is changed
LAYERWISE = [
    ("as the paper has it", "layerwise_no_epsilon", ()),
    ("ours: bounded convolutions, gains of mixed signs", "layerwise", ()),
    ("the same, all gains negative", "layerwise", ("norm_sign=negative",)),
]
HYBRID = [
    ("streams in plain float32", "hybrid", ("stream=plain",)),
    ("ours: streams on a grid", "hybrid", ()),
]


# ---------------------------------------------------------------- Figures 10 and 12: along the layers


def images_of(words: Iterable[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data(read(compose(list(words))).data)
    chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))[:count]
    return normalise(data.train.images[chosen], data.mean, data.std), data.train.labels[chosen]


def network(arch: str, words: Iterable[str]) -> tuple[torch.nn.Module, Any]:
    cfg = compose([f"arch={arch}", *words])
    read(cfg)
    torch.manual_seed(0)
    return build_model(cfg, 10, 32), cfg


def along_layers(figure: int, curves: list, depth: int, words: list[str], count: int) -> list[dict[str, Any]]:
    """One row for each layer of each curve, from the images to the head."""
    images, labels = images_of(words, count)
    rows = []
    for label, arch, changes in curves:
        model, cfg = network(arch, [*words, f"depth={depth}", *changes])
        measured = probe_snr(model, images, labels)
        predicted = predict_snr_db(model, images, white=False) if cfg.arch == "layerwise" else {}
        for index, (layer, db) in enumerate(sorted(measured.items(), key=lambda each: _order(each[0]))):
            theory = predicted.get(layer)
            rows.append({
                "curve": label, "index": index, "layer": layer, "block_input": layer.count("/") == 1,
                "snr_db": round(db, 2),
                "theory_db": None if theory is None else round(min(theory, SNR_CEILING_DB), 2),
            })  # fmt: skip
        lowest = min(measured.values())
        print(f"Figure {figure}, {label}: N = {depth}, minimum {lowest:.1f} dB, {len(measured)} layers", flush=True)
    return rows


def _order(layer: str) -> tuple:
    """Forward order: a block's own input before that of the layers inside it."""
    return tuple(part.split("_")[0] for part in layer.split("/"))


def draw_layers(figure: int, rows: list[dict[str, Any]], depth: int) -> Figure:
    picture, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for colour, label in zip(COLOURS, dict.fromkeys(row["curve"] for row in rows), strict=False):
        of_curve = [row for row in rows if row["curve"] == label]
        inside = [row for row in of_curve if figure == 10 or not row["block_input"]]
        inputs = [row for row in of_curve if figure == 12 and row["block_input"]]
        axes.plot([r["index"] for r in inside], [r["snr_db"] for r in inside], "o", ms=3.5, color=colour, label=label)
        if inputs:
            axes.plot([r["index"] for r in inputs], [r["snr_db"] for r in inputs], "s", ms=7, mfc="none", color=colour,
                      label="the same, inputs of blocks")  # fmt: skip
        theory = [row for row in of_curve if row["theory_db"] is not None]
        if theory:
            axes.plot([r["index"] for r in theory], [r["theory_db"] for r in theory], "-", lw=1, color=colour)
    if figure == 10:
        axes.plot([], [], "k-", lw=1, label="lines: theory, variance of each element")
    if any(row["snr_db"] >= SNR_CEILING_DB for row in rows):
        axes.axhline(SNR_CEILING_DB, color="0.7", lw=0.8, ls=":")
        axes.annotate("exact", (0, SNR_CEILING_DB), xytext=(8, 4), textcoords="offset points", color="0.4", fontsize=8)
    name = "layer-wise" if figure == 10 else "hybrid"
    axes.set_xlabel("layer, from the images to the head (the backward pass runs from right to left)")
    axes.set_ylabel("SNR of the rebuilt input (dB)")
    axes.set_title(f"Figure {figure}: SNR through the layers, {name}, N = {depth}, at initialisation", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right" if figure == 10 else "center right")
    return picture


# ---------------------------------------------------------------- Figures 11 and 13: over depth and slope


def _variant(config: dict[str, Any]) -> str:
    """Whose choices a layer-wise network follows; of all others there are ours only."""
    if config["arch"] != "layerwise" or config.get("max_gain") is not None:
        return "ours"
    return "the paper's choices" if config.get("epsilon_i") else "the paper's choices, no epsilon_i"


def read_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """What the figures need of every run below `folders` that was completed, or ended because it diverged."""
    found, problems = gather(folders)
    for problem in problems:
        print(f"not read: {problem.path} ({problem.reason})")
    runs = []
    for run in found:
        error = (run.error or "").split("\n")[0]
        diverged = run.status == "failed" and ("no longer finite" in error or "the loss became" in error)
        if not (run.completed or diverged):
            print(f"left out: {run.path} ({run.status})")
            continue
        config = run.config
        probes = [line for line in run.history if line.snr_minimum_db is not None]
        ends = [("before", probes[0], run.first_snr_db), ("after", probes[-1], run.snr_db)] if probes else []
        runs.append({
            "experiment": config["experiment"], "depth": config["depth"], "slope": config["slope"],
            "variant": _variant(config), "backward": config["backward"],
            "seed": config["seed"], "diverged": diverged,
            "accuracy": None if diverged else 100 * run.test_accuracy,
            **{f"{name}_{when}": value
               for when, line, layers in (ends[:1] if diverged else ends)
               for name, value in _fidelity(line, layers).items()},
        })  # fmt: skip
    return runs


def _fidelity(line: Epoch, layers: dict[str, float]) -> dict[str, float | None]:
    return {
        "snr_db": line.snr_minimum_db,
        "input_snr_db": min(db for layer, db in layers.items() if layer.count("/") == 1),
        "cosine": line.gradient_cosine,
    }


MEASURES = ("accuracy", *(f"{n}_{w}" for w in ("before", "after") for n in ("snr_db", "input_snr_db", "cosine")))


def over_seeds(runs: list[dict[str, Any]], experiment: str, key: str) -> list[dict[str, Any]]:
    """One row for each variant, value of `key` and backward mode."""
    groups = defaultdict(list)
    for run in runs:
        if run["experiment"] == experiment:
            groups[run["variant"], run[key], run["backward"]].append(run)
    rows = []
    for (variant, value, backward), members in sorted(groups.items()):
        row = {"experiment": experiment, "variant": variant, key: value, "backward": backward, "seeds": len(members)}
        for name in MEASURES:
            values = [member[name] for member in members if member.get(name) is not None]
            row[name] = statistics.mean(values) if values else None
        accuracies = [member["accuracy"] for member in members if member["accuracy"] is not None]
        row["accuracy_sd"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        row["diverged"] = sum(member["diverged"] for member in members)
        rows.append(row)
    return rows


def rows_before(path: Path, experiment: str) -> list[dict[str, Any]]:
    """Rows of an experiment as `write` wrote them."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == experiment]
    texts = ("experiment", "variant", "backward")
    return [
        {key: value if key in texts else float(value) if value else None for key, value in row.items() if key}
        for row in rows
    ]


def draw_accuracy(figure: int, tables: dict[str, list[dict[str, Any]]]) -> Figure:
    name = "layer-wise" if figure == 11 else "hybrid"
    columns = len(tables)
    picture, axes = plt.subplots(
        2, columns, figsize=(4.5 * columns, 6.4), sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for column, (key, rows) in enumerate(tables.items()):
        for colour, variant in zip(COLOURS, sorted({row["variant"] for row in rows}), strict=False):
            for backward, style in (("store", "s--"), ("invert", "o-")):
                of_curve = [row for row in rows if row["variant"] == variant and row["backward"] == backward]
                _curve(axes[1, column], of_curve, key, "accuracy", style, colour, f"{variant}, {backward}")
                lost = [row[key] for row in of_curve if row["diverged"]]
                axes[1, column].plot(lost, [CHANCE] * len(lost), "x", color=colour, ms=8, mew=2,
                                     label=f"{variant}, {backward}: diverged" if lost else None)  # fmt: skip
            for when, style in (("before", "o:"), ("after", "o-")):
                invert = [row for row in rows if row["variant"] == variant and row["backward"] == "invert"]
                _curve(axes[0, column], invert, key, f"snr_db_{when}", style, colour, f"{variant}, {when} training")
        axes[1, column].set_xlabel(AT_ONE_SIZE if (figure, key) == (13, "depth") else VARIED[key])
        if key == "slope":
            axes[1, column].set_xscale("log")
            ticks = sorted({row["slope"] for row in rows})
            axes[1, column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes[1, column].minorticks_off()
        for row in (0, 1):
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("minimum SNR (dB)")
    axes[1, 0].set_ylabel("test accuracy (%)")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    picture.suptitle(f"Figure {figure}: {name}, minimum SNR and accuracy; `invert` beside `store`", fontsize=11)
    return picture


def _curve(axes: Axes, rows: list[dict], key: str, measure: str, style: str, colour: str, label: str) -> None:
    rows = [row for row in rows if row[measure] is not None]
    if not rows:
        return
    spread = [row["accuracy_sd"] or 0.0 for row in rows] if measure == "accuracy" else None
    hollow = {"mfc": "none"} if style[0] == "s" or style[-1] == ":" else {}
    axes.errorbar([row[key] for row in rows], [row[measure] for row in rows], spread, fmt=style, color=colour, ms=5,
                  lw=1.2, capsize=2, label=label, **hollow)  # fmt: skip


def table_of(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: `invert` beside `store`, and how well it rebuilt."""
    lines = [
        "| variant | | seeds | store % | invert % | gap, points | minimum SNR, dB (block inputs), before "
        "| after training | least gradient cosine, before | after |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, rows in tables.items():
        found = {(row["variant"], row[key], row["backward"]): row for row in rows}
        for variant, value in sorted({(row["variant"], row[key]) for row in rows}):
            store, invert = found.get((variant, value, "store")), found.get((variant, value, "invert"))
            if not (store and invert):
                continue
            both = store["accuracy"] is not None and invert["accuracy"] is not None
            cells = [
                variant, f"{key} {value:g}", f"{invert['seeds']:g}", _percent(store), _percent(invert),
                f"{store['accuracy'] - invert['accuracy']:+.2f}" if both else "-",
                *(_decibels(invert[f"snr_db_{w}"], invert[f"input_snr_db_{w}"]) for w in ("before", "after")),
                *(_cosine(invert[f"cosine_{w}"]) for w in ("before", "after")),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return "diverged"
    spread = "" if row["accuracy_sd"] is None else f" ± {row['accuracy_sd']:.2f}"
    return f"{row['accuracy']:.2f}{spread}" + (f" ({row['diverged']:g} diverged)" if row["diverged"] else "")


def _decibels(minimum: float | None, inputs: float | None) -> str:
    if minimum is None:
        return "-"
    return f"{minimum:.1f} ({'exact' if inputs >= SNR_CEILING_DB else f'{inputs:.1f}'})"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


# ---------------------------------------------------------------- the table of precisions


def precisions(words: list[str], count: int) -> str:
    """Markdown: minimum SNR and gradients of every reversible network at initialisation, in each precision."""
    images, labels = images_of(words, count)
    cases = [("revnet", ()), ("irevnet", ()), ("chunked", ()), ("hybrid", ())]
    cases += [("layerwise", (f"depth={depth}",)) for depth in (3, 6, 9, 12)]
    lines = [
        "| | fp32: minimum SNR, dB | fp16 | bf16 | fp32: least gradient cosine | fp16 | bf16 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arch, changes in cases:
        decibels, cosines = [], []
        for precision in ("fp32", "fp16", "bf16"):
            model, _ = network(arch, [*words, f"precision={precision}", *changes])
            inputs = (
                images if precision == "fp32" else images.to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
            )
            with autocast(CPU, precision):
                least = min(probe_snr(model, inputs, labels).values())
                gradients = summarise_gradients(probe_gradients(model, inputs, labels))
            decibels.append("exact" if least >= SNR_CEILING_DB else f"{least:.1f}")
            cosines.append(f"{gradients['minimum_cosine']:.4f}")
        lines.append(f"| {' '.join([arch, *changes])} | {' | '.join([*decibels, *cosines])} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


# ---------------------------------------------------------------- command


def write(picture: Figure, rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.savefig(folder / f"{name}.png", dpi=130)
    picture.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(picture)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        fields = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print(f"{folder / name}.png, .svg, .csv")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="10, 11, 12, 13, precision; then configuration, as data.root=FOLDER")
    parser.add_argument("--runs", nargs="+", type=Path, default=[Path("outputs/sweeps")], help="folders of runs")
    parser.add_argument("--images", type=int, default=256, help="probe batch of Figures 10 and 12 and the table (256)")
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_intermixed_args(argv)
    figures, words = [w for w in args.what if "=" not in w], [w for w in args.what if "=" in w]
    if unknown := set(figures) - {"10", "11", "12", "13", "precision"}:
        parser.error(f"{', '.join(sorted(unknown))}: there is no such figure; 10, 11, 12, 13 or precision")
    for figure, name, curves, depth in (
        (10, "fig10_layerwise_snr", LAYERWISE, 10),
        (12, "fig12_hybrid_snr", HYBRID, 6),
    ):
        if str(figure) in figures:
            rows = along_layers(figure, curves, depth, words, args.images)
            write(draw_layers(figure, rows, depth), rows, args.out, name)
    runs = read_runs(args.runs) if {"11", "13"} & set(figures) else []
    for figure, name in ((11, "fig11_layerwise_accuracy"), (13, "fig13_hybrid_accuracy")):
        if str(figure) in figures:
            found = {key: over_seeds(runs, f"fig{figure}_{key}", key) for key in VARIED}
            if not any(found.values()):
                parser.error(f"no completed run of experiment=fig{figure}_depth or fig{figure}_slope in "
                             f"{', '.join(map(str, args.runs))}; run them first, see --help")  # fmt: skip
            kept = {
                key: rows or rows_before(args.out / f"{name}.csv", f"fig{figure}_{key}") for key, rows in found.items()
            }
            tables = {key: rows for key, rows in kept.items() if rows}
            rows = [row for table in tables.values() for row in table]
            write(draw_accuracy(figure, tables), rows, args.out, name)
            (args.out / f"{name}.md").write_text(table_of(tables) + "\n")
            print(table_of(tables))
    if "precision" in figures:
        (args.out / "snr_precision.md").write_text(precisions(words, args.images) + "\n")


if __name__ == "__main__":
    main()
