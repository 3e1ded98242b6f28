"""The memory of a training step, by running one under a count of live storages (see `revtrain.memory.live`).

On fake tensors, which have shapes but no storage, this is a prediction for any machine; on real ones a measurement.
Scratch inside a kernel (a convolution's workspace) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from revtrain.config import Config, ImageSize, read
from revtrain.core.chain import observe
from revtrain.core.repeats import without_repeats
from revtrain.data import Split
from revtrain.kernels.operator import planning_for
from revtrain.kernels.pieces import MIB, few_rounds
from revtrain.machine import device as devices
from revtrain.machine.collector import unburdened_collector
from revtrain.memory.live import LiveStorages
from revtrain.memory.macs import CountMacs
from revtrain.models import Images, build
from revtrain.numerics.halves import count_halves
from revtrain.numerics.probing import inverts, loss_gradients, on_the_side, storing
from revtrain.numerics.snr import SnrMemory
from revtrain.objective import loss_sum_and_hits, no_labels
from revtrain.optim import WeightAverage, make_optimizer
from revtrain.step.feed import OnDevice
from revtrain.step.work import Work

MOST_PIECES = 200  # of a state, for a prediction that leaves none of them out: it takes half a minute then
ROUNDS = 2  # of a loop that are run: in the second one, what the first has left behind is still alive


@dataclass(frozen=True)
class StepTimeline:
    """Live bytes over one training step; weights, momentum and the step's buffers (`always_bytes`) are among them.

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
    optimizer: int  # momentum, and the average of the weights
    buffers: int  # of the step: which images it takes and how each is changed, loss and hits
    forward_backward: int  # most bytes alive before the optimizer's step
    macs: int  # multiply-accumulates of forward and backward pass; of a quick prediction: too few
    timeline: StepTimeline = field(repr=False, compare=False)


