"""One warning when values leave the range of the grid that coupling blocks keep their states on."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from revtrain.config import CouplingSettings, Network
from revtrain.machine.processes import Processes
from revtrain.models.common import state_format
from revtrain.numerics.snr import stream_overflows

log = logging.getLogger(__name__)


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
        wider = "" if own.stream == "int32" else "stream=int32, "
        return (
            f"{consequence}. Use {wider}a smaller residual_scale (now {own.residual_scale:g}), a lower lr, "
            "or fewer grid_bits."
        )
