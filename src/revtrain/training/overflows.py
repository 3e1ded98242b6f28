"""Values that leave the range of the grid that coupling blocks keep their states on: a warning, or the end of a run.

An integer that leaves its range comes back at its other end. A few of them are noise; where they are many, gradients
point anywhere, and the run is lost without saying so. In the first epoch, with the rate still rising, it is stopped.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from revtrain.config import CouplingSettings, Network
from revtrain.errors import RevtrainError
from revtrain.machine.processes import Processes
from revtrain.models.common import state_format
from revtrain.numerics.snr import stream_overflows

log = logging.getLogger(__name__)

LOST_SHARE = 1e-4  # of the values of a layer: beyond it a run with integer states is stopped in its first epoch


class OverflowWatch:
    """Values beyond the range of the states' grid: integers went on with a wrong number in their place, floating
    point is no longer undone exactly."""

    def __init__(self, model: nn.Module, network: Network[Any], processes: Processes):
        self.applies = any(name.endswith("overflows") for name, _ in model.named_buffers())
        self.model, self.network, self.processes = model, network, processes
        self.warned = False

    def count(self) -> int | None:
        """Since the run was started or resumed; None where nothing is counted."""
        return sum(self._by_layer().values()) if self.applies else None

    def stop_if_lost(self, epoch: int, steps: int, values: int) -> None:
        """Raise where, in the first epoch, a layer with integer states has lost more than `LOST_SHARE` of its values.

        Args:
            steps: of this epoch, so far. values: of one state, in all processes together.
        """
        own = self.network.own
        if epoch != 1 or not self.applies or not isinstance(own, CouplingSettings):
            return
        grid = state_format(self.network)
        layers = self._by_layer() if grid.is_integer else {}
        worst = max(layers, key=layers.__getitem__, default="")
        share = layers.get(worst, 0) / max(1, steps * values)
        if share > LOST_SHARE:
            raise RevtrainError(
                f"Training stopped: {share:.2%} of the states of {worst} left the range of {grid.name} within {steps} "
                "steps of epoch 1.\nThe network computes with wrong values there, and its gradients are not to be "
                f"trusted. {self._remedies(own)}\nA start that is this violent often has too short a warm-up: a larger "
                "warmup, or more epochs."
            )

    def warn_once(self, epoch: int) -> None:
        layers = self._by_layer() if self.applies and not self.warned else {}
        if not layers:
            return
        self.warned = True
        worst = max(layers, key=layers.__getitem__)
        log.warning(
            "stream     %d values left the range of the stream by epoch %d, most of them (%d) in %s.\n           %s",
            sum(layers.values()), epoch, layers[worst], worst, self._advice(),
        )  # fmt: skip

    def _by_layer(self) -> dict[str, int]:
        found = self.processes.add_up(stream_overflows(self.model))
        return {name: int(count) for name, count in found.items()}

    def _advice(self) -> str:
        own = self.network.own
        if not isinstance(own, CouplingSettings):
            return "Use a lower lr."
        wrong = state_format(self.network).is_integer
        consequence = (
            "The network computed with wrong values there" if wrong else "Reconstruction is no longer exact there"
        )
        return f"{consequence}. {self._remedies(own)}"

    def _remedies(self, own: CouplingSettings) -> str:
        wider = "" if own.stream == "int32" else "stream=int32, "
        return f"Use {wider}a smaller residual_scale (now {own.residual_scale:g}), a lower lr, or fewer grid_bits."
