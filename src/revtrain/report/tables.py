"""The report as tables: on the terminal, as Markdown, as CSV.

One list of columns describes a configuration (the layout of the paper's Table 1), another a run; the HTML page uses
the same two.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from revtrain.errors import printable
from revtrain.numerics.decibels import EXACT_DB
from revtrain.report.group import Group, Spread
from revtrain.runs.read import Problem, Run

NONE = "-"


@dataclass(frozen=True)
class Column:
    """A column: how its cell is made from a group or a run.

    One that is `optional` goes where all its cells are empty, one that `varies` where they are all the same.
    """

    head: str
    cell: Callable[[Any], str]
    text: bool = False  # words stand on the left, numbers on the right
    optional: bool = False
    varies: bool = False

    def says_something(self, cells: Sequence[str]) -> bool:
        if self.varies:
            return len(set(cells)) > 1
        return not self.optional or any(cell not in ("", NONE) for cell in cells)


def number(value: float | None, form: str = ",.0f") -> str:
    return NONE if value is None else format(value, form)


def percent(value: float | None) -> str:
    """Without its sign, which stands in the head of the column."""
    return NONE if value is None else f"{100 * value:.2f}"


def spread(value: Spread | None, form: str = ",.1f") -> str:
    """As in `93.12 ± 0.21`."""
    if value is None:
        return NONE
    deviation = "" if value.std is None else f" ± {value.std:{form}}"
    return f"{value.mean:{form}}{deviation}"


def snr_cell(values: Sequence[float | None]) -> str:
    """The SNRs of several runs: as in `61.3 ± 0.2`, `exact`, or `61.3 ± 0.2 (1 of 3 exact)`; what is exact has no
    finite SNR that could be averaged."""
    known = [value for value in values if value is not None]
    finite = [value for value in known if abs(value) < EXACT_DB]
    exact, lost = sum(value >= EXACT_DB for value in known), sum(value <= -EXACT_DB for value in known)
    words = [(exact, "exact"), (lost, "nothing left")]
    if not finite:
        return ", ".join(word if count == len(known) else f"{count} {word}" for count, word in words if count) or NONE
    rest = "".join(f" ({count} of {len(known)} {word})" for count, word in words if count)
    return spread(Spread.of(finite), ".1f") + rest


def clean(text: Any, length: int = 200) -> str:
    """The text on one line, without anything that would steer a terminal."""
    line = " ".join(str(text).split())
    line = line if len(line) <= length else f"{line[: length - 3]}..."
    return printable(line)


def _of(name: str, form: str) -> Callable[[Group], str]:
    return lambda group: spread(group.spread(lambda run: getattr(run, name)), form)


def _milliseconds(run: Run) -> float | None:
    return None if run.step_seconds is None else 1000 * run.step_seconds


def accuracy_percent(run: Run) -> float | None:
    return None if run.test_accuracy is None else 100 * run.test_accuracy


def _percent(name: str) -> Callable[[Group], str]:
    """Of one of the accuracies of `Run`."""

    def of_run(run: Run) -> float | None:
        value = getattr(run, name)
        return None if value is None else 100 * value

    return lambda group: spread(group.spread(of_run), ".2f")


GROUP_COLUMNS = (
    Column("#", lambda group: str(group.number)),
    Column("architecture", lambda group: group.arch, text=True),
    Column("settings", lambda group: group.described, text=True, optional=True),
    Column("data", lambda group: group.task, text=True, varies=True),
    Column("parameters", lambda group: number(group.mean("params"))),
    Column("n", lambda group: str(len(group.counted) if group.completed else 0)),
    Column("accuracy, %", _percent("test_accuracy")),
    Column("with flips, %", _percent("test_accuracy_flip"), optional=True),
    Column("averaged, %", _percent("test_accuracy_ema"), optional=True),
    Column("IoU, %", _percent("test_iou"), optional=True),
    Column("bytes/px", lambda group: number(group.mean("bytes_per_pixel"))),
    Column("peak, MiB", lambda group: number(group.mean("step_peak_mib"), ",.1f")),
    Column("VRAM, MiB", _of("vram_allocated_mib", ",.0f"), optional=True),
    Column("SNR, dB", lambda group: snr_cell([run.snr_minimum_db for run in group.counted])),
    Column("ms/step", lambda group: spread(group.spread(_milliseconds), ",.1f")),
    Column("overhead", lambda group: NONE if group.overhead is None else f"{group.overhead:.2f}x"),
    Column("status", lambda group: "" if group.status == "completed" else group.progress, text=True, optional=True),
)
GROUP_NOTES = (
    "Configurations; n completed runs with different seeds each, mean ± standard deviation over them. Where none is "
    "completed, the run that came furthest stands for them.",
    "accuracy: of the last epoch, on the test images; with flips: of the logits' mean over image and mirror image; "
    "averaged: of the average of the weights (ema_decay). bytes/px: what a training step stores per input pixel, "
    "weights, their gradients and momentum apart; peak: everything that is alive in a step, weights included, counted; "
    "VRAM: the peak that was measured on a GPU.",
    "SNR: of the worst reconstructed layer, last probe. overhead: step time over that of backward=store with the same "
    "configuration on the same device; - where there is no such run.",
)

RUN_COLUMNS = (
    Column("run", lambda run: clean(run.path, 400), text=True),
    Column("status", lambda run: run.status, text=True),
    Column("seed", lambda run: clean(NONE if run.seed is None else run.seed, 20)),
    Column("epochs", lambda run: run.progress),
    Column("accuracy, %", lambda run: percent(run.test_accuracy)),
    Column("best, %", lambda run: percent(run.best_test_accuracy)),
    Column("with flips, %", lambda run: percent(run.test_accuracy_flip), optional=True),
    Column("averaged, %", lambda run: percent(run.test_accuracy_ema), optional=True),
    Column("IoU, %", lambda run: percent(run.test_iou), optional=True),
    Column("SNR, dB", lambda run: snr_cell([run.snr_minimum_db])),
    Column("at", lambda run: clean(run.snr_minimum_layer or "", 80), text=True, optional=True),
    Column("bytes/px", lambda run: number(run.bytes_per_pixel)),
    Column("peak, MiB", lambda run: number(run.step_peak_mib, ",.1f")),
    Column("VRAM, MiB", lambda run: number(run.vram_allocated_mib), optional=True),
    Column("images/s", lambda run: number(run.images_per_second)),
    Column("s in all", lambda run: number(run.train_seconds)),
    Column("device", lambda run: clean(run.device or "", 40), text=True, optional=True),
    Column("error", lambda run: clean(run.error or "", 160), text=True, optional=True),
)


def table(columns: Sequence[Column], rows: Iterable[Any]) -> tuple[list[Column], list[list[str]]]:
    """The columns that have something to say, and their cells row by row."""
    cells = [[clean(column.cell(row), 400) for column in columns] for row in rows]
    kept = [index for index, column in enumerate(columns) if column.says_something([row[index] for row in cells])]
    return [columns[index] for index in kept], [[row[index] for index in kept] for row in cells]


def terminal(groups: Sequence[Group], problems: Sequence[Problem]) -> str:
    """The configurations, the runs that did not complete, and what could not be read."""
    parts = [_aligned(*table(GROUP_COLUMNS, groups))] if groups else []
    open_ends = [run for group in groups for run in group.runs if not run.completed]
    if open_ends:
        lines = [
            f"  {clean(run.path)}: {clean(run.status, 40)}, epoch {run.progress}{_because(run)}" for run in open_ends
        ]
        parts.append("\n".join([f"Not completed: {len(open_ends)} of {sum(len(g.runs) for g in groups)} runs", *lines]))
    if problems:
        lines = [f"  {clean(problem.path)}: {clean(problem.reason)}" for problem in problems]
        parts.append("\n".join(["Could not be read, wholly or in part:", *lines]))
    return "\n\n".join(parts)


def markdown(groups: Sequence[Group], problems: Sequence[Problem]) -> str:
    """The configurations, every run, and what could not be read."""
    runs = [run for group in groups for run in group.runs]
    parts = [
        "# revtrain report",
        "## Configurations",
        piped(*table(GROUP_COLUMNS, groups)),
        *GROUP_NOTES,
        "## Runs",
        piped(*table(RUN_COLUMNS, runs)),
    ]
    if problems:
        lines = [f"- {_escaped(clean(each.path))}: {_escaped(clean(each.reason))}" for each in problems]
        parts += ["## Could not be read, wholly or in part", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def comma_separated(groups: Sequence[Group]) -> str:
    """One line a run, unrounded, for spreadsheets and programs; empty where nothing was measured."""
    fields: dict[str, Callable[[Group, Run], Any]] = {
        "configuration": lambda group, run: group.number,
        "path": lambda group, run: run.path,
        "status": lambda group, run: run.status,
        "error": lambda group, run: run.error,
        "counted": lambda group, run: any(run is each for each in group.counted),
        "arch": lambda group, run: run.arch,
        "settings": lambda group, run: group.described,
        **{
            key: _setting(key)
            for key in ("depth", "width", "slope", "pooling", "backward", "batch", "precision", "seed", "epochs")
        },
        "epochs_done": lambda group, run: run.epochs_done,
        **{
            key: _figure(key)
            for key in (
                "params", "test_accuracy", "best_test_accuracy", "test_accuracy_flip", "test_accuracy_ema",
                "test_iou", "bytes_per_pixel", "step_peak_mib",
                "vram_allocated_mib", "vram_reserved_mib", "snr_minimum_db", "snr_minimum_layer",
                "images_per_second", "train_seconds", "step_seconds",
            )
        },
        "overhead": lambda group, run: group.overhead,
        "device": lambda group, run: run.device,
    }  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    for group in groups:
        for run in group.runs:
            writer.writerow([_cell(make(group, run)) for make in fields.values()])
    return text.getvalue()


def _setting(key: str) -> Callable[[Group, Run], Any]:
    return lambda group, run: run.config.get(key)


def _figure(name: str) -> Callable[[Group, Run], Any]:
    return lambda group, run: getattr(run, name)


def _aligned(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    lines = [[column.head for column in columns], *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    texts = [
        "  ".join(
            f"{cell:<{width}}" if column.text else f"{cell:>{width}}"
            for column, width, cell in zip(columns, widths, line, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])


def piped(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [column.head for column in columns],
        ["---" if column.text else "---:" for column in columns],
        *([_escaped(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Without meaning in Markdown, or in the HTML that it may hold."""
    for letter in "\\`*_[]|":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _because(run: Run) -> str:
    return f": {clean(run.error)}" if run.error else ""


def _cell(value: Any) -> Any:
    """A cell of CSV; text that a spreadsheet would take for a formula is quoted."""
    if value is None or isinstance(value, int | float):
        return value
    text = clean(",".join(map(str, value)) if isinstance(value, list) else value, 2000)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
