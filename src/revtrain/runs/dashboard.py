"""TensorBoard's events of a run: scalars, hyper-parameters, a layout that opens on meaning, and a few figures.

This module does not import torch until a dashboard is opened.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from revtrain import figures
from revtrain.errors import RevtrainError, printable
from revtrain.machine.collector import unburdened_collector
from revtrain.numerics.decibels import EXACT_DB
from revtrain.runs.schema import EVENTS, Line, Result, Tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HYPER_PARAMETERS = (
    "arch", "depth", "width", "slope", "pooling", "backward", "batch", "epochs", "lr", "precision", "seed",
)  # fmt: skip
# the columns of the HParams tab; on a GPU the measured peak, elsewhere the live bytes in its place
KEY_METRICS = (Tag.ACCURACY_TEST, Tag.SNR_MINIMUM, Tag.BYTES_PER_PIXEL)
MIB = 2**20
FIGURES = 10  # SNR profiles a run: as many images of one tag as TensorBoard shows
# the custom-scalars tab; its tags are regular expressions
LAYOUT = {
    "accuracy, SNR, memory, speed": {
        "accuracy": ["Multiline", [f"{Tag.ACCURACY_TEST}$"]],
        f"SNR (dB), minimum; {EXACT_DB:g}: exact": ["Multiline", [f"{Tag.SNR_MINIMUM}$"]],
        "memory (bytes per pixel)": ["Multiline", [Tag.BYTES_PER_PIXEL]],
        "memory (MiB): peak VRAM; live bytes, counted": ["Multiline", [Tag.PEAK_VRAM, Tag.LIVE]],
        "speed (images/s)": ["Multiline", [Tag.SPEED]],
    },
    "more": {
        "accuracy, training images": ["Multiline", [Tag.ACCURACY_TRAIN]],
        "accuracy, with flip averaging; of averaged weights": [
            "Multiline",
            [Tag.ACCURACY_TEST_FLIP, Tag.ACCURACY_TEST_EMA],
        ],
        "IoU, task=segment": ["Multiline", [f"{Tag.IOU_TEST}$", f"{Tag.IOU_TRAIN}$"]],
        "IoU of each class, test images": ["Multiline", [Tag.IOU_OF_CLASS]],
        "loss": ["Multiline", [Tag.LOSS_TEST, Tag.LOSS_TRAIN]],
        "gradients, least cosine": ["Multiline", [Tag.GRADIENT_COSINE]],
        "halves, correlation": ["Multiline", [Tag.HALVES_CORRELATION]],
        "halves, effective rank": ["Multiline", [Tag.HALVES_RANK]],
        "gradients, greatest relative error": ["Multiline", [Tag.GRADIENT_ERROR]],
        f"SNR (dB), per layer; {EXACT_DB:g}: exact": ["Multiline", [f"{Tag.SNR_OF_LAYER}(?!min$)"]],
        "learning rate": ["Multiline", [Tag.LR]],
    },
}


class Dashboard:
    """The events of one run, in its folder; those of an earlier run there are removed.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration.
        timeline: a `revtrain.planning.predict.StepTimeline` to draw; None: nothing to draw.
        on_gpu: whether the run measures a peak of GPU memory.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], timeline: Any = None, on_gpu: bool = False):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for events in run_dir.glob(EVENTS):
            events.unlink()
        self._excepthook = threading.excepthook
        threading.excepthook = _told_by_the_next_write(self._excepthook)
        self._writer = SummaryWriter(_for_tensorboard(run_dir))
        self._file = cast(Any, self._writer.file_writer)  # which it has opened by now
        self._epochs = config["epochs"]
        values = {key: config[key] for key in HYPER_PARAMETERS}
        values["pooling"] = ",".join(values["pooling"])
        columns = (*KEY_METRICS, Tag.PEAK_VRAM if on_gpu else Tag.LIVE)
        # SummaryWriter.add_hparams would open a second run below this one, with no curves in it
        experiment, session_start, self._session_end = hparams(values, dict.fromkeys(columns, 0.0))
        self._file.add_summary(experiment)
        self._file.add_summary(session_start)
        self._writer.add_custom_scalars(LAYOUT)
        if timeline is not None and figures.available():
            title = f"Memory of one training step, {config['arch']}, batch {timeline.batch}: live storages, counted"
            what = (timeline.live_bytes, timeline.ends, timeline.always_bytes)
            self._figure("memory/timeline", lambda: figures.memory_timeline_figure(*what, title), 0)

    def add(self, line: Line, result: Result) -> None:
        """The curves of one epoch, and now and then a figure of its SNRs."""
        snr, gradients, vram = line["snr_db"], line["gradients"], line["peak_vram_mib"]
        memory = result["memory_bytes"]
        halves = line.get("halves")  # a line of before has none
        layers = snr["layers"] if snr else {}
        scalars = {
            Tag.ACCURACY_TRAIN: line["accuracy_train"],
            Tag.ACCURACY_TEST: line["accuracy_test"],
            Tag.ACCURACY_TEST_FLIP: line.get("accuracy_test_flip"),
            Tag.ACCURACY_TEST_EMA: line.get("accuracy_test_ema"),
            Tag.IOU_TRAIN: line.get("iou_train"),
            Tag.IOU_TEST: line.get("iou_test"),
            **{f"{Tag.IOU_OF_CLASS}{name}": value for name, value in (line.get("iou_of_classes") or {}).items()},
            Tag.LOSS_TRAIN: line["loss_train"],
            Tag.LOSS_TEST: line["loss_test"],
            Tag.LR: line["lr"],
            Tag.SNR_MINIMUM: snr and snr["minimum"],
            Tag.GRADIENT_COSINE: gradients and gradients["minimum_cosine"],
            Tag.GRADIENT_ERROR: gradients and gradients["maximum_relative_error"],
            Tag.HALVES_CORRELATION: halves and halves["correlation"],
            Tag.HALVES_RANK: halves and halves["effective_rank"],
            **{f"{Tag.SNR_OF_LAYER}{layer}": value for layer, value in layers.items()},
            Tag.PEAK_VRAM: vram and vram["allocated"],
            Tag.LIVE: memory and memory["peak"] / MIB,
            Tag.BYTES_PER_PIXEL: result["bytes_per_pixel"],
            Tag.SPEED: line["images_per_second"],
        }
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, line["epoch"])
        if snr and figures.available() and self._is_due(line["epoch"]):
            forward = dict(reversed(layers.items()))  # the probe meets the last layer first
            title = f"SNR of the rebuilt activations, {result['arch']}, after epoch {line['epoch']}"
            self._figure("snr_db/profile", lambda: figures.snr_profile_figure(forward, title), line["epoch"])
        self._writer.flush()

    def close(self, completed: bool) -> None:
        """The end of the events; only a completed run gets a row in the HParams tab."""
        if completed:
            self._file.add_summary(self._session_end)
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _is_due(self, epoch: int) -> bool:
        """Whether this epoch is one of those whose SNR profile is drawn: the first, the last, some between."""
        return epoch == self._epochs or epoch % max(1, -(-self._epochs // (FIGURES - 1))) == 0

    def _figure(self, tag: str, draw: Callable[[], Figure], epoch: int) -> None:
        with unburdened_collector():
            figure = draw()
            self._writer.add_image(tag, figures.pixels(figure), epoch, dataformats="HWC")
            figure.clear()
            del figure
            gc.collect()  # a figure is full of cycles: about a megabyte each would stay for a long time


def _for_tensorboard(run_dir: Path) -> str:
    """The folder by a name that TensorBoard can encode: it takes UTF-8 alone.

    Raises:
        RevtrainError: there is none.
    """
    for name in (os.fspath(run_dir), os.path.relpath(run_dir)):
        with suppress(UnicodeEncodeError):
            name.encode()
            return name
    raise RevtrainError(
        f"The run directory {printable(run_dir)} has a name that is not UTF-8, which TensorBoard cannot write to.\n"
        "Choose another folder with hydra.run.dir=FOLDER."
    )


def _told_by_the_next_write(
    hook: Callable[[threading.ExceptHookArgs], Any],
) -> Callable[[threading.ExceptHookArgs], Any]:
    """TensorBoard's thread prints a traceback where the disk is full, and the next write raises the same error."""

    def quieter(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            hook(args)

    return quieter
