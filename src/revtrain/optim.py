"""The optimizer's parameter groups and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from revtrain.config import Training
from revtrain.layers import bounds_weights, constrain_


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.SGD:
    """SGD with Nesterov momentum. Biases and norm parameters (one dimension) decay only if it says so.

    After every step, convolutions with a bound on their gain are brought back to it (`max_gain`).
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
