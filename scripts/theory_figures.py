"""Draws Figures 6 and 7 of arXiv 1910.11127: how much precision the inverses of BN and LeakyReLU lose.

    python scripts/theory_figures.py                       # both, into docs/figures/fig06_* and fig07_*
    python scripts/theory_figures.py --figure 7 --elements 16777216
    python scripts/theory_figures.py --chain               # theory_chain.md: networks, predicted and measured
    python scripts/theory_figures.py --decibels            # theory_decibels.md: what the closed forms mean in dB

Lines are the closed forms of `numerics.theory`, markers experiments: Gaussian input, white noise of 1e-5 of the root
mean square of the output, the layer's own inverse. The strip below each panel shows by how many per cent they differ.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from revtrain.conf import compose
from revtrain.config import read
from revtrain.data import load_data, normalise
from revtrain.layers import CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.models import build_model
from revtrain.numerics.snr import SNR_CEILING_DB, probe_snr
from revtrain.numerics.theory import (
    alpha_batchnorm,
    alpha_batchnorm_toy,
    alpha_coupling,
    alpha_leakyrelu,
    alpha_leakyrelu_symmetric,
    alpha_of,
    decibels,
    least_alpha_batchnorm,
    measure_alpha,
    measure_alpha_leakyrelu,
    noise_gain_leakyrelu,
    noise_gain_of_sign_changes,
    predict_snr_db,
    read_chain,
    rho_with_epsilon,
    snr_cap_of_unbiased_variance,
)
from revtrain.optim import make_optimizer

NOISE = 1e-5
EPSILONS = (0.0, 0.1, 0.5)
MEANS = (-1.0, 0.0, 1.0)
CHANNELS = (2, 4, 16, 64)
# differ in grey, too, and for the colour-blind
COLOURS = ("#08519c", "#d95f02", "#41ab5d", "#7b3294")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Point:
    """One experiment beside its closed form: a row of the CSV file."""

    case: str
    dtype: str
    x: float
    alpha_theory: float
    alpha_measured: float

    @property
    def deviation_percent(self) -> float:
        return 100 * (self.alpha_measured / self.alpha_theory - 1)


# ---------------------------------------------------------------- experiments


def gaussian(channels: int, elements: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """About `elements` values, (4, channels, 64, W), zero mean and unit variance."""
    return torch.randn(4, channels, 64, max(1, elements // (256 * channels)), dtype=dtype, generator=generator)


def batchnorm(gamma: torch.Tensor, beta: torch.Tensor, epsilon_i: float) -> InvertibleBatchNorm2d:
    layer = InvertibleBatchNorm2d(len(gamma), epsilon_i).to(gamma.dtype)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
    return layer


def toy_batchnorm(elements: int, generator: torch.Generator) -> list[Point]:
    """Two channels, gamma = (1, rho), beta = 0, over six decades of rho (Eq. 19c, with epsilon_i: Eq. 23)."""
    points = []
    for name, dtype in DTYPES.items():
        x = gaussian(2, elements, dtype, generator)
        for epsilon_i in EPSILONS:
            for rho in np.logspace(-3, 3, 19).tolist():
                layer = batchnorm(torch.tensor([1.0, rho], dtype=dtype), torch.zeros(2), epsilon_i)
                theory = alpha_batchnorm_toy(rho_with_epsilon(rho, epsilon_i))
                measured = measure_alpha(layer, x, NOISE, generator)
                points.append(Point(f"epsilon_i={epsilon_i:g}", name, rho, theory, measured))
    return points


def random_batchnorm(elements: int, generator: torch.Generator) -> tuple[list[Point], list[float]]:
    """Random gamma, beta, mean and variance (Eq. 22c, corrected); and alpha with the noise gain as printed.

    |gamma| and the deviation are log-normal, that of gamma ever wider; means and beta are normal. More channels take
    more elements: where one channel carries all the noise, it alone decides about the scatter.
    """
    points, as_printed = [], []
    for channels in CHANNELS:
        for spread in np.linspace(0.05, 2.0, 12).tolist():
            normal = torch.randn(4, channels, dtype=torch.float64, generator=generator)
            gamma, beta = torch.exp(spread * normal[0]) * normal[1].sign(), normal[1]
            deviation, mean = torch.exp(0.5 * normal[2]), normal[3]
            for name, dtype in DTYPES.items():
                x = gaussian(channels, max(elements, channels * elements // 16), dtype, generator) * deviation.to(
                    dtype
                ).view(1, -1, 1, 1)
                x += mean.to(dtype).view(1, -1, 1, 1)
                statistics = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
                theory = alpha_batchnorm(*statistics, gamma, beta)
                measured = measure_alpha(batchnorm(gamma.to(dtype), beta, 0.0), x, NOISE, generator)
                points.append(Point(f"{channels} channels", name, theory, theory, measured))
                as_printed.append(with_printed_gain(*statistics, gamma, beta))
    return points, as_printed


def with_printed_gain(mean: torch.Tensor, variance: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> float:
    """Eq. 22c with the noise gain of the draft's 21c, gamma / sigma."""
    energy_in, energy_out = mean.square() + variance, gamma.square() + beta.square()
    return alpha_of(energy_in.mean().item(), energy_out.mean().item(), (gamma.square() / variance).mean().item())