class StepPredictor:
    """Live bytes of a training step of one network, for any batch.

    >>> predict = StepPredictor(cfg, classes=10, image_size=32)
    >>> predict(512).peak

    It is that of training (`revtrain.step.work`), one of many: momentum exists, and the gradients of the step before
    are gone. Where the images lie is not its part: they are taken from among a few that do not count. With `accumulate`
    micro-batches it ends with the last of them, with the gradients of those before it alive.

    A prediction is quick or whole. The quick one takes a second where the whole one may take a minute; they agree
    within 0.3 %, and in float32 to the byte. It leaves out the further rounds of loops over pieces of the batch and
    over hidden chunks (`ROUNDS` are run) and the further ones of equal layers in a chain that inverts.

    Args:
        config: a `Config`, or the composed configuration; its `batch` plays no part.
        classes, image_size: of the data, the side in pixels, or [height, width].
        quick: leave out what repeats. The peak is then right, the timeline is not.
        device: where to run the whole step on real tensors; None: on fake ones, which allocates nothing.
        planned_for: the type of device that fake tensors stand for, cpu or cuda.

    Raises:
        RevtrainError: a network that cannot be built.
        ValueError: a quick step on real tensors, which would compute nonsense.
    """

    def __init__(
        self,
        config: Config | DictConfig,
        classes: int,
        image_size: int | Sequence[int],
        quick: bool = True,
        device: torch.device | None = None,
        planned_for: str = "cpu",
    ):
        if quick and device is not None:
            raise ValueError("a quick step leaves out what repeats: on real tensors use quick=False")
        self._config = config = read(config)
        self.image_size, self.quick, self.accumulate = ImageSize.of(image_size), quick, config.training.accumulate
        self._classes = classes
        self.known: dict[int, Prediction] = {}  # batch -> what was predicted for it
        self._fake = FakeTensorMode() if device is None else None
        self._planned_for = planned_for if device is None and planned_for == "cuda" else None
        self._device = torch.device("cpu") if device is None else device
        self._precision, self._dtype = config.network.precision, devices.DTYPES[config.network.precision]
        self._live, self._macs = LiveStorages(record=True), CountMacs()
        with torch.random.fork_rng([]), self._fake or nullcontext():
            images = torch.randint(0, 256, (2, 3, *self.image_size), dtype=torch.uint8)
            self._feed = OnDevice(Split(images, no_labels(config.network.task, tuple(images.shape))), self._device)
        with self._counting():
            self._model = build(config.network, Images(classes, image_size)).train()
            if device is not None:
                devices.place(self._model, device)
            if self._planned_for == "cuda":
                devices.weights_channels_last(self._model)
            self._parameter_bytes = self._live.live_bytes
            self._optimizer = make_optimizer(self._model, config.training)
            for parameter in self._model.parameters():  # a step without passes makes the momentum
                parameter.grad = torch.zeros_like(parameter)
            self._optimizer.step()
            decay = config.training.ema_decay
            self._average = None if decay is None else WeightAverage(self._model, decay)
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
        live = self._live
        ends: dict[str, int] = {}
        peaks: dict[str, int] = {}
        macs = 0

        def reached(phase: str) -> None:
            nonlocal macs
            ends[phase], peaks[phase] = len(live.timeline), live.peak_bytes
            if phase == "backward":  # the optimizer may bound the weights
                macs = self._macs.macs * self.accumulate

        with self._counting():
            self._optimizer.zero_grad(set_to_none=True)
            before = live.live_bytes
            share = -(-batch // self.accumulate) * self.accumulate
            mean, std = (torch.full((3,), 0.5, device=self._device) for _ in range(2))
            work = Work(
                self._model,
                self._config,
                self._optimizer,
                share,
                self._classes,
                self._feed,
                mean,
                std,
                self._device,
                average=self._average,
            )
            if self._fake is not None and work.rate is None:  # whether anything overflowed would be asked
                work.scaler = torch.amp.GradScaler("cpu", enabled=False)
            always = live.live_bytes
            if self.accumulate > 1:
                for parameter in self._model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            live.reset_peak()
            live.timeline.clear()
            self._macs.macs, work.reached = 0, reached
            work.micro_batch(self.accumulate - 1)
            gradients = live.live_bytes - always
            work.update()
        return Prediction(
            peak=live.peak_bytes,
            parameters=self._parameter_bytes,
            gradients=gradients,
            optimizer=before - self._parameter_bytes,
            buffers=always - before,
            forward_backward=peaks["backward"],
            macs=macs,
            timeline=StepTimeline(live.timeline[: ends["optimizer"]], ends, always, batch),
        )

    def evaluation(self, batch: int) -> int:
        """Most bytes alive at any time while the network evaluates `batch` images, momentum included."""
        self._model.eval()
        with self._counting(), few_rounds(ROUNDS) if self.quick else nullcontext(), torch.no_grad():
            self._optimizer.zero_grad(set_to_none=True)
            images, labels = self._normalised(batch)
            self._live.reset_peak()
            with self._autocast():
                loss_sum_and_hits(self._model, images, labels, batch)
            del images, labels
        self._model.train()
        return self._live.peak_bytes

    def probe(self, images: int, gradients: bool) -> int:
        """Most bytes alive at any time while `training.probe.Probe` measures on `images` images, momentum included.

        Args:
            gradients: they are compared, too.
        """
        model = self._model.train()
        on_host = self._device.type == "cpu" and self._planned_for is None
        with self._counting(), few_rounds(ROUNDS) if self.quick else nullcontext(), self._autocast():
            self._optimizer.zero_grad(set_to_none=True)
            batch, labels = self._normalised(images)
            self._live.reset_peak()
            if inverts(model):
                with on_the_side(model, self._device), observe(model, SnrMemory(model, on_host)):
                    loss_gradients(model, batch, labels)
            count_halves(model, batch)
            if gradients and inverts(model):
                rebuilt = [torch.empty_like(each) for each in model.parameters()]  # in a pass as the one above
                with on_the_side(model, self._device), storing(model):
                    loss_gradients(model, batch, labels)
                del rebuilt
            del batch, labels
        return self._live.peak_bytes

    def _normalised(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (count, 3, H, W) and their labels."""
        images = torch.empty(count, 3, *self.image_size, device=self._device)
        return images, no_labels(self._config.network.task, tuple(images.shape), self._device)

    def _autocast(self) -> torch.autocast:
        return devices.autocast(self._device, self._precision)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count live bytes, on fake tensors unless there is a device; leave the random numbers as they are."""
        drawn_there = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(drawn_there),
            self._fake or nullcontext(),
            self._live,
            planning_for(self._planned_for),
            self._macs,
            unburdened_collector(),  # a third of the time otherwise
        ):
            yield


# ---- what a run records of its step ---------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step; see `predict_step_memory`."""

    batch: int
    image_size: ImageSize
    peak_bytes: int  # most bytes alive at any time of the step
    parameter_bytes: int  # M_theta, running statistics included
    gradient_bytes: int  # of the parameters
    optimizer_bytes: int  # momentum, and the average of the weights
    activation_bytes: int  # what the peak of forward and backward adds to the three above
    bytes_per_pixel: float  # slope of that peak over batch * height * width
    macs_per_image: int  # multiply-accumulates of forward and backward pass
    timeline: StepTimeline = field(repr=False, compare=False)


def pieces_of_state(config: Config, batch: int, image_size: int | Sequence[int], device_type: str) -> float:
    """How many pieces of `chunk_mib` a state of `batch` images is, about."""
    network = config.network
    values = batch * ImageSize.of(image_size).pixels * (network.width or 0)
    state_bytes = values * devices.DTYPES[network.precision].itemsize
    return state_bytes / (MIB * network.piece_mib(device_type))


def predict_step_memory(
    config: Config | DictConfig,
    classes: int,
    image_size: int | Sequence[int],
    batch: int,
    planned_for: str = "cpu",
) -> StepMemory:
    """The memory of one training step at `batch`, predicted by a `StepPredictor` on fake tensors.

    `bytes_per_pixel` is the slope of the peak of forward and backward pass between half the batch, or twice of it, and
    the batch: weights, their gradients, momentum and scratch of fixed size fall out of it, and so do the step's
    buffers. The prediction is whole, and so is its timeline, but where a state is more than `MOST_PIECES` pieces.

    Args:
        config, classes, image_size: see `StepPredictor`.
        batch: images of a step in one process.
        planned_for: the type of device that the step is for.
    """
    config = read(config)
    unit = config.training.accumulate  # both batches are whole micro-batches
    quick = pieces_of_state(config, batch, image_size, planned_for) > MOST_PIECES
    predict = StepPredictor(config, classes, image_size, quick=quick, planned_for=planned_for)
    other = batch // 2 // unit * unit or 2 * batch
    half, full = predict(other), predict(batch)
    whole = -(-batch // unit) * unit
    pixels = (batch - other) * predict.image_size.pixels
    grown = full.forward_backward - full.buffers - half.forward_backward + half.buffers
    return StepMemory(
        batch=batch,
        image_size=predict.image_size,
        peak_bytes=full.peak,
        parameter_bytes=full.parameters,
        gradient_bytes=full.gradients,
        optimizer_bytes=full.optimizer,
        activation_bytes=max(0, full.forward_backward - full.parameters - full.gradients - full.optimizer),
        bytes_per_pixel=grown / pixels,
        macs_per_image=full.macs // whole,
        timeline=full.timeline,
    )
