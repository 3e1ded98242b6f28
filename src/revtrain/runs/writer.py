"""Writes what a run leaves behind: metrics.jsonl, result.json, a table on the terminal; `dashboard` the events.

What is in them is stated in `revtrain.runs.schema`. `result.json` is written in one step when training starts, with the
status `running`, and again at the end, whatever the end was.

This module does not import torch until a run starts, so that a refused configuration is answered at once.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from revtrain.machine.files import naming, sync, write_atomic
from revtrain.numerics.decibels import EXACT_DB, snr_text
from revtrain.numerics.fidelity import trusted
from revtrain.runs import schema
from revtrain.runs.dashboard import Dashboard
from revtrain.runs.schema import LINE_KEYS, Line, Result, Snr, Status

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
        self._dashboard: Dashboard | None = None  # from `start` on

    def planned(self, plan: Any) -> None:
        """Take over a `planning.plan.Plan`: the batch it came to, and its prediction."""
        self.result["plan"] = plan.as_dict()
        self.result["config"]["batch"] = plan.batch
        self.result["params"] = plan.parameters
        self.result["bytes_per_pixel"] = plan.bytes_per_pixel
        self.result["memory_bytes"] = {
            "peak": plan.peak_bytes,
            "parameters": plan.parameter_bytes,
            "gradients": plan.gradient_bytes,
            "optimizer": plan.optimizer_bytes,
            "activations": plan.activation_bytes + plan.scratch_bytes + plan.buffer_bytes,
        }

    def start(self, history: list[Line], timeline: Any = None) -> None:
        """Open the files; the lines of a run that is continued come first, in place of those it left here.

        Args:
            timeline: a `revtrain.planning.predict.StepTimeline` to draw.
        """
        write_atomic(self.run_dir / schema.METRICS, b"".join(map(_encoded, history)))
        on_gpu = str((self.result["device"] or {}).get("name", "")).startswith("cuda")
        self._dashboard = Dashboard(self.run_dir, self.result["config"], timeline, on_gpu)
        for line in history:
            self._take(line)
        write_result(self.run_dir, {**self.result, "status": "running"})

    def epoch(self, line: Line) -> None:
        """Append one epoch.

        Args:
            line: None where not measured.
        """
        path = self.run_dir / schema.METRICS
        with naming(path), open(path, "ab") as file:
            file.write(_encoded(line))
            file.flush()
            sync(file)  # the next checkpoint counts on it
        self._take(line)

    def _take(self, line: Line) -> None:
        """Take a line into the result and the dashboard."""
        line = _finite(line)
        self.lines += 1
        self._update_result(line)
        if self._dashboard is not None:
            self._dashboard.add(line, self.result)

    def finish(self, status: Status, error: BaseException | None = None) -> None:
        """Write result.json and close the files."""
        self.result["status"] = status
        self.result["error"] = None if error is None else one_line(error)
        try:
            write_result(self.run_dir, self.result)
        finally:
            if self._dashboard is not None:
                self._dashboard.close(status == "completed")

    def table(self) -> str:
        """The last word on the terminal."""
        result = self.result
        snr, vram = result["snr_db"], result["peak_vram_mib"]
        folder = _short(self.run_dir)
        accuracy, best = _percent(result["test_accuracy"]), _percent(result["best_test_accuracy"])
        rows = {
            "test accuracy": f"{accuracy} (best {best})",
            **_apart(result),
            **_target(result),
            "minimum SNR": _snr(snr),
            "gradients": _gradients(result),
            "memory": f"{result['bytes_per_pixel']:.1f} bytes per pixel, weights and their gradients apart",
            "peak VRAM": f"no CUDA{_live(result)}",
            "speed": f"{_rate(result['images_per_second'])}, {result['train_seconds']:,.0f} s in all",
            "run": folder,
            "dashboard": f"tensorboard --logdir {shlex.quote(folder)}",
        }
        if vram:
            rows["peak VRAM"] = f"{vram['allocated']} MiB allocated, {vram['reserved']} MiB reserved"
        width = max(map(len, rows))
        title = f"{result['arch']}, {result['params']:,} parameters, {result['epochs']} epochs"
        rule = "-" * max(len(title), 60)
        return "\n".join([rule, title, *(f"  {name:<{width}}  {text}" for name, text in rows.items()), rule])

    def _update_result(self, line: Line) -> None:
        """Take a line into the sums and maxima; the lines themselves are not kept, a run may have very many."""
        result = self.result
        result["epochs"], result["stream_overflows"] = line["epoch"], line["stream_overflows"]
        if line["snr_db"]:
            result["snr_db"] = line["snr_db"]
        if halves := line.get("halves"):  # a line of before has none
            result["halves"] = halves
        if compared := line["gradients"]:
            result["gradients"] = compared
            result["gradients_trusted"] = bool(trusted(line)) and result["gradients_trusted"] is not False
        if peak := line["peak_vram_mib"]:
            before = result["peak_vram_mib"] or peak
            result["peak_vram_mib"] = {
                "allocated": max(before["allocated"], peak["allocated"]),
                "reserved": max(before["reserved"], peak["reserved"]),
            }
        if line["train_seconds"] is None:
            return
        if (accuracy := line["accuracy_test"]) is not None:
            result["test_accuracy"] = accuracy
            result["best_test_accuracy"] = max(accuracy, result["best_test_accuracy"] or 0.0)
        result["test_accuracy_flip"] = line.get("accuracy_test_flip")  # a line of before has none
        result["test_accuracy_ema"] = line.get("accuracy_test_ema")
        result["test_iou"] = line.get("iou_test")
        self._trained_images += line["train_images"] or 0
        self._train_seconds += line["train_seconds"]
        result["train_seconds"] = self._train_seconds
        target = result["config"].get("target_accuracy")
        if target is not None and accuracy is not None and accuracy >= target and result["target_reached"] is None:
            result["target_reached"] = {
                "accuracy": accuracy, "epoch": line["epoch"], "train_seconds": self._train_seconds,
                "train_images": self._trained_images,
            }  # fmt: skip
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


def _finite(value: Any) -> Any:
    """The same containers with None in place of NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _apart(result: Result) -> dict[str, str]:
    rows = {
        "with flips": result["test_accuracy_flip"],
        "averaged": result["test_accuracy_ema"],
        "test IoU": result["test_iou"],
    }
    return {name: _percent(accuracy) for name, accuracy in rows.items() if accuracy is not None}


def _target(result: Result) -> dict[str, str]:
    target, reached = result["config"].get("target_accuracy"), result["target_reached"]
    if target is None:
        return {}
    when = "not reached" if reached is None else (
        f"reached in epoch {reached['epoch']}, after {reached['train_seconds']:,.1f} s and "
        f"{reached['train_images']:,} images"
    )  # fmt: skip
    return {f"{100 * target:g} %": when}


def _live(result: Result) -> str:
    memory = result["memory_bytes"]
    return f"; {memory['peak'] / 2**20:,.1f} MiB of live bytes a step, counted" if memory else ""


def _snr(snr: Snr | None) -> str:
    if snr is None:
        return "not measured"
    if snr["minimum"] >= EXACT_DB:
        return "exact: every layer's input was rebuilt to the last bit"
    return f"{snr_text(snr['minimum'])} at {snr['minimum_layer']}"


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
    """Relative to where the user is, if the path lies below; within the folder itself (hydra.job.chdir) the user is
    elsewhere."""
    try:
        relative = path.resolve().relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(relative) if relative.parts else str(path)
