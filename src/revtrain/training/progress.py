"""How far an epoch has come, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revtrain.errors import RevtrainError


@dataclass
class Progress:
    """How far an epoch has come: what a run that is ended within it needs to go on to the same numbers."""

    order: Tensor  # (N,) int64: the order of the training images in this epoch
    losses: Tensor  # (steps of an epoch,): the losses of the first `step` steps, then zeros
    correct: Tensor  # the hits of those steps, see `revtrain.objective`
    step: int = 0  # steps done
    seconds: float = 0.0  # that they took

    @classmethod
    def begin(cls, images: int, steps: int, generator: torch.Generator, hits: Tensor) -> Progress:
        """At its beginning; `hits`: zeros on the device of the losses."""
        return cls(
            order=torch.randperm(images, generator=generator),
            losses=torch.zeros(steps, device=hits.device),
            correct=hits,
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, saved: dict[str, Any], device: torch.device) -> Progress:
        try:
            return cls(**saved | {key: saved[key].to(device) for key in ("losses", "correct")})
        except (TypeError, KeyError, AttributeError) as error:
            raise RevtrainError(
                f"resume: what the checkpoint says of the epoch under way is incomplete ({error}).\n"
                "Begin at the end of the last complete epoch: the previous.pt beside it."
            ) from error


class Clock:
    """Seconds since it was made, from a given number on; never fewer than that, whatever the clock does."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.started = seconds, time.perf_counter()

    def seconds(self) -> float:
        return self.before + max(0.0, time.perf_counter() - self.started)
