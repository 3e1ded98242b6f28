"""The memory of a training step, by running one under a count of live storages (see `revtrain.memory.live`).

On fake tensors, which have shapes but no storage, this is a prediction for any machine; on real ones a measurement.
Scratch inside a kernel (a convolution's workspace) is not seen.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from revtrain.config import Config, read
from revtrain.core.pieces import few_rounds
from revtrain.core.repeats import without_repeats
from revtrain.machine import device as devices
from revtrain.memory.live import LiveStorages
from revtrain.models import Images, build
from revtrain.optim import make_optimizer

ROUNDS = 2  # of a loop that are run: in the second one, what the first has left behind is still alive


@dataclass(frozen=True)
class StepTimeline:
    """Live bytes over one training step, weights and momentum (`always_bytes`) included.

    `live_bytes` is their number after each allocation and each release; `ends` says at which index of it the
    forward and the backward pass and the optimizer's step end.
    """

    live_bytes: list[int]
    ends: dict[str, int]
    always_bytes: int
    batch: int  # images of this process


@dataclass(frozen=True)
class Prediction:
    """Bytes of one training step."""

    peak: int  # most bytes alive at any time
    parameters: int  # running statistics included
    gradients: int  # of the parameters
    optimizer: int  # momentum
    forward_backward: int  # most bytes alive before the optimizer's step
    timeline: StepTimeline = field(repr=False, compare=False)


class StepPredictor:
    """Live bytes of a training step of one network, for any batch.

    >>> predict = StepPredictor(cfg, classes=10, image_size=32)
    >>> predict(512).peak

    The step is one of many: momentum exists, and the gradients of the step before are gone.

    A prediction is quick or whole. The quick one takes a second where the whole one may take a minute; the two agree
    within 2 % (in fact within 0.3 %). It leaves out the further rounds of loops over pieces of the batch and over
    hidden chunks (`ROUNDS` are run) and the further ones of equal layers in a chain that inverts.

    Args:
        config: a `Config`, or the composed configuration; its `batch` plays no part.
        classes, image_size: of the data, the side in pixels.
        quick: leave out what repeats. The peak is then right, the timeline is not.
        device: where to run the whole step on real tensors; None: on fake ones, which allocates nothing.

    Raises:
        RevtrainError: a network that cannot be built.
        ValueError: a quick step on real tensors, which would compute nonsense.
    """

    def __init__(
        self,
        config: Config | DictConfig,
        classes: int,
        image_size: int,
        quick: bool = True,
        device: torch.device | None = None,
    ):
        if quick and device is not None:
            raise ValueError("a quick step leaves out what repeats: on real tensors use quick=False")
        config = read(config)
        self.image_size, self.quick = image_size, quick
        self.known: dict[int, Prediction] = {}  # batch -> what was predicted for it
        self._fake = FakeTensorMode() if device is None else None
        self._device = torch.device("cpu") if device is None else device
        self._precision, self._dtype = config.network.precision, devices.DTYPES[config.network.precision]
        self._live = LiveStorages(record=True)
        with self._counting():
            self._model = build(config.network, Images(classes, image_size)).train()
            if device is not None:
                self._model.to(device)
            self._parameter_bytes = self._live.live_bytes
            self._optimizer = make_optimizer(self._model, config.training)
            for parameter in self._model.parameters():  # a step without passes makes the momentum
                parameter.grad = torch.zeros_like(parameter)
            self._optimizer.step()
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())

    def __call__(self, batch: int) -> Prediction:
        """Of a step of `batch` images."""
        if batch not in self.known:
            if self.quick:
                with few_rounds(ROUNDS), without_repeats(self._model):
                    self.known[batch] = self._step(batch)
            else:
                self.known[batch] = self._step(batch)
        return self.known[batch]

    def _step(self, batch: int) -> Prediction:
        live, size = self._live, self.image_size
        with self._counting():
            self._optimizer.zero_grad(set_to_none=True)
            always = live.live_bytes
            images = torch.empty(batch, 3, size, size, dtype=self._dtype, device=self._device).normal_()
            labels = torch.zeros(batch, dtype=torch.int64, device=self._device)
            live.reset_peak()
            live.timeline.clear()
            with self._autocast():
                loss = F.cross_entropy(self._model(images), labels)
            ends = {"forward": len(live.timeline)}
            loss.backward()
            ends["backward"], forward_backward = len(live.timeline), live.peak_bytes
            del images, labels, loss
            gradients = live.live_bytes - always
            self._optimizer.step()
            ends["optimizer"] = len(live.timeline)
        return Prediction(
            peak=live.peak_bytes,
            parameters=self._parameter_bytes,
            gradients=gradients,
            optimizer=always - self._parameter_bytes,
            forward_backward=forward_backward,
            timeline=StepTimeline(live.timeline[:], ends, always, batch),
        )

    def _autocast(self) -> torch.autocast:
        return devices.autocast(self._device, self._precision)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count live bytes, on fake tensors unless there is a device; leave the random numbers as they are."""
        drawn_there = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(drawn_there), self._fake or nullcontext(), self._live, _unburdened_collector():
            yield


@contextmanager
def _unburdened_collector() -> Iterator[None]:
    """Keep Python's garbage collector from walking over all of torch, time and again: a third of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---- what a run records of its step ---------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step; see `predict_step_memory`."""

    batch: int
    image_size: int
    peak_bytes: int  # most bytes alive at any time of the step
    parameter_bytes: int  # M_theta, running statistics included
    gradient_bytes: int  # of the parameters
    optimizer_bytes: int  # momentum
    activation_bytes: int  # what the peak of forward and backward adds to the three above
    bytes_per_pixel: float  # slope of that peak over batch * height * width
    timeline: StepTimeline = field(repr=False, compare=False)


def predict_step_memory(config: Config | DictConfig, classes: int, image_size: int, batch: int) -> StepMemory:
    """The memory of one training step at `batch`, predicted whole by a `StepPredictor` on fake tensors.

    `bytes_per_pixel` is the slope of the peak of forward and backward pass between half the batch and the batch:
    weights, their gradients, momentum and scratch of fixed size fall out of it.

    Args:
        config, classes, image_size: see `StepPredictor`.
        batch: images of a step in one process.
    """
    predict = StepPredictor(config, classes, image_size, quick=False)
    smaller = max(1, batch // 2)
    half, full = predict(smaller), predict(batch)
    pixels = (batch - smaller) * image_size**2
    return StepMemory(
        batch=batch,
        image_size=image_size,
        peak_bytes=full.peak,
        parameter_bytes=full.parameters,
        gradient_bytes=full.gradients,
        optimizer_bytes=full.optimizer,
        activation_bytes=max(0, full.forward_backward - full.parameters - full.gradients - full.optimizer),
        bytes_per_pixel=(full.forward_backward - half.forward_backward) / pixels if pixels else 0.0,
        timeline=full.timeline,
    )
