"""Memory of a training step as a count of live storages: the same figure on any machine and device.

`LiveStorages` sees every tensor that torch makes. A storage counts from the operation that returns it until
its last reference is gone. Scratch inside a kernel (a convolution's workspace) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revtrain.config import read
from revtrain.machine.device import DTYPES
from revtrain.memory.live import LiveStorages
from revtrain.models import build_model
from revtrain.optim import make_optimizer


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


@dataclass(frozen=True)
class _Peaks:
    forward_backward: int
    step: int
    parameters: int
    gradients: int
    optimizer: int
    timeline: StepTimeline = field(repr=False, compare=False)


def training_step_memory(
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]],
    batch: int,
    image_size: int,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> _Peaks:
    """Peak live bytes of the second of two training steps of the model and optimizer that `make` builds.

    Real tensors, or fake ones inside a `FakeTensorMode`; images come in `dtype`, and a 16-bit one means autocast. The
    second step is the typical one: momentum
    exists and the gradients of the first are gone.
    """
    counter, ends = LiveStorages(record=True), {}
    with counter:
        model, optimizer = make()
        model.train()
        parameters = counter.live_bytes
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            between = counter.live_bytes
            images = torch.empty(batch, 3, image_size, image_size, device=device, dtype=dtype).normal_()
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            counter.reset_peak()
            counter.timeline.clear()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            ends["forward"] = len(counter.timeline)
            loss.backward()
            ends["backward"] = len(counter.timeline)
            forward_backward = counter.peak_bytes
            del images, labels, loss
            gradients = counter.live_bytes - between
            optimizer.step()
            step = max(forward_backward, counter.peak_bytes)
            ends["optimizer"] = len(counter.timeline)
        timeline = StepTimeline(counter.timeline[:], ends, always_bytes=between, batch=batch)
    return _Peaks(forward_backward, step, parameters, gradients, between - parameters, timeline)


def predict_step_memory(cfg: Any, classes: int, image_size: int, batch: int) -> StepMemory:
    """Peak live bytes of one training step of `cfg` at `batch`, predicted with fake tensors.

    Nothing is allocated and the device plays no part. `bytes_per_pixel` is the slope of the peak of forward
    and backward between half the batch and the batch: weights, their gradients, momentum and scratch of
    fixed size fall out of it.
    """

    config = read(cfg)

    def peaks(size: int) -> _Peaks:
        def make():
            model = build_model(config, classes, image_size)
            return model, make_optimizer(model, config.training)

        with FakeTensorMode(), torch.random.fork_rng([]):
            return training_step_memory(make, size, image_size, classes, DTYPES[config.network.precision])

    half, full = peaks(max(1, batch // 2)), peaks(batch)
    pixels = (batch - max(1, batch // 2)) * image_size**2
    fixed = full.parameters + full.gradients + full.optimizer
    return StepMemory(
        batch=batch,
        image_size=image_size,
        peak_bytes=full.step,
        parameter_bytes=full.parameters,
        gradient_bytes=full.gradients,
        optimizer_bytes=full.optimizer,
        activation_bytes=max(0, full.forward_backward - fixed),
        bytes_per_pixel=(full.forward_backward - half.forward_backward) / pixels if pixels else 0.0,
        timeline=full.timeline,
    )
