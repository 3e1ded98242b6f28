"""The report as one HTML page: tables and inline SVG, no script, nothing from outside.

Everything that comes from a file goes through `_text` or `revtrain.report.svg`, which escape it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape
from typing import Any

from revtrain.numerics.decibels import snr_text
from revtrain.report.group import Group, pareto
from revtrain.report.svg import COLOURS, Axis, Chart, Line, Point, key
from revtrain.report.tables import (
    GROUP_COLUMNS,
    GROUP_NOTES,
    NONE,
    RUN_COLUMNS,
    Column,
    accuracy_percent,
    clean,
    number,
    spread,
    table,
)
from revtrain.runs.read import Epoch, Problem, Run

# beyond it a reconstruction is exact, or nothing is left of the signal; the probe reports +-320 dB
EXACT_DB = 300.0
SMALLEST, LARGEST = 1e-15, 1e15  # of what a chart shows, zero apart

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2733; --soft: #5b6673; --rule: #dfe4ea; --panel: #f6f8fa;
  --c0: #0b6bb5; --c1: #d1590a; --c2: #0a8a62; --c3: #b8458a;
  --c4: #b08300; --c5: #2ba3c7; --c6: #6f4fb0; --c7: #6b7480;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e4e9ee; --soft: #9aa5b1; --rule: #2c343d; --panel: #1b2127;
    --c0: #5aa9f0; --c1: #f58a4b; --c2: #3fc494; --c3: #ea86c0;
    --c4: #e0b43c; --c5: #63d0ee; --c6: #ab91f2; --c7: #9aa5b1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1280px; padding: 28px 24px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0; }
.note { color: var(--soft); font-size: 13px; max-width: 110ch; overflow-wrap: anywhere; }
nav a { margin-right: 16px; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }

.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; background: var(--panel); }
tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: var(--panel); }
.left { text-align: left; }
td.long { white-space: normal; min-width: 38ch; overflow-wrap: anywhere; }
td.long.bad { min-width: 90ch; }
td.state { white-space: normal; min-width: 14ch; }
.bad { color: var(--c1); }
.swatch { width: 10px; height: 10px; border-radius: 5px; display: inline-block; margin-right: 7px; }

.card { margin-bottom: 22px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 18px; }
.panel { border: 1px solid var(--rule); border-radius: 8px; padding: 14px 14px 10px; min-width: 0; }
.panel > svg { display: block; width: 100%; max-width: 640px; height: auto; margin: 0 auto; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); padding: 6px 6px 0; }
.key { display: inline-flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.key svg { width: 26px; height: 12px; flex: none; }

svg text { fill: var(--soft); font-size: 12px; }
svg .name { font-size: 12.5px; }
svg .label { fill: var(--ink); font-weight: 600; stroke: var(--paper); stroke-width: 3px; paint-order: stroke; }
.grid { stroke: var(--rule); }
.frame { fill: none; stroke: var(--soft); }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.dot { fill: currentColor; stroke: transparent; stroke-width: 9; }
.unseen { fill: transparent; }
.unseen:hover { fill: currentColor; }
.faint { opacity: .75; }
.faint .line { stroke-width: 1.2; stroke-dasharray: 5 3; }
.mark { fill: currentColor; stroke: currentColor; stroke-width: 2; }
.hollow { fill: var(--paper); }
.bar { fill: none; stroke: currentColor; stroke-width: 1.2; opacity: .55; }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.front { fill: none; stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 2 3; }
""" + "\n".join(f".s{index} {{ color: var(--c{index}); }}" for index in range(COLOURS))


