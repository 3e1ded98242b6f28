"""Figures of a run: the SNR over the layers, live memory over a training step, the confusion matrix.

They need matplotlib (extra `figures`), which is imported when the first one is drawn. Each function returns a Figure
that belongs to no window and no pyplot; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# It tells of its own first start, and of a folder that it cannot cache in; both do no harm.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

MIB = 2**20
# beyond it a reconstruction is exact, or nothing is left of the signal; the probe reports +-320 dB
EXACT_DB = 300.0
NAMED_LAYERS = 24  # more names than these do not fit below an axis
NAMED_CLASSES = 40
COUNTED_CLASSES = 20
SHOWN = 2000  # parts of a timeline, more than a picture has pixels
# colours that also differ in grey and for the colour-blind
COLOURS = ("#08519c", "#d95f02", "#41ab5d", "#b8458a", "#b08300", "#2ba3c7", "#6f4fb0", "#6b7480")
PHASES = {"forward": "#eef4fb", "backward": "#fdf0ea", "optimizer": "#eeeeee"}


def available() -> bool:
    """Whether figures can be drawn here: matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require(what: str) -> None:
    """Refuse `what`, a few words, where matplotlib is missing.

    Raises:
        RevtrainError: it is; the message says how to get it.
    """
    if not available():
        raise RevtrainError(
            f"{what} needs matplotlib, which is not installed here.\n"
            "Install it with: pip install matplotlib (or revtrain's extra: figures)."
        )


def _figure(width: float, height: float, **margins: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one panel; given margins save the time of finding them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout=None if margins else "tight")
    FigureCanvasAgg(figure)
    if margins:
        figure.subplots_adjust(**margins)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return figure, axes


