"""The probe of a run: what rounding does to rebuilt activations and to gradients, on one fixed, unaugmented batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revtrain.config import ProbeConfig
from revtrain.data import AnySplit
from revtrain.layers import unsynchronised
from revtrain.machine import device as devices
from revtrain.numerics import gradients, halves, snr
from revtrain.numerics.fidelity import summarise_gradients

log = logging.getLogger(__name__)

LEAST_IMAGES = 2  # of which batch norms can take statistics
BATCH_SEED = 0  # the same images in every run, whatever its seed


class Probe:
    """Measures outside of the training steps, and leaves no trace in the network.

    Args:
        probe: how many images, how often, and whether gradients are compared as well.
        training_set: whose images are taken.
    """

    def __init__(self, probe: ProbeConfig, training_set: AnySplit):
        shuffled = torch.randperm(len(training_set), generator=torch.Generator().manual_seed(BATCH_SEED))
        chosen = shuffled[: probe.batch] if probe.every else shuffled[:1]
        self.images, self.labels = training_set.read(chosen)  # uint8, on the CPU
        self.every, self.gradients = probe.every, probe.gradients
        self.missing: set[str] = set()  # parameters whose gradient does not arrive; said once

    def is_due(self, epoch: int) -> bool:
        return self.every > 0 and epoch % self.every == 0

    def measure(self, model: nn.Module, images: Tensor, device: torch.device, precision: str) -> dict[str, Any]:
        """`snr_db`, `halves` and, if asked for, `gradients` of a line of metrics.jsonl.

        Args:
            images: `self.images`, normalised and on `device`.
        """
        batch = images, self.labels.to(device)
        with devices.autocast(device, precision), unsynchronised(model):
            found: dict[str, Any] = {
                "snr_db": summarise_snr(snr.probe_snr(model, *batch)),
                "halves": halves.summarise_halves(halves.probe_halves(model, images)),
            }
            if self.gradients:
                found["gradients"] = self._compare_gradients(model, *batch)
        return found

    def _compare_gradients(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any] | None:
        try:
            found = gradients.probe_gradients(model, images, labels)
        except torch.OutOfMemoryError:  # the comparison stores every activation: training goes on without it
            self.gradients = False
            log.warning("probe      not enough memory to store the activations of %d images: gradients are not\n"
                        "           compared from here on. Try a smaller probe.batch.", len(labels))  # fmt: skip
            return None
        missing = [name for name, each in found.items() if each.is_missing and name not in self.missing]
        if missing:
            self.missing.update(missing)
            log.warning("probe      no gradient arrives at %s, though it has one with backward=store.\n"
                        "           revtrain.verify(model, images) says more; is it a parameter of the module that\n"
                        "           uses it, or a side input?", ", ".join(missing))  # fmt: skip
        return summarise_gradients(found)


def at_most(probe: ProbeConfig, images: int) -> ProbeConfig:
    """`probe` with so many images at most, though as many as batch norms need; says where that changes it."""
    if not probe.every or probe.batch <= images:
        return probe
    log.info("probe      of %d images: more of this size would store too much", images)
    return replace(probe, batch=images)


def probe_within(probe: ProbeConfig, need: Callable[[int, bool], int], budget: int) -> ProbeConfig:
    """`probe` with as many images as fit the memory; where not even two do, without gradients, or none at all.

    Args:
        need: (images, whether gradients are compared) -> most bytes alive while they are measured.
        budget: bytes that there are.
    """
    if not probe.every or need(probe.batch, probe.gradients) <= budget:
        return probe
    for compared in (True, False) if probe.gradients else (False,):
        fixed, at_all = need(LEAST_IMAGES, compared), need(probe.batch, compared)
        images = probe.batch
        if at_all > budget:  # by a line between the two, below which a need that is bent upwards stays
            per_image = (at_all - fixed) / (probe.batch - LEAST_IMAGES)
            images = LEAST_IMAGES + math.floor((budget - fixed) / per_image)
        if images >= LEAST_IMAGES:
            also = "" if compared or not probe.gradients else ", and gradients are not compared"
            log.info("probe      %d of %d images fit the memory%s", images, probe.batch, also)
            return replace(probe, batch=images, gradients=compared)
    log.warning("probe      does not fit the memory: nothing is measured. A smaller batch would leave room for it.")
    return replace(probe, every=0)


def summarise_snr(layers: dict[str, float]) -> dict[str, Any] | None:
    """{"minimum", "minimum_layer", "layers"} in dB; None without layers."""
    if not layers:
        return None
    worst = min(layers, key=layers.__getitem__)
    return {"minimum": layers[worst], "minimum_layer": worst, "layers": layers}