def leakyrelu(elements: int, generator: torch.Generator) -> list[Point]:
    """Slopes of six decades (Eq. 28c), for inputs of mean 0 and, in the general form, of mean -1 and 1."""
    points = []
    for name, dtype in DTYPES.items():
        x = gaussian(1, 2 * elements, dtype, generator)
        for mean in MEANS:
            for slope in np.logspace(-3, 3, 19).tolist():
                measured = measure_alpha_leakyrelu(x + mean, slope, NOISE, generator)
                points.append(Point(f"mean={mean:g}", name, slope, leakyrelu_of_gaussian(mean, slope), measured))
    return points


def gaussian_halves(mean: float) -> tuple[float, float, float, float]:
    """p, E+, E- of Eq. 28c's general form for a Gaussian of unit variance, and its density at 0."""
    share, density = 0.5 * math.erfc(-mean / math.sqrt(2)), math.exp(-(mean**2) / 2) / math.sqrt(2 * math.pi)
    positive = (1 + mean**2) * share + mean * density
    return share, positive, 1 + mean**2 - positive, density


def leakyrelu_of_gaussian(mean: float, slope: float) -> float:
    """alpha for a Gaussian of unit variance and noise that changes no signs."""
    return alpha_leakyrelu(*gaussian_halves(mean)[:3], slope)


def sign_changes_percent(mean: float, slope: float) -> float:
    """By how much noise of NOISE raises alpha because some small activations come back with the other sign."""
    share, positive, negative, density = gaussian_halves(mean)
    plain = noise_gain_leakyrelu(share, slope)
    deviation = NOISE * math.sqrt(positive + slope**2 * negative)
    return 100 * (plain / (plain + noise_gain_of_sign_changes(slope, deviation, density)) - 1)


# ---------------------------------------------------------------- drawing


def draw_points(above: Axes, below: Axes, points: list[Point], cases: Iterable[str], labels: Callable[[str], str]):
    """Markers above, their deviation below: circles for float64, crosses for float32."""
    for case, colour in zip(cases, COLOURS, strict=False):
        for name in DTYPES:
            mine = [p for p in points if p.case == case and p.dtype == name]
            style = {"marker": "o", "mfc": "none", "ms": 6} if name == "float64" else {"marker": "x", "ms": 4.5}
            style |= {"color": colour, "linestyle": "none", "mew": 1.1}
            above.plot([p.x for p in mine], [p.alpha_measured for p in mine], label=labels(f"{case}, {name}"), **style)
            below.plot([p.x for p in mine], [p.deviation_percent for p in mine], **style)


