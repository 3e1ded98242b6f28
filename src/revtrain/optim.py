"""The optimizer's parameter groups, the learning rate of every step, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.config import Training
from revtrain.kernels.operator import device_type
from revtrain.layers import bounds_weights, constrain_


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.SGD:
    """SGD with Nesterov momentum. Biases and norm parameters (one dimension) decay only if it says so.

    After every step, convolutions with a bound on their gain are brought back to it (`max_gain`). On CUDA it is one
    kernel for all parameters, which reads the rate where it lies: no step waits, and a graph can hold it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 or training.decay_norm_and_bias]
    spared = [p for p in parameters if not (p.ndim > 1 or training.decay_norm_and_bias)]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        fused=True if parameters and all(device_type(each) == "cuda" for each in parameters) else None,
    )
    if bounds_weights(model):
        optimizer.register_step_post_hook(lambda *_: constrain_(model))
    return optimizer


def learning_rate(training: Training, steps: int) -> Callable[[int], float]:
    """The rate of each step, a function of its number alone: that is all a resumed run needs to know.

    Args:
        training: `schedule`, `lr` (the highest rate) and `warmup` (the share of steps in which it rises).
        steps: optimizer steps of the whole run.

    Returns:
        A function from the step, 0 to `steps` - 1, to its learning rate.
    """
    rise = training.warmup * steps

    def progress(step: int) -> float:
        """0 at the end of the rise, 1 one step after the last."""
        return (step + 1 - rise) / (steps + 1 - rise)

    def triangular(step: int) -> float:
        return (step + 1) / rise if step + 1 < rise else 1 - progress(step)

    def cosine(step: int) -> float:
        return (step + 1) / rise if step + 1 < rise else 0.5 * (1 + math.cos(math.pi * progress(step)))

    def onecycle(step: int) -> float:
        # torch.optim.lr_scheduler.OneCycleLR with its defaults: from 1/25 up to 1, down to 1/250,000
        low, final, peak, last = 1 / 25, 1 / 25e4, rise - 1, max(steps - 1, 1)
        if step <= peak:
            start, end, share = low, 1.0, step / peak
        else:
            start, end, share = 1.0, final, (step - peak) / (last - peak)
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    def constant(step: int) -> float:
        return 1.0

    shapes = {"triangular": triangular, "cosine": cosine, "onecycle": onecycle, "constant": constant}
    shape = shapes[training.schedule]
    return lambda step: training.lr * shape(step)


class WeightAverage:
    """An exponential average of a network's weights over its steps, and of its running statistics with the same shares.

    The first steps are averaged evenly, until the share of one is 1 - decay: none weighs more than those after it. How
    much the step under way counts lies on the device, so that a graph can hold `update`.

    Args:
        model: on its device.
        decay: of a step, 0..1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        state = dict(model.state_dict(keep_vars=True))
        self.own: dict[str, Tensor] = {name: each for name, each in state.items() if each.is_floating_point()}
        self.means = {name: each.detach().clone() for name, each in self.own.items()}
        self.share = torch.ones((), device=next(model.parameters()).device)

    def advance(self) -> None:
        """Before a step: put down how much it will count."""
        self.steps += 1
        self.share.fill_(max(1 - self.decay, 1 / self.steps))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, as a step has left them."""
        for name, mean in self.means.items():
            mean.lerp_(self.own[name], self.share.to(mean.dtype))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the average for its weights; it then gets its own back, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """One tensor after the other, where they lie: a graph reads the weights there."""
        for name, mean in self.means.items():
            kept = self.own[name].clone()
            self.own[name].copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            KeyError, RuntimeError: it is of another network.
        """
        self.steps = state["steps"]
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])
