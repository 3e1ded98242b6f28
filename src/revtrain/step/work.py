"""What a training step does on the device: training runs it, planning counts it on fake tensors.

B images of a batch, K micro-batches of it, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from revtrain import data
from revtrain.config import Config
from revtrain.kernels.operator import device_type
from revtrain.machine import device as devices
from revtrain.machine.processes import ALONE, Processes
from revtrain.objective import is_dense, loss_and_hits, no_hits
from revtrain.optim import WeightAverage
from revtrain.step.feed import Feed


class Work:
    """One step of the optimizer as work without arguments: augment, forward, loss, backward, update.

    It reads the images' numbers and draws from `choices` (B, columns), the rate from `rate`, and leaves the batch's
    mean loss in `loss` () and its hits (`revtrain.objective`) in `hits`: all tensors that stay where they are.

    Args:
        model: on `device`, see `devices.place`.
        batch: B, of this process.
        classes: of images, or of their pixels.
        feed: where the images come from.
        mean, std: (3,), of the training images, on the device.
        average: of the weights, to be kept.

    `reached` is called with "forward", "backward" and "optimizer" where each of these ends.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        optimizer: torch.optim.Optimizer,
        batch: int,
        classes: int,
        feed: Feed,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        processes: Processes = ALONE,
        average: WeightAverage | None = None,
    ):
        self.model, self.config, self.training = model, config, config.training
        self.optimizer, self.feed, self.mean, self.std = optimizer, feed, mean, std
        self.device, self.processes, self.precision = device, processes, config.network.precision
        self.average = average
        self.wrapped = processes.wrap(model)  # what a step calls: the model, its gradients averaged
        self.scaler = devices.make_scaler(device, self.precision)
        columns = 1 + data.draw_columns(config.data.augment)
        self.choices = torch.zeros(batch, columns, dtype=torch.int64, device=device)  # the image, then its draws
        self.loss = torch.zeros((), device=device)
        self.hits = no_hits(config.network.task, classes, device)
        # a fused optimizer reads the rate where it lies
        self.rate = torch.zeros((), device=device) if optimizer.defaults["fused"] else None
        self.reached: Callable[[str], None] = lambda phase: None

    def work(self) -> None:
        """A step from `choices` to `loss` and `hits`: reads and writes nothing but what lies on the device."""
        self.loss.zero_()
        self.hits.zero_()
        for index in range(self.training.accumulate):
            self.micro_batch(index)
        self.update()

    def micro_batch(self, index: int) -> None:
        """Add the loss, the hits and the gradients of one of K parts of the batch."""
        count = len(self.choices) // self.training.accumulate
        part = slice(index * count, (index + 1) * count)
        with self.processes.averaging(self.wrapped, index == self.training.accumulate - 1):
            loss, hits = self._backpropagate(*self._augmented(part))
        self.loss += self.processes.mean(loss)
        self.hits += self.processes.sum(hits)

    def update(self) -> None:
        """The optimizer's step; the gradients are gone afterwards."""
        if self.training.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.reached("optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()

    def _augmented(self, part: slice) -> tuple[Tensor, Tensor]:
        """The augmented images (B / K, 3, H, W) and labels of a micro-batch."""
        augmentation, own = self.config.data.augment, self.choices[part]
        draws = data.Draws.unpacked(own[:, 1:], augmentation)
        images, labels = self.feed.take(part, own[:, 0])
        if is_dense(labels):
            labels = data.augment_masks(labels, draws, augmentation)
        inputs = data.augment(images, draws, self.mean, self.std, augmentation)
        # in the type and layout of the first convolution, as autocast would make them
        dtype, layout = devices.DTYPES[self.precision], devices.image_layout(device_type(self.loss))
        return inputs.to(dtype, memory_format=layout), labels

    def _backpropagate(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of a micro-batch, its share of the step's mean; that share of the loss, and hits."""
        training = self.training
        with devices.autocast(self.device, self.precision):
            loss, hits = loss_and_hits(self.wrapped, inputs, targets, training.label_smoothing)
        loss = loss / training.accumulate
        self.reached("forward")
        self.scaler.scale(loss).backward()
        self.reached("backward")
        return loss.detach(), hits