def finish(above: Axes, below: Axes, xlabel: str, title: str, note: str = "deviation, %\n(grey: 1 %)") -> None:
    above.set(xscale="log", yscale="log", ylabel="alpha = SNR of x / SNR of y (no unit)")
    above.set_title(title, fontsize=10.5, loc="left")
    above.tick_params(labelbottom=False)
    below.axhspan(-1, 1, color="#dddddd", zorder=0, linewidth=0)
    below.axhline(0, color="#777777", linewidth=0.8)
    below.set(xlabel=xlabel, ylabel=note, ylim=(-2.2, 2.2))
    for axes in (above, below):
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def keys(above: Axes, **kwargs) -> None:
    """Legend: a line for each closed form, and the two kinds of marker once."""
    circle, cross = (
        plt.Line2D([], [], color="black", linestyle="none", marker=marker, mfc="none", label=f"measured, {name}")
        for marker, name in (("o", "float64"), ("x", "float32"))
    )
    handles, _ = above.get_legend_handles_labels()
    above.legend(handles=[*handles, circle, cross], fontsize=9, frameon=False, **kwargs)


def unlabelled(_: str) -> str:
    return "_nolegend_"


def figure_6(elements: int, generator: torch.Generator) -> tuple[Figure, dict[str, list[Point]]]:
    toy = toy_batchnorm(elements, generator)
    random, as_printed = random_batchnorm(elements, generator)
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 6.2), layout="constrained", height_ratios=[3.2, 1], sharex="col"
    )  # fmt: skip
    (left, right), (left_below, right_below) = axes
    rho = np.logspace(-3, 3, 200)
    for epsilon_i, colour in zip(EPSILONS, COLOURS, strict=False):
        name = f"theory, epsilon_i = {epsilon_i:g}" + (" (Eq. 19c)" if epsilon_i == 0 else " (Eq. 23)")
        left.plot(rho, [alpha_batchnorm_toy(rho_with_epsilon(r, epsilon_i)) for r in rho], color=colour, label=name)
    draw_points(left, left_below, toy, [f"epsilon_i={e:g}" for e in EPSILONS], unlabelled)
    finish(left, left_below, "rho = gamma_2 / gamma_1 (no unit)", "BN, two channels, gamma = (1, rho), beta = 0")
    keys(left, loc="lower center")

    ends = [min(p.x for p in random) / 2, 2 * max(p.x for p in random)]
    right.plot(ends, ends, color="black", linewidth=1, label="theory = measured (Eq. 22c, corrected)")
    printed_label = "noise gain gamma / sigma, as printed"
    right.plot(as_printed, [p.alpha_measured for p in random], "+", color="#aaaaaa", ms=5, label=printed_label)
    for colour, channels in zip(COLOURS, CHANNELS, strict=True):
        right.plot([], [], "s", color=colour, label=f"{channels} channels")
    draw_points(right, right_below, random, [f"{channels} channels" for channels in CHANNELS], unlabelled)
    finish(right, right_below, "alpha by theory (no unit)", "BN, random gamma, beta, mean and variance")
    right.set(xlim=ends, ylim=ends, ylabel="alpha, measured (no unit)")
    keys(right, loc="upper left")
    figure.suptitle("Figure 6: precision that the inverse of batch normalisation loses", fontsize=12, weight="bold")
    return figure, {"fig06_left": toy, "fig06_right": random}


