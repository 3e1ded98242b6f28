"""From a checkpoint to the network it holds, ready for inference."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.config import Config, ImageSize, StreamSettings, read
from revtrain.data import Dataset, normalise
from revtrain.errors import RevtrainError
from revtrain.machine import device as devices
from revtrain.models import build_model, divisor
from revtrain.objective import loss_sum_and_hits
from revtrain.runs import checkpoint
from revtrain.runs.schema import CHECKPOINT, DataMeaning


@dataclass(frozen=True)
class Trained:
    """A trained network and what its inputs and outputs mean.

    `mean` and `std` are (3,) float32, of the images it was trained on, per channel, in units of the full scale (0..1).
    """

    path: Path  # of the checkpoint
    config: Config  # of the run
    epoch: int  # epochs completed
    model: nn.Module  # in eval mode
    classes: tuple[str, ...]
    image_size: ImageSize
    mean: Tensor
    std: Tensor
    device: torch.device
    binary: bool = False  # of the masks it was trained on: whatever is not 0 is of class 1

    @property
    def is_dense(self) -> bool:
        """Whether pixels have classes (task=segment), not images."""
        return self.config.network.task == "segment"

    @property
    def divisor(self) -> int:
        """Of the sides of an image that is taken whole."""
        return divisor(self.config.network)

    @property
    def streaming(self) -> StreamSettings | None:
        """How the run read its images while it trained; None: they were all of one size, and in memory."""
        return self.config.data.own if self.config.data.streams else None

    @property
    def resized(self) -> ImageSize | None:
        """What every image is resized to cover before anything else; None: it stays as it is."""
        if self.streaming is not None:
            return self.config.data.size
        return None if self.is_dense else self.image_size

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) float32 on the CPU, with task=segment (B, classes, H, W), of images (B, 3, H, W) uint8, in the
        precision of the run."""
        return self._on_device(images).float().cpu()

    def classes_of_pixels(self, images: Tensor) -> Tensor:
        """The most probable class of each pixel, (B, H, W) uint8 on the CPU, of images (B, 3, H, W) uint8."""
        return self._on_device(images).argmax(1).to(torch.uint8).cpu()

    def loss_and_confusion(self, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """The summed losses of all pixels of images (B, 3, H, W) uint8, which have the classes `labels` (B, H, W); how
        many pixels of class i were taken for class j, (classes, classes) int64 on the CPU. No logits of full size are
        made.
        """
        with torch.no_grad(), self._autocast():
            found = loss_sum_and_hits(self.model, self._normalised(images), labels.to(self.device), len(images))
        return found[0][0].item(), found[1].cpu()

    def _on_device(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self.model(self._normalised(images))

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.mean, self.std)

    def _autocast(self) -> AbstractContextManager[Any]:
        return devices.autocast(self.device, self.config.network.precision)

    def rebuilt(self, **changes: Any) -> nn.Module:
        """The same weights in a network with other values of `Network`, e.g. `backward="store"`; on the CPU."""
        network = replace(self.config.network, **changes)
        model = build_model(replace(self.config, network=network), len(self.classes), self.image_size)
        model.load_state_dict(self.model.state_dict())
        return model.eval().requires_grad_(False)


def restore(path: str | Path, device: str = "cpu", averaged: bool = False) -> Trained:
    """The network in a checkpoint.

    Args:
        path: of the checkpoint, or of the run directory that holds it.
        device: as `device=` of a run.
        averaged: with the average of the weights, which a run with `ema_decay` keeps, in their place.

    Raises:
        RevtrainError: the checkpoint is missing, damaged or of another version, or the device is absent, or there is no
            average in it.
    """
    state = checkpoint.load(path, key="")
    if averaged and state["average"] is None:
        raise RevtrainError(
            f"{path}: this run kept no average of its weights, which --averaged asks for.\n"
            "Leave --averaged out, or train with ema_decay=0.98."
        )
    path = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
    chosen = devices.choose_device(device)
    try:
        config = read(state["config"], stored=True)
        names, size, mean, std = _meaning(state["data"], state["classes"])
        model = build_model(config, len(names), size)
        model.load_state_dict(state["model"] | (state["average"]["means"] if averaged else {}))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RevtrainError(
            f"{path}: what this checkpoint holds does not fit together ({_first_line(error)}).\n"
            "It may come from another version of revtrain; use that version, or train anew."
        ) from error
    devices.check_precision(chosen, config.network.precision)
    devices.place(model.eval().requires_grad_(False), chosen)
    binary = bool(state["data"].get("binary", False))
    return Trained(path, config, state["epoch"], model, names, size, mean, std, chosen, binary)


def _meaning(data: DataMeaning, count: int) -> tuple[tuple[str, ...], ImageSize, Tensor, Tensor]:
    """Names of the `count` classes, size of the images, mean and deviation."""
    mean, std = torch.tensor(data["mean"], dtype=torch.float32), torch.tensor(data["std"], dtype=torch.float32)
    if not (len(data["classes"]) == count and mean.shape == std.shape == (3,)):
        raise ValueError("number of classes or channels")
    return tuple(map(str, data["classes"])), ImageSize.of(data["image_size"]), mean, std


def own_data(trained: Trained) -> Dataset:
    """The data set that the run was trained on, read as it was.

    Raises:
        RevtrainError: it is no longer where it was.
    """
    from revtrain.data import load_data

    try:
        return load_data(trained.config.data, trained.divisor, trained.config.machine.seed)
    except RevtrainError as error:
        raise RevtrainError(f"{trained.path}: the data set of this run cannot be read.\n{error}") from error


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 100 else text[:97] + "..."