def pixels(figure: Figure) -> Any:
    """The figure as a numpy array (H, W, 3) uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ---------------------------------------------------------------- SNR over layers


def snr_profile_figure(snr_layers: Mapping[str, float], title: str = "SNR of the rebuilt activations") -> Figure:
    """The SNR in dB of the rebuilt input of every layer.

    Args:
        snr_layers: layer name (as `revtrain.measure.layer_names` gives them) -> dB, the first layer of the network
            first. The probe lists them as the backward pass meets them: `dict(reversed(layers.items()))`.

    A line joins the layers of the network itself; those inside the blocks (hybrid) stand beside it as small dots. A
    layer that was rebuilt to the last bit has no finite SNR: it is drawn at the top.

    Raises `RevtrainError` without matplotlib.
    """
    require("The SNR profile")
    names, values = list(snr_layers), list(snr_layers.values())
    outermost = min((name.count("/") for name in names), default=0)
    main = [i for i, name in enumerate(names) if name.count("/") == outermost]
    finite = [value for value in values if abs(value) < EXACT_DB]
    low, high = min([*finite, 0.0]), max([*finite, 10.0])
    room = 0.12 * (high - low)
    exact_at, lost_at = high + room, low - room
    heights = [exact_at if v >= EXACT_DB else lost_at if v <= -EXACT_DB else v for v in values]
    few = len(names) <= NAMED_LAYERS

    figure, axes = _figure(8, 4.2, left=0.1, right=0.91, top=0.92, bottom=0.29 if few else 0.12)
    axes.plot(main, [heights[i] for i in main], color="#9aa5b1", linewidth=1, zorder=1)
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    for number, kind in enumerate(kinds):
        colour = COLOURS[number % len(COLOURS)]
        for inner in (False, True):
            at = [i for i, name in enumerate(names) if _kind(name) == kind and (i in set(main)) is not inner]
            label = f"{kind}, inside a block" if inner else kind
            if at:
                axes.scatter(at, [heights[i] for i in at], 10 if inner else 34, color=colour, label=label,
                             alpha=0.7 if inner else 1, zorder=2, linewidths=0)  # fmt: skip
    if finite:
        worst = min(range(len(values)), key=values.__getitem__)
        if abs(values[worst]) < EXACT_DB:
            side = "left" if worst < 0.1 * len(names) else "right" if worst > 0.9 * len(names) else "center"
            axes.annotate(
                f"{values[worst]:.1f} dB", (worst, heights[worst]), (0, -13), textcoords="offset points",
                ha=side, fontsize=9, color="#cb181d", weight="bold",
            )  # fmt: skip
    some_lost = min(values, default=0) <= -EXACT_DB
    for edge, text, there in ((exact_at, "exact", max(values, default=0) >= EXACT_DB),
                              (lost_at, "nothing left", some_lost)):  # fmt: skip
        if there:
            axes.axhline(edge, color="#9aa5b1", linewidth=0.8, linestyle=":", zorder=0)
            axes.text(1.01, edge, text, transform=axes.get_yaxis_transform(), fontsize=9, va="center", color="#5b6673")
    if few:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=40, ha="right", fontsize=8)
        axes.set_xlabel("layer, from the input (left) to the output")
    else:
        axes.set_xlabel("number of the layer, from the input (left) to the output")
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.set_ylim((lost_at if some_lost else low) - room / 2, exact_at + room / 2)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - 1e-6 <= tick <= high + room / 4])
    axes.set_ylabel("SNR of the layer's rebuilt input (dB)")
    axes.set_title(title, fontsize=11, loc="left")
    if kinds:
        axes.legend(fontsize=8, frameon=False, ncols=min(3, len(kinds)), loc="best")
    return figure


def _kind(name: str) -> str:
    """`trunk/00_AdditiveCoupling/f/02_CouplingConv2d` -> `CouplingConv2d`."""
    return name.rpartition("/")[2].partition("_")[2] or name


def _short(name: str) -> str:
    """`trunk/03_InvertibleLeakyReLU` -> `03 LeakyReLU`."""
    number, _, kind = name.rpartition("/")[2].partition("_")
    return f"{number} {kind.removeprefix('Invertible')}" if kind else name


# ---------------------------------------------------------------- memory over a step


def memory_timeline_figure(
    live_bytes: Sequence[int], ends: Mapping[str, int], always_bytes: float, title: str = "Memory of one training step"
) -> Figure:
    """Live memory over one training step.

    Args:
        live_bytes: bytes alive after each allocation and release.
        ends: phase (forward, backward, optimizer) -> index in `live_bytes` at which it ends, in that order.
        always_bytes: of weights and momentum, which are there all the time.

    Raises `RevtrainError` without matplotlib.
    """
    require("The memory timeline")
    figure, axes = _figure(8, 4.2, left=0.09, right=0.98, top=0.92, bottom=0.12)
    draw_memory_timeline(axes, live_bytes, ends, always_bytes)
    axes.set_ylim(0, 1.45 * max(live_bytes) / MIB)  # the name of the peak below the legend
    axes.set_xlabel("allocations and releases of one training step", loc="left")
    axes.set_title(title, fontsize=11, loc="left")
    return figure


def draw_memory_timeline(axes: Axes, live_bytes: Sequence[int], ends: Mapping[str, int], always_bytes: float) -> None:
    """The timeline of `memory_timeline_figure` on a panel of somebody else's figure."""
    count, always = len(live_bytes), always_bytes / MIB
    steps = _extremes(live_bytes, SHOWN)
    live = [live_bytes[step] / MIB for step in steps]
    start = 0
    for phase, end in ends.items():
        axes.axvspan(start, end, color=PHASES[phase], zorder=0)
        if end - start > 0.06 * count:
            axes.text((start + end) / 2, 0.97, phase, transform=axes.get_xaxis_transform(), ha="center", va="top",
                      fontsize=9.5, color="#555555")  # fmt: skip
        start = end
    axes.fill_between(steps, live, always, step="post", color="#6baed6", alpha=0.75, linewidth=0, rasterized=True,
                      label="activations, gradients, scratch")  # fmt: skip
    axes.fill_between([0, count], always, color="#969696", alpha=0.75, linewidth=0, label="weights and momentum")
    axes.plot(steps, live, drawstyle="steps-post", color="#08519c", linewidth=0.7, rasterized=True)
    peak = max(live)
    at = steps[live.index(peak)]
    phase = next(name for name, end in ends.items() if at < end)
    axes.plot([at], [peak], "o", color="#cb181d", markersize=6)
    right = at > 0.5 * count
    axes.annotate(
        f"peak: {peak:,.{0 if peak >= 10 else 2}f} MiB, in the {phase} pass", (at, peak), (-8 if right else 8, 6),
        textcoords="offset points", ha="right" if right else "left", fontsize=9.5, weight="bold", color="#cb181d",
    )  # fmt: skip
    axes.set_xlim(0, count)
    axes.set_ylim(0, 1.27 * peak)
    axes.set_ylabel("live MiB")
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.9), frameon=False, handlelength=1)


def _extremes(values: Sequence[float], bins: int) -> list[int]:
    """Indices of the least and the greatest value of each of `bins` parts of a long row; all of a short one."""
    count = len(values)
    if count <= 2 * bins:
        return list(range(count))
    kept = set()
    for number in range(bins):
        part = range(number * count // bins, (number + 1) * count // bins)
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return sorted(kept)


# ---------------------------------------------------------------- confusion matrix


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """Counts of true classes (rows) and predicted ones (columns), coloured by the share of the row.

    Raises `RevtrainError` without matplotlib.
    """
    require("The picture of the confusion matrix")
    count = len(classes)
    side = min(12.0, 3.5 + 0.42 * count)
    figure, axes = _figure(side + 0.6, side)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    shares = [[each / max(1, sum(row)) for each in row] for row in confusion]
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    if count <= COUNTED_CLASSES:
        for row in range(count):
            for column in range(count):
                if confusion[row][column]:
                    axes.text(column, row, f"{confusion[row][column]:,}", ha="center", va="center", fontsize=8,
                              color="white" if shares[row][column] > 0.6 else "#1d2733")  # fmt: skip
    if count <= NAMED_CLASSES:
        axes.set_xticks(range(count), classes, rotation=40, ha="right", fontsize=9)
        axes.set_yticks(range(count), classes, fontsize=9)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11, loc="left")
    return figure
