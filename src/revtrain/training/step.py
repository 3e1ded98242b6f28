"""One step of training, with all that it needs held on the device; on CUDA captured in a graph and replayed.

B images of a batch, K micro-batches of it, H x W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from revtrain import data
from revtrain.config import Config
from revtrain.core.hooks import has_hooks
from revtrain.core.recompute import SIMPLE, Generators, held_generators
from revtrain.data import Dataset
from revtrain.machine import device as devices
from revtrain.machine.graph import GRAPHS, Graph
from revtrain.machine.processes import ALONE, Processes
from revtrain.optim import WeightAverage, make_optimizer
from revtrain.step.feed import make_feed
from revtrain.step.work import Work

log = logging.getLogger(__name__)

WARM_UP = 3  # steps before the capture: momentum is there by then, kernels are compiled and chosen


class Step(Work):
    """One step of the optimizer: draw, augment, forward, loss, backward, update.

    What is random is drawn on the CPU and lies, like the rate, in small tensors of the device that stay where they
    are. The rest is work without arguments that nothing waits for. On CUDA it is captured in a graph (`graph=auto`)
    after a few steps, and replayed; where it cannot be captured it goes on as before, and one line says why.

    Args:
        model: on `device`, see `devices.place`.
        batch: B, images of a step, of all processes together.
        dataset: uint8 images on the CPU.
        room_bytes: what the device has left beside the step: the images go there if they fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        batch: int,
        dataset: Dataset,
        device: torch.device,
        processes: Processes = ALONE,
        room_bytes: int = 0,
    ):
        share = processes.share(batch)
        feed = make_feed(dataset.train, share, device, room_bytes)
        optimizer = make_optimizer(model, config.training)
        mean, std = dataset.mean.to(device), dataset.std.to(device)
        average = None if (decay := config.training.ema_decay) is None else WeightAverage(model, decay)
        classes = len(dataset.classes)
        super().__init__(model, config, optimizer, share, classes, feed, mean, std, device, processes, average)
        self.batch, self.image_size = batch, dataset.train.greatest
        data.check_pad(config.data.augment, dataset.train.least)
        self.generator = torch.Generator().manual_seed(config.machine.seed)  # of order and augmentation
        self.epoch = 1  # under way, for flips that alternate; who trains sets it
        augmentation = config.data.augment
        self.mirrored = (
            data.first_flips(len(dataset.train), config.machine.seed)
            if augmentation.flip and augmentation.alternate_flip
            else None
        )

        self.graph: Graph | None = None
        self.steps = 0  # since the start
        self.is_captured = False
        if config.machine.graph == "auto" and device.type in GRAPHS:
            if processes.size > 1:
                _say_no_graph("there are several processes")
            elif not dataset.train.is_uniform:
                _say_no_graph("images differ in size")
            else:
                self.graph = GRAPHS[device.type](device)

    def __call__(self, picked: Tensor, rate: float, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Train on the images `picked` (B,) of the training set; nothing of the batch is alive afterwards.

        Args:
            rate: of learning.
            following: (B,), those of the next step, where there is one.

        Returns:
            The batch's mean loss () and its hits (see `revtrain.objective`), of all processes together. Both lie on the
            device, and are overwritten by the next step.
        """
        own = self.processes.own(self.batch)
        self.feed.load(picked[own], self.epoch)  # what cannot be read stops here, before anything is drawn
        self._choose(picked[own])
        self._set_rate(rate)
        if self.average is not None:
            self.average.advance()
        if following is not None:
            self.feed.begin(following[own], self.epoch)
        self._advance()
        if following is not None:
            self.feed.prefetch(following[own])
        self.steps += 1
        return self.loss, self.hits

    def make_room(self, limit_bytes: int) -> None:
        """Between steps, for others that need as much as a step: give the graph's memory back where it is short.

        Args:
            limit_bytes: what this process may have of the device's memory.
        """
        if self.graph is not None and self.is_captured and 2 * devices.reserved_bytes(self.device) > limit_bytes:
            self.graph.release()
            self.is_captured = False

    # ---- before the work ---------------------------------------------------------------------------------

    def _choose(self, picked: Tensor) -> None:
        """Put down on the device which images a step takes and how each is changed: (B, columns), see `Work`."""
        own = self.processes.own(self.batch)
        drawn = data.draw_augmentation(self.batch, self.image_size, self.config.data.augment, self.generator)
        draws = drawn.each(lambda draw: draw[own])  # all processes draw the same
        if self.mirrored is not None:
            draws = draws._replace(flips=self.mirrored[picked] ^ (self.epoch % 2 == 0))
        choices = torch.cat([picked[:, None], draws.packed()], dim=1)
        if self.device.type == "cuda":
            choices = choices.pin_memory()  # so that the copy waits for nothing
        self.choices.copy_(choices, non_blocking=True)

    def _set_rate(self, rate: float) -> None:
        if self.rate is not None:
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate

    # ---- as it is, or from the graph ---------------------------------------------------------------------

    def _advance(self) -> None:
        if self.steps == 0:
            self._begin_momentum()
        if self.graph is None:
            self.work()
        elif self.steps < WARM_UP:
            self._warm_up(self.graph)
        else:
            if not self.is_captured:
                self._capture(self.graph)
            if self.is_captured:
                self.graph.replay()
            else:
                self.work()

    def _warm_up(self, graph: Graph) -> None:
        watched = HostState(self.model) if self.steps == WARM_UP - 1 else None
        graph.warm_up(self.work)
        if watched is not None and (reason := watched.obstacle()):
            self._give_up(reason)

    def _capture(self, graph: Graph) -> None:
        scaling = self.scaler.state_dict()
        try:
            graph.capture(self.work)
            self.is_captured = True
        except Exception as error:  # whatever a user's module does that a graph cannot hold
            self._give_up(_first_cause(error))
            # nothing has run, but Python went through half a step
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler = devices.make_scaler(self.device, self.precision)
            self.scaler.load_state_dict(scaling)

    def _give_up(self, reason: str) -> None:
        _say_no_graph(reason)
        self.graph = None

    def _begin_momentum(self) -> None:
        """A fused first step that fp16 skips would leave momentum without values: it begins with zeros."""
        if self.rate is None:
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


# ---- what a graph cannot hold ----------------------------------------------------------------------------


class HostState:
    """What modules keep in Python, and generators outside of the device, before a step: a replay would not change it.

    Hooks are found as well: a replay does not call them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.generators = Generators([], held_generators(list(model.modules())))
        self.attributes = dict(self._attributes())

    def obstacle(self) -> str | None:
        """Why the step that has run since cannot be replayed; None: nothing is known against it."""
        for name, module in self.model.named_modules():
            if has_hooks(module) or any(map(_has_hooks, module._parameters.values())):
                return f"{name or 'the network'} has a hook, which a replay would not call"
        now = dict(self._attributes())
        changed = [key for key in now if key not in self.attributes or self.attributes[key] != now[key]]
        if changed:
            return f"{changed[0]} changes with each step, in Python, where a replay does not come by"
        if self.generators.have_changed():
            return "the network draws random numbers outside of the GPU"
        return None

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, SIMPLE):
                    yield f"{name}.{key}".lstrip("."), value


def _has_hooks(parameter: Tensor | None) -> bool:
    return parameter is not None and bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


def _say_no_graph(reason: str) -> None:
    log.info("graph      none: %s. Each step is launched operation by operation.", reason)


def _first_cause(error: BaseException) -> str:
    """The first line of the error that began it: the end of a capture fails as well when its middle did."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"
