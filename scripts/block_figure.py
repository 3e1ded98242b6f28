"""Draws how activations and gradients pass through a reversible block (Figure 2 of arXiv 1910.11127).

    python scripts/block_figure.py                  # docs/figures/reversible_block.png and .svg

Left the forward pass, right the backward pass of y1 = x1 + F(x2), y2 = x2 + G(y1), as `AdditiveCoupling` runs it in
place: what is alive at the top of a panel has become what is alive at its bottom, in the same memory.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STATE, INSIDE = "#41ab5d", "#fe9929"  # as in the memory diagrams
LEFT, RIGHT = 0.8, 4.2  # the lanes of the two halves
WIDTH, HEIGHT = 1.5, 0.6  # of a box


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = WIDTH) -> None:
    shape = FancyBboxPatch((x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08",
                           facecolor="white", edgecolor=colour, linewidth=1.6)  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555555") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0})


def function(axes: Axes, name: str, y: float, start: float, end: float) -> None:
    """F or G between the lanes: it reads the half at `start` and its result goes to the half at `end`."""
    middle, step = (LEFT + RIGHT) / 2, 0.42 if end > start else -0.42
    arrow(axes, (start, y), (middle - step, y))
    arrow(axes, (middle + step, y), (end, y))
    box(axes, middle, y, name, INSIDE, width=0.8)
    axes.plot([start], [y], "o", color="#555555", markersize=4)


def lanes(axes: Axes, rows: list[float], texts: list[tuple[str, str]]) -> None:
    """The halves at each row, and arrows from one row to the next."""
    for row, pair in zip(rows, texts, strict=True):
        for x, text in zip((LEFT, RIGHT), pair, strict=True):
            box(axes, x, row, text, STATE)
    for above, below in pairwise(rows):
        for x in (LEFT, RIGHT):
            arrow(axes, (x, above - HEIGHT / 2 - 0.04), (x, below + HEIGHT / 2 + 0.04))


def panel(axes: Axes, title: str, rows: list[tuple[str, str]], functions: list[tuple[str, bool, str]]) -> None:
    """`rows`: the halves from top to bottom. `functions`: between two rows each, name, whether it reads the right half,
    and what is computed."""
    heights = [6.0 - 2.3 * index for index in range(len(rows))]
    lanes(axes, heights, rows)
    for above, (name, reads_right, text) in zip(heights, functions, strict=False):
        y = above - 0.85
        function(axes, name, y, *((RIGHT, LEFT) if reads_right else (LEFT, RIGHT)))
        axes.text((LEFT + RIGHT) / 2, y - 0.5, text, ha="center", va="top", fontsize=9.5)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set(xlim=(-0.2, 5.2), ylim=(0.9, 6.5))
    axes.axis("off")


def draw() -> Figure:
    figure, (forward, backward) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    panel(
        forward,
        "Forward: one state is alive, and what F or G makes",
        [("$x_1$", "$x_2$"), ("$y_1$", "$x_2$"), ("$y_1$", "$y_2$")],
        [("F", True, "$y_1 = x_1 + F(x_2)$"), ("G", False, "$y_2 = x_2 + G(y_1)$")],
    )
    panel(
        backward,
        "Backward: a state and its gradient, and the inside of F or of G",
        [
            ("$y_1$    $dy_1$", "$y_2$    $dy_2$"),
            ("$y_1$    $dx_1$", "$x_2$    $dy_2$"),
            ("$x_1$    $dx_1$", "$x_2$    $dx_2$"),
        ],
        [
            ("G", False, "$x_2 = y_2 - G(y_1)$\n$dx_1 = dy_1 + G'(y_1)^T dy_2$"),
            ("F", True, "$x_1 = y_1 - F(x_2)$\n$dx_2 = dy_2 + F'(x_2)^T dx_1$"),
        ],
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (docs/figures)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"reversible_block.{suffix}", dpi=110)
    print(folder / "reversible_block.png")


if __name__ == "__main__":
    main()