def page(groups: Sequence[Group], problems: Sequence[Problem], paths: Iterable[Any]) -> str:
    """The whole page.

    Args:
        groups: from `revtrain.report.group.group_runs`; may be empty.
        problems: what could not be read.
        paths: where the runs were looked for, for the head of the page.
    """
    sections = [
        ("configurations", "Configurations", _configurations(groups)),
        ("memory", "Accuracy against memory", _memory(groups)),
        ("snr", "SNR of reconstructed activations", _snr(groups)),
        ("curves", "Curves", _curves(groups)),
        ("runs", "Runs", _html_table(RUN_COLUMNS, [run for group in groups for run in group.runs])),
        ("unread", "Could not be read, wholly or in part", _problems(problems)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, body in sections if body)
    bodies = "\n".join(
        f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>' for anchor, title, body in sections if body
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>revtrain report</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>revtrain report</h1>
<p>{_text(_summary(groups))}</p>
<p class="note">{datetime.now():%Y-%m-%d %H:%M}, from {_text(", ".join(map(str, paths)))}</p>
<nav>{links}</nav>
</header>
{bodies}
</body>
</html>
"""


def _summary(groups: Sequence[Group]) -> str:
    """As in `12 runs of 6 configurations: 10 completed, 2 failed`."""
    runs = [run for group in groups for run in group.runs]
    counts = Counter(run.status for run in runs)
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{_many(len(runs), 'run')} of {_many(len(groups), 'configuration')}: {listed}"


# ---- tables --------------------------------------------------------------------------------------


def _configurations(groups: Sequence[Group]) -> str:
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in GROUP_NOTES)
    return _html_table(GROUP_COLUMNS, groups, _decorated) + notes if groups else ""


def _decorated(column: Column, group: Group, cell: str) -> str:
    if column.head == "#":
        return f'<a href="#configuration-{group.number}">{_text(cell)}</a>'
    if column.head == "architecture":
        return f'<span class="swatch" style="background: var(--c{group.colour % COLOURS})"></span>{_text(cell)}'
    return _text(cell)


def _html_table(
    columns: Sequence[Column],
    rows: Sequence[Any],
    decorate: Callable[[Column, Any, str], str] = lambda column, row, cell: _text(cell),
) -> str:
    if not rows:
        return ""
    kept, cells = table(columns, rows)
    head = "".join(f"<th{_side(column)}>{_text(column.head)}</th>" for column in kept)
    lines = [
        "".join(
            f"<td{_side(column, cell)}>{decorate(column, row, cell)}</td>"
            for column, cell in zip(kept, line, strict=True)
        )
        for row, line in zip(rows, cells, strict=True)
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _side(column: Column, cell: str = "") -> str:
    state = column.head == "status"
    classes = {
        "left": column.text,
        "long": len(cell) > 44,
        "state": state,
        "bad": column.head == "error" or (state and cell not in ("", "completed")),
    }
    chosen = " ".join(name for name, holds in classes.items() if holds)
    return f' class="{chosen}"' if chosen else ""


def _problems(problems: Sequence[Problem]) -> str:
    columns = (
        Column("path", lambda each: clean(each.path, 400), text=True),
        Column("why", lambda each: clean(each.reason, 400), text=True),
    )
    return _html_table(columns, problems)


# ---- accuracy against memory ---------------------------------------------------------------------


def _memory(groups: Sequence[Group]) -> str:
    kinds = (
        ("bytes_per_pixel", "bytes per input pixel", "weights apart"),
        ("step_peak_mib", "peak of a training step (MiB)", "counted, weights included"),
        ("vram_allocated_mib", "peak VRAM (MiB)", "measured"),
    )
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    parts = []
    for task, members in tasks.items():
        charts = [_pareto_chart(members, *kind) for kind in kinds]
        if any(charts):
            title = f"<h3>Data: {_text(task)}</h3>"
            parts.append(f'<div class="card">{title}<div class="grid2">{"".join(charts)}</div></div>')
    note = (
        '<p class="note">Numbers are those of the table of configurations; bars are one standard deviation over seeds. '
        "No configuration on the Pareto front is beaten in accuracy by another that needs no more memory; "
        "only completed ones are compared.</p>"
    )
    return "\n".join([*parts, note]) if parts else ""


def _pareto_chart(groups: Sequence[Group], memory: str, label: str, remark: str) -> str:
    found: list[tuple[Group, Point]] = []
    for group in groups:
        x, accuracy = group.mean(memory), group.spread(accuracy_percent)
        if x is None or accuracy is None or not _drawable(x):
            continue
        said = (
            f"{group.number}. {group.label}: {spread(accuracy, '.2f')} % (n={accuracy.n}), {number(x, ',.4g')} {label}"
        )
        said += "" if group.completed else f", {group.status}"
        point = Point(x, accuracy.mean, str(group.number), said, group.colour, accuracy.std)
        point.hollow = not group.completed
        found.append((group, point))
    if not found:
        return ""
    points = [point for _, point in found]
    compared = [point for point in points if not point.hollow]
    front = [compared[index] for index in pareto([(point.x, point.y) for point in compared])]
    for point in front:
        point.ring = True
    reach = [point.y + sign * (point.spread or 0.0) for point in points for sign in (-1, 1)]
    chart = Chart(
        f"test accuracy against {label}",
        Axis.spanning(f"{label}, {remark}", [point.x for point in points], 4),
        Axis.linear("test accuracy (%)", [min(100.0, max(0.0, y)) for y in reach], within=(0.0, 100.0)),
    )
    chart.staircase([(point.x, point.y) for point in front], "Pareto front")
    chart.points(points)
    keys = [key(arch, style, "mark") for arch, style in dict.fromkeys((group.arch, group.colour) for group, _ in found)]
    keys += [key("not completed", 7, "hollow")] if len(compared) < len(points) else []
    keys += [key("Pareto front (ringed)", 7, "front")] if front else []
    return _panel(chart, keys)


# ---- SNR -----------------------------------------------------------------------------------------


def _snr(groups: Sequence[Group]) -> str:
    arches: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        arches.setdefault((group.task, group.arch), []).append(group)
    several = len({task for task, _ in arches}) > 1
    parts = []
    for (task, arch), members in arches.items():
        profiles: list[Line] = []
        minima: list[Line] = []
        keys: list[str] = []
        for group in members:
            style, before = len(keys), len(profiles) + len(minima)
            for run in group.counted:
                who = f"{group.number}. {group.label}{_of_seed(run)}"
                lines = Line(who, _profile(run, who), style), Line(who, _minima(run, who), style)
                for drawn, line in zip((profiles, minima), lines, strict=True):
                    drawn += [line] if line.points else []
            if len(profiles) + len(minima) > before:
                keys.append(key(f"{group.number}. {group.described or arch}", style))
        charts = [
            _snr_chart(
                f"SNR by layer, {arch}", "layer, from the input to the output (last probe)", "SNR (dB)", profiles, keys
            ),
            _snr_chart(f"minimum SNR by epoch, {arch}", "epoch", "minimum SNR (dB)", minima, keys),
        ]
        if any(charts):
            title = f"{arch} on {task}" if several else arch
            parts.append(f'<div class="card"><h3>{_text(title)}</h3><div class="grid2">{"".join(charts)}</div></div>')
    note = (
        '<p class="note">SNR of the rebuilt input of each layer against the true one (Eq. 15), one line a run; '
        "higher is better.</p>"
    )
    return "\n".join([note, *parts]) if parts else ""


def _profile(run: Run, who: str) -> list[tuple[float, float, str]]:
    return [(index, db, f"{name}: {snr_text(db)}, {who}") for index, (name, db) in enumerate(run.snr_db.items())]


def _minima(run: Run, who: str) -> list[tuple[float, float, str]]:
    return [
        (line.epoch, line.snr_minimum_db, f"epoch {line.epoch}: {snr_text(line.snr_minimum_db)}, {who}")
        for line in run.history
        if line.snr_minimum_db is not None
    ]


def _snr_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], keys: Sequence[str]) -> str:
    if not lines:
        return ""
    points = [point for line in lines for point in line.points]
    chart = Chart(title, Axis.whole(x_label, [x for x, _, _ in points]), _snr_axis(y_label, [y for _, y, _ in points]))
    for line in lines:
        chart.line(line)
    return _panel(chart, keys)


def _snr_axis(label: str, values: Sequence[float]) -> Axis:
    """Decibels, with a tick of their own for what is exact, or lost."""
    axis = Axis.linear(label, [value for value in values if abs(value) < EXACT_DB] or [0.0, 100.0])
    step = axis.ticks[1][0] - axis.ticks[0][0]
    ticks = list(axis.ticks)
    if any(value >= EXACT_DB for value in values):
        ticks.append((axis.high + step, "exact"))
    if any(value <= -EXACT_DB for value in values):
        ticks.insert(0, (axis.low - step, "lost"))
    return Axis(label, ticks[0][0], ticks[-1][0], tuple(ticks))


# ---- curves --------------------------------------------------------------------------------------


def _curves(groups: Sequence[Group]) -> str:
    cards = []
    for group in groups:
        runs = [run for run in group.runs if run.history]
        charts = [
            _curve_chart(group, runs, "accuracy (%)", "accuracy", 100.0),
            _curve_chart(group, runs, "loss", "loss", 1.0),
        ]
        known = (
            (spread(group.spread(accuracy_percent), ".2f"), "%"),
            (number(group.mean("bytes_per_pixel")), "bytes/px"),
            (number(group.mean("params")), "parameters"),
        )
        figures = [f"{figure} {unit}" for figure, unit in known if figure != NONE] + [group.progress]
        error = next((run.error for run in group.runs if run.error), None)
        cards.append(
            f'<div class="card" id="configuration-{group.number}"><h3>{group.number}. {_text(group.label)}</h3>'
            f'<p class="note">{_text("; ".join(figures))}</p>'
            + (f'<p class="note bad">{_text(error)}</p>' if error else "")
            + (f'<div class="grid2">{"".join(charts)}</div>' if any(charts) else "")
            + "</div>"
        )
    return "\n".join(cards)


def _curve_chart(group: Group, runs: Sequence[Run], label: str, name: str, scale: float) -> str:
    lines = []
    for style, run in enumerate(runs):
        for split in ("test", "train"):
            who = f"{split}{_of_seed(run)}"
            points = _points(run.history, f"{name}_{split}", scale, who)
            lines += [Line(who, points, style, faint=split == "train")] if points else []
    if not lines:
        return ""
    values = [y for line in lines for _, y, _ in line.points]
    x = Axis.whole("epoch", [x for line in lines for x, _, _ in line.points])
    y = Axis.linear(label, values, within=(0.0, 100.0)) if name == "accuracy" else Axis.spanning(label, values, 30)
    chart = Chart(f"{name} of configuration {group.number}", x, y)
    for line in lines:
        chart.line(line)
    return _panel(chart, [key(line.name, line.style, faint=line.faint) for line in lines])


def _points(history: Sequence[Epoch], name: str, scale: float, who: str) -> list[tuple[float, float, str]]:
    found = [(line.epoch, getattr(line, name)) for line in history]
    return [
        (epoch, scale * value, f"epoch {epoch}: {scale * value:.4g}, {who}")
        for epoch, value in found
        if value is not None and _drawable(value)
    ]


# ---- small parts ---------------------------------------------------------------------------------


def _panel(chart: Chart, keys: Sequence[str]) -> str:
    return f'<div class="panel">{chart.svg()}<div class="legend">{"".join(keys)}</div></div>'


def _of_seed(run: Run) -> str:
    words = "" if run.seed is None else f", seed {run.seed}"
    return words if run.completed else f"{words} ({run.status})"


def _drawable(value: float) -> bool:
    return value == 0 or SMALLEST <= abs(value) < LARGEST


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _text(text: Any) -> str:
    return escape(clean(text, 2000))
