"""What a run leaves behind: metrics.jsonl, result.json, TensorBoard events, a table on the terminal.

What is in them is stated in `revtrain.runs.schema`. `result.json` is written in one step when training starts, with the
status `running`, and again at the end, whatever the end was.

This module does not import torch until a run starts, so that a refused configuration is answered at once.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import platform
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from revtrain import figures
from revtrain.machine.files import write_atomic
from revtrain.numerics.fidelity import trusted
from revtrain.runs import schema
from revtrain.runs.schema import LINE_KEYS, Line, Result, Snr, Status, Tag

__all__ = [
    "LINE_KEYS",
    "RunWriter",
    "SilentWriter",
    "holds_run",
    "new_result",
    "one_line",
    "versions",
    "write_result",
]

log = logging.getLogger(__name__)

HYPER_PARAMETERS = (
    "arch", "depth", "width", "slope", "pooling", "backward", "batch", "epochs", "lr", "precision", "seed",
)  # fmt: skip
# the columns of the HParams tab
KEY_METRICS = (Tag.ACCURACY_TEST, Tag.SNR_MINIMUM, Tag.BYTES_PER_PIXEL)
EXACT_DB = 320.0  # revtrain.numerics.snr.SNR_CEILING_DB: no error at all; named here, too, since that imports torch
FIGURES = 10  # SNR profiles a run: as many images of one tag as TensorBoard shows
# the custom-scalars tab, so that the dashboard opens on meaning; its tags are regular expressions
LAYOUT = {
    "accuracy, SNR, memory, speed": {
        "accuracy": ["Multiline", [Tag.ACCURACY_TEST]],
        "SNR (dB), minimum": ["Multiline", [f"{Tag.SNR_MINIMUM}$"]],
        "memory (bytes per pixel)": ["Multiline", [Tag.BYTES_PER_PIXEL]],
        "speed (images/s)": ["Multiline", [Tag.SPEED]],
    },
    "more": {
        "accuracy, training images": ["Multiline", [Tag.ACCURACY_TRAIN]],
        "loss": ["Multiline", [Tag.LOSS_TEST, Tag.LOSS_TRAIN]],
        "gradients, least cosine": ["Multiline", [Tag.GRADIENT_COSINE]],
        "gradients, greatest relative error": ["Multiline", [Tag.GRADIENT_ERROR]],
        "SNR (dB), per layer": ["Multiline", [f"{Tag.SNR_OF_LAYER}(?!min$)"]],
        "memory (peak VRAM, MiB)": ["Multiline", [Tag.PEAK_VRAM]],
        "learning rate": ["Multiline", [Tag.LR]],
    },
}


def new_result(config: dict[str, Any], overrides: list[str]) -> Result:
    """result.json as it is before anything was measured."""
    known = {
        "status": "failed",
        "arch": config.get("arch"),
        "epochs": 0,
        "versions": versions(),
        "overrides": list(overrides),
        "config": config,
    }
    return cast(Result, {**dict.fromkeys(schema.RESULT_KEYS), **known})


def versions() -> dict[str, str | None]:
    """The versions that a result depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("revtrain", "torch", "torchvision", "hydra-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_result(run_dir: Path, result: Result) -> None:
    """Write result.json in one step.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    text = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"
    write_atomic(Path(run_dir) / schema.RESULT, text.encode())


def holds_run(run_dir: Path) -> bool:
    """Whether a run has left results in this folder."""
    return any((Path(run_dir) / name).exists() for name in schema.TRACES)


def one_line(error: BaseException) -> str:
    """The error as result.json and lists of jobs show it: the type where it is not meant for users."""
    from revtrain.errors import RevtrainError

    text = str(error)
    return text if isinstance(error, RevtrainError) else f"{type(error).__name__}: {text}"


class RunWriter:
    """Collects what a run measures and writes it where people and programs look for it.

    Args:
        run_dir: an existing folder of this run alone.
        config: the resolved configuration.
        overrides: the command line that made it.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], overrides: list[str]):
        self.run_dir = Path(run_dir)
        self.result = new_result(config, overrides)
        self.lines = 0  # in metrics.jsonl
        self._trained_images, self._train_seconds = 0, 0.0
        self._writer = None

    def planned(self, plan: Any) -> None:
        """Take over a `planning.plan.Plan`: the batch it came to, and its prediction."""
        self.result["plan"] = plan.as_dict()
        self.result["config"]["batch"] = plan.batch
        self.result.update(
            params=plan.parameters,
            bytes_per_pixel=plan.bytes_per_pixel,
            memory_bytes={
                "peak": plan.peak_bytes,
                "parameters": plan.parameter_bytes,
                "gradients": plan.gradient_bytes,
                "optimizer": plan.optimizer_bytes,
                "activations": plan.activation_bytes + plan.scratch_bytes,
            },
        )

    def start(self, history: list[Line], timeline: Any = None) -> None:
        """Open the files; the lines of a run that is continued come first, in place of those it left here.

        Args:
            timeline: a `revtrain.planning.predict.StepTimeline` to draw.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        write_atomic(self.run_dir / schema.METRICS, b"".join(map(_encoded, history)))
        for events in self.run_dir.glob(schema.EVENTS):
            events.unlink()
        self._excepthook, threading.excepthook = threading.excepthook, _told_by_the_next_write(threading.excepthook)
        self._writer = SummaryWriter(str(self.run_dir))
        config = self.result["config"]
        values = {key: config[key] for key in HYPER_PARAMETERS}
        values["pooling"] = ",".join(values["pooling"])
        # SummaryWriter.add_hparams would open a second run below this one, with no curves in it
        experiment, session_start, self._session_end = hparams(values, dict.fromkeys(KEY_METRICS, 0.0))
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(session_start)
        self._writer.add_custom_scalars(LAYOUT)
        if timeline is not None and figures.available():
            title = f"Memory of one training step, {config['arch']}, batch {timeline.batch}: live storages, counted"
            figure = figures.memory_timeline_figure(timeline.live_bytes, timeline.ends, timeline.always_bytes, title)
            self._figure("memory/timeline", figure, 0)
        for line in history:
            self._take(line)
        write_result(self.run_dir, {**self.result, "status": "running"})

    def epoch(self, line: Line) -> None:
        """Append one epoch.

        Args:
            line: None where not measured.
        """
        with open(self.run_dir / schema.METRICS, "ab") as file:
            file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())  # the next checkpoint counts on it
        self._take(line)

    def _take(self, line: Line) -> None:
        """Take a line into the result and the dashboard."""
        line = _finite(line)
        self.lines += 1
        self._update_result(line)

        snr = line["snr_db"] or {"minimum": None, "layers": {}}
        gradients = line.get("gradients") or {"minimum_cosine": None, "maximum_relative_error": None}
        vram = line["peak_vram_mib"] or {"allocated": None}
        scalars = {
            Tag.ACCURACY_TRAIN: line["accuracy_train"],
            Tag.ACCURACY_TEST: line["accuracy_test"],
            Tag.LOSS_TRAIN: line["loss_train"],
            Tag.LOSS_TEST: line["loss_test"],
            Tag.LR: line["lr"],
            Tag.SNR_MINIMUM: snr["minimum"],
            Tag.GRADIENT_COSINE: gradients["minimum_cosine"],
            Tag.GRADIENT_ERROR: gradients["maximum_relative_error"],
            **{f"{Tag.SNR_OF_LAYER}{layer}": value for layer, value in snr["layers"].items()},
            Tag.PEAK_VRAM: vram["allocated"],
            Tag.BYTES_PER_PIXEL: self.result["bytes_per_pixel"],
            Tag.SPEED: line["images_per_second"],
        }
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, line["epoch"])
        if line["snr_db"] and figures.available() and self._is_due(line["epoch"]):
            forward = dict(reversed(snr["layers"].items()))  # the probe meets the last layer first
            title = f"SNR of the rebuilt activations, {self.result['arch']}, after epoch {line['epoch']}"
            self._figure("snr_db/profile", figures.snr_profile_figure(forward, title), line["epoch"])
        self._writer.flush()

    def finish(self, status: Status, error: BaseException | None = None) -> None:
        """Write result.json and close the files."""
        self.result["status"] = status
        self.result["error"] = None if error is None else one_line(error)
        try:
            write_result(self.run_dir, self.result)
        finally:
            if self._writer is not None:
                if status == "completed":
                    self._writer.file_writer.add_summary(self._session_end)
                try:
                    self._writer.close()
                finally:
                    threading.excepthook = self._excepthook

    def table(self) -> str:
        """The last word on the terminal."""
        result = self.result
        snr, vram = result["snr_db"], result["peak_vram_mib"]
        folder = _short(self.run_dir)
        accuracy, best = _percent(result["test_accuracy"]), _percent(result["best_test_accuracy"])
        rows = {
            "test accuracy": f"{accuracy} (best {best})",
            "minimum SNR": _snr(snr),
            "gradients": _gradients(result),
            "memory": f"{result['bytes_per_pixel']:.1f} bytes per pixel, weights and their gradients apart",
            "peak VRAM": "no CUDA",
            "speed": f"{_rate(result['images_per_second'])}, {result['train_seconds']:,.0f} s in all",
            "run": folder,
            "dashboard": f"tensorboard --logdir {folder}",
        }
        if vram:
            rows["peak VRAM"] = f"{vram['allocated']} MiB allocated, {vram['reserved']} MiB reserved"
        width = max(map(len, rows))
        title = f"{result['arch']}, {result['params']:,} parameters, {result['epochs']} epochs"
        rule = "-" * max(len(title), 60)
        return "\n".join([rule, title, *(f"  {name:<{width}}  {text}" for name, text in rows.items()), rule])

    def _is_due(self, epoch: int) -> bool:
        """Whether this epoch is one of those whose SNR profile is drawn: the first, the last, some between."""
        epochs = self.result["config"]["epochs"]
        return epoch == epochs or epoch % max(1, -(-epochs // (FIGURES - 1))) == 0

    def _figure(self, tag: str, figure: Any, epoch: int) -> None:
        self._writer.add_image(tag, figures.pixels(figure), epoch, dataformats="HWC")
        figure.clear()
        gc.collect()  # a figure is full of cycles: about a megabyte each would stay for a long time

    def _update_result(self, line: Line) -> None:
        """Take a line into the sums and maxima; the lines themselves are not kept, a run may have very many."""
        result = self.result
        result.update(epochs=line["epoch"], stream_overflows=line.get("stream_overflows"))
        if line["snr_db"]:
            result["snr_db"] = line["snr_db"]
        if compared := line.get("gradients"):
            result["gradients"] = compared
            result["gradients_trusted"] = trusted(line) and result["gradients_trusted"] is not False
        if peak := line["peak_vram_mib"]:
            before = result["peak_vram_mib"] or peak
            result["peak_vram_mib"] = {key: max(before[key], peak[key]) for key in peak}
        if line["train_seconds"] is None:
            return
        if (accuracy := line["accuracy_test"]) is not None:
            result["test_accuracy"] = accuracy
            result["best_test_accuracy"] = max(accuracy, result["best_test_accuracy"] or 0.0)
        self._trained_images += line["train_images"]
        self._train_seconds += line["train_seconds"]
        result["train_seconds"] = self._train_seconds
        # a clock that stood still measures nothing
        result["images_per_second"] = self._trained_images / self._train_seconds if self._train_seconds else None


class SilentWriter(RunWriter):
    """Collects what `RunWriter` does and writes nothing: for the processes of a run that do not lead."""

    def start(self, history: list[Line], timeline: Any = None) -> None:
        for line in history:
            self.epoch(line)

    def epoch(self, line: Line) -> None:
        self.lines += 1
        self._update_result(line)

    def finish(self, status: Status, error: BaseException | None = None) -> None:
        self.result["status"] = status


def _encoded(line: Line) -> bytes:
    """As it stands in metrics.jsonl."""
    return (json.dumps(_finite(line), allow_nan=False) + "\n").encode()


def _told_by_the_next_write(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """TensorBoard's thread prints a traceback where the disk is full, and the next write raises the same error."""

    def quieter(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            hook(args)

    return quieter


def _finite(value: Any) -> Any:
    """The same containers with None in place of NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _snr(snr: Snr | None) -> str:
    if snr is None:
        return "not measured"
    if snr["minimum"] >= EXACT_DB:
        return "exact: every layer's input was rebuilt to the last bit"
    return f"{snr['minimum']:.1f} dB at {snr['minimum_layer']}"


def _rate(images_per_second: float | None) -> str:
    return "not measured" if images_per_second is None else f"{images_per_second:,.0f} images/s"


def _gradients(result: Result) -> str:
    if result["gradients"] is None:
        return "not compared"
    cosine = f"cosine of at least {result['gradients']['minimum_cosine']:.4f} to the true ones"
    return cosine if result["gradients_trusted"] else f"{cosine}; NOT to be trusted, see the warning above"


def _percent(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{100 * accuracy:.2f} %"


def _short(path: Path) -> str:
    """Relative to where the user is, if the path lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
