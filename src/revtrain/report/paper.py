"""The report in the layout of the paper's tables: networks of about equal size, the one of the most memory first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from revtrain.config import ImageSize, read
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import MemoryModel
from revtrain.models import analytic_memory
from revtrain.report.group import INCIDENTAL, OF_THE_PROBE, Group, configuration_key
from revtrain.report.tables import NONE, Column, accuracy_percent, number, piped, spread, table

BATCH = 512  # of the paper's totals
SAME_SIZE = 1.1  # parameters of the largest network of a table over those of the smallest, at most
DEFAULT_SIDE, DEFAULT_CLASSES = 32, 10  # pixels, and of the head, where the configuration leaves them to the images
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A network, its noise-free twin, and the network that it is compared with."""

    group: Group
    twin: Group | None  # backward=store
    baseline: Group

    @cached_property
    def memory(self) -> MemoryModel | None:
        """The closed form, which is that of large batches: in small ones scratch grows with the batch, too. None where
        there is none, and of accumulated gradients."""
        with suppress(RevtrainError):
            config = read(self.group.counted[0].config, stored=True)
            if config.training.accumulate == 1:
                return analytic_memory(config, config.data.classes or DEFAULT_CLASSES, self.image_size)
        return None

    @property
    def image_size(self) -> ImageSize:
        """Of the images, in pixels."""
        return ImageSize.of((self.group.counted[0].config.get("data") or {}).get("image_size") or DEFAULT_SIDE)

    @property
    def bytes_per_pixel(self) -> float | None:
        return self.group.mean("bytes_per_pixel") if self.memory is None else self.memory.bytes_per_pixel

    @property
    def mib_at_512(self) -> float | None:
        """Everything alive in a step of 512 images; without a closed form extrapolated by the bytes per pixel."""
        if self.memory is not None:
            return self.memory.peak_bytes(BATCH, self.image_size) / MIB
        peak, slope = self.group.mean("step_peak_mib"), self.bytes_per_pixel
        batch = self.group.counted[0].config.get("batch")
        if peak is None or slope is None or not isinstance(batch, int):
            return None
        return peak + slope * (BATCH - batch) * self.image_size.pixels / MIB

    @property
    def relative_time(self) -> float | None:
        own, other = (_fastest(each) for each in (self.group, self.baseline))
        return other / own if own and other else None


def _fastest(group: Group) -> float | None:
    """Images a second of the fastest epoch of all runs: what else a machine does takes time, and never gives any."""
    epochs = ((each.train_images, each.train_seconds) for run in group.counted for each in run.history)
    rates = [images / seconds for images, seconds in epochs if images and seconds]
    return max(rates, default=group.mean("images_per_second"))


COLUMNS = (
    Column("architecture", lambda row: row.group.arch, text=True),
    Column("settings", lambda row: _settings(row.group), text=True, optional=True),
    Column("data", lambda row: row.group.task, text=True, varies=True),
    Column("parameters", lambda row: number(row.group.mean("params"))),
    Column("n", lambda row: str(len(row.group.counted) if row.group.completed else 0)),
    Column("accuracy, %", lambda row: spread(row.group.spread(accuracy_percent), ".2f")),
    Column("stored, %", lambda row: spread(row.twin.spread(accuracy_percent), ".2f") if row.twin else NONE),
    Column("bytes/px", lambda row: number(row.bytes_per_pixel)),
    Column(f"MiB at {BATCH}", lambda row: number(row.mib_at_512, ",.1f")),
    Column("VRAM, MiB", lambda row: number(row.group.mean("vram_allocated_mib")), optional=True),
    Column("MMAC/image", lambda row: number(_millions(row.group.mean("macs_per_image")), ",.1f")),
    Column("time", lambda row: NONE if row.relative_time is None else f"{row.relative_time:.2f}x"),
    Column("s to target", lambda row: spread(row.group.spread(lambda run: run.target_seconds), ",.0f"), optional=True),
    Column(
        "status", lambda row: "" if row.group.status == "completed" else row.group.progress, text=True, optional=True
    ),
)
NOTES = (
    f"One table for each size; parameters within it differ by a tenth at most. n runs with different seeds, mean ± "
    f"standard deviation; stored: the noise-free twin, backward=store. bytes/px and MiB at {BATCH}: everything alive "
    f"in a step, by the closed form, or, where there is none, counted at the batch of the run and extrapolated; VRAM: "
    f"measured at the batch of the run. MMAC: millions of multiply-accumulates of forward and backward pass, "
    f"recomputation included. time: seconds an image, of the fastest epoch of all runs, over those of the first row, "
    f"which needs the most memory; only of runs on one device does it mean anything.",
)
# what a row's settings leave out: shown elsewhere, or the same by design
SHOWN_ELSEWHERE = ("backward", "seed", "pooling")


def paper_tables(groups: Sequence[Group]) -> str:
    """Markdown, which reads well on a terminal, too."""
    parts = [_titled(rows) for rows in _of_equal_size(groups)]
    return "\n\n".join([*parts, *NOTES]) + "\n"


def _titled(rows: Sequence[Row]) -> str:
    mean = sum(row.group.mean("params") or 0 for row in rows) / len(rows)
    size = f"{mean / 1e6:.1f} million" if mean >= 1e6 else f"{mean:,.0f}"
    return f"About {size} parameters\n\n{piped(*table(COLUMNS, rows))}"


def _of_equal_size(groups: Iterable[Group]) -> list[list[Row]]:
    """Rows of the groups that invert, or have no other way, in tables of about equal size, the largest first."""
    stored = {_key(group): group for group in groups if _backward(group) == "store"}
    inverted = {_key(group): group for group in groups if _backward(group) != "store"}
    shown = [*inverted.values(), *(group for key, group in stored.items() if key not in inverted)]
    shown.sort(key=lambda group: -(group.mean("params") or 0))
    tables: list[list[Group]] = []
    for group in shown:
        largest = (tables[-1][0].mean("params") or 0) if tables else 0
        if not tables or largest > SAME_SIZE * (group.mean("params") or 0):
            tables.append([])
        tables[-1].append(group)
    found = []
    for each in tables:
        twins = [None if (twin := stored.get(_key(group))) is group else twin for group in each]
        rows = [Row(group, twin, group) for group, twin in zip(each, twins, strict=True)]
        rows.sort(key=lambda row: -(row.bytes_per_pixel or 0))
        found.append([replace(row, baseline=rows[0].group) for row in rows])
    return found


def _key(group: Group) -> str:
    return configuration_key(group.counted[0], (*INCIDENTAL, *OF_THE_PROBE))


def _backward(group: Group) -> str | None:
    return group.counted[0].config.get("backward")


def _settings(group: Group) -> str:
    return " ".join(f"{key}={value}" for key, value in group.settings.items() if key not in SHOWN_ELSEWHERE)


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6