def figure_7(elements: int, generator: torch.Generator) -> tuple[Figure, dict[str, list[Point]]]:
    points = leakyrelu(elements, generator)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6.2), layout="constrained", height_ratios=[3.2, 1], sharex=True
    )  # fmt: skip
    slopes = np.logspace(-3, 3, 200)
    for mean, colour in zip(MEANS, COLOURS, strict=False):
        name = "theory, mean 0 (Eq. 28c)" if mean == 0 else f"theory, mean {mean:g} (28c, any input)"
        above.plot(slopes, [leakyrelu_of_gaussian(mean, n) for n in slopes], color=colour, label=name)
        below.plot(slopes, [sign_changes_percent(mean, n) for n in slopes], color=colour, linewidth=0.9)
    draw_points(above, below, points, [f"mean={mean:g}" for mean in MEANS], unlabelled)
    note = "deviation, %\n(lines: signs\nchanged)"
    finish(above, below, "slope n (no unit)", "LeakyReLU y = n x for x < 0; Gaussian input of unit variance", note)
    above.axvline(0.2, color="#555555", linewidth=0.9, linestyle=":")
    above.text(0.185, 1.5e-5, "n = 0.2", rotation=90, ha="right", va="center", fontsize=9, color="#555555")
    keys(above, loc="lower center", bbox_to_anchor=(0.6, 0))
    figure.suptitle("Figure 7: precision that the inverse of LeakyReLU loses", fontsize=12, weight="bold")
    return figure, {"fig07": points}


# ---------------------------------------------------------------- tables


def decibels_table() -> str:
    """10 log10(alpha) of the layers' closed forms at a few parameters, and the cap that the unbiased variance sets."""

    def row(layer: str, name: str, values: Iterable[float | str], losses: Iterable[float], digits: int = 1) -> str:
        shown = " / ".join(f"{decibels(alpha):.{digits}f}" for alpha in losses)
        return f"| {layer} | {name} = {' / '.join(map(str, values))} | {shown} |"

    rhos, epsilons, slopes = (1, 0.5, 0.1, 0.001), (0.05, 0.1, 0.2, 0.5), (0.5, 0.2, 0.1, 0.05, 0.001)
    gains = {"0.005": 0.005, "1/3 (torch's initialisation)": 1 / 3, "1": 1.0, "3": 3.0, "10": 10.0}
    values = {"8x8": 8 * 8 * 256, "32x32": 32 * 32 * 256}  # of a channel, N in Eq. 14
    rows = [
        row("BN, gamma = (1, rho), Eq. 19c", "rho", rhos, map(alpha_batchnorm_toy, rhos)),
        row("BN, \\|gamma\\| <= 1, Eq. 23: the least alpha", "epsilon_i", epsilons,
            [least_alpha_batchnorm(1.0, e) for e in epsilons]),
        row("LeakyReLU, symmetric input, Eq. 28c", "n", slopes,
            map(alpha_leakyrelu_symmetric, slopes)),
        row("coupling, F and G of the same energy gain", "f = g", gains,
            [alpha_coupling(g, g) for g in gains.values()]),
        row("unbiased variance: the cap of the SNR", "256 images", values,
            map(snr_cap_of_unbiased_variance, values.values()), 0),
    ]  # fmt: skip
    return "\n".join(["| layer | at | 10 log10 alpha, dB |", "|---|---|---|", *rows]) + "\n"


CHAIN_HEADER = """| N | n | SGD steps | measured | white | each element | largest errors | mean alpha |
|---|---|---|---|---|---|---|---|"""
CHAIN_CASES = [
    (3, 0.2, 0),
    (6, 0.2, 0),
    (9, 0.2, 0),
    (12, 0.2, 0),
    (6, 0.05, 0),
    (12, 1.0, 0),
    (6, 0.2, 10),
    (6, 0.2, 60),
]
KINDS = {"conv": CouplingConv2d, "BN": InvertibleBatchNorm2d, "LeakyReLU": InvertibleLeakyReLU}


def chain_row(depth: int, slope: float, steps: int, width: int, batch: int, seed: int) -> str:
    """A layer-wise network after some steps of training without noise: SNR in dB of its first layer's input.

    Measured, and predicted with white noise or with the variance of each element. The largest errors of the two are
    over the layers whose measured SNR is between 20 dB and exact; alpha is the mean in dB over layers of a kind.
    """
    overrides = ["arch=layerwise", "data=synthetic", "lr=0.1", f"depth={depth}", f"slope={slope}", f"width={width}"]
    overrides += ["norm_sign=positive", "max_gain=null"]  # as the paper has it
    torch.manual_seed(seed)
    model, twin = (build_model(compose([*overrides, f"backward={mode}"])) for mode in ("invert", "store"))
    cfg = compose([*overrides, f"data.train_images={batch * (steps + 1)}"])
    data = load_data(read(cfg).data)
    images, labels = normalise(data.train.images, data.mean, data.std), data.train.labels
    optimizer = make_optimizer(twin.train(), read(cfg).training)
    for step in range(1, steps + 1):
        chosen = slice(batch * step, batch * (step + 1))
        optimizer.zero_grad()
        F.cross_entropy(twin(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.load_state_dict(twin.state_dict())
    probe = images[:batch]  # not trained on
    measured = probe_snr(model, probe, labels[:batch])
    white, each = predict_snr_db(model, probe), predict_snr_db(model, probe, white=False)
    seen = [name for name, snr_db in measured.items() if 20 < snr_db < SNR_CEILING_DB]
    errors = [max((predicted[name] - measured[name] for name in seen), key=abs) for predicted in (white, each)]
    layers = read_chain(model, probe).values()
    alphas = ", ".join(
        f"{name} {np.mean([decibels(t.alpha) for t in layers if isinstance(t.layer, kind)]):+.1f}"
        for name, kind in KINDS.items()
    )
    ends = " | ".join(f"{list(values.values())[-1]:.1f}" for values in (measured, white, each))
    return f"| {depth} | {slope:g} | {steps} | {ends} | {errors[0]:+.1f}, {errors[1]:+.1f} | {alphas} |"


# ---------------------------------------------------------------- the command


def write_csv(path: Path, points: list[Point]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*(field.name for field in fields(Point)), "deviation_percent"])
        for point in points:
            rows.writerow(
                [f"{v:.6g}" if isinstance(v, float) else v for v in (*astuple(point), point.deviation_percent)]
            )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", type=int, nargs="+", default=[6, 7], choices=[6, 7])
    parser.add_argument("--chain", action="store_true", help="the table of whole networks instead (a minute)")
    parser.add_argument("--decibels", action="store_true", help="the table of the closed forms in dB instead")
    parser.add_argument("--elements", type=int, default=2**21, help="values of x in each experiment (2097152)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (docs/figures)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.decibels:
        show(decibels_table())
        (args.output / "theory_decibels.md").write_text(decibels_table())
    if args.chain:
        rows = [CHAIN_HEADER]
        for depth, slope, steps in CHAIN_CASES:
            rows.append(chain_row(depth, slope, steps, width=8, batch=32, seed=args.seed))
            show(rows[-1])
        (args.output / "theory_chain.md").write_text("\n".join(rows) + "\n")
    if args.decibels or args.chain:
        return
    for number, draw in ((6, figure_6), (7, figure_7)):
        if number not in args.figure:
            continue
        figure, tables = draw(args.elements, torch.Generator().manual_seed(args.seed))
        name = {6: "fig06_batchnorm", 7: "fig07_leakyrelu"}[number]
        for suffix in ("png", "svg"):
            figure.savefig(args.output / f"{name}.{suffix}", dpi=120)
        plt.close(figure)
        for table, points in tables.items():
            write_csv(args.output / f"{table}.csv", points)
            for dtype in DTYPES:
                worst = max((p for p in points if p.dtype == dtype), key=lambda p: abs(p.deviation_percent))
                at = f"{worst.deviation_percent:+.2f} % at {worst.case}, x={worst.x:.3g}"
                show(f"{table}, {dtype}: largest deviation {at}")
        show(str(args.output / f"{name}.png"))


if __name__ == "__main__":
    main()
