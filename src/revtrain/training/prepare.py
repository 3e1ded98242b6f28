"""What is settled before the network is built: the batch, and what a run that goes on may differ in."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from revtrain.config import Config, flat
from revtrain.machine import device as devices
from revtrain.machine.processes import Processes
from revtrain.models import Images
from revtrain.planning import plan as planning
from revtrain.runs import checkpoint
from revtrain.runs.writer import RunWriter

log = logging.getLogger(__name__)


def choose_batch(
    config: Config,
    images: Images,
    available: int,
    resumed: dict[str, Any] | None,
    device: torch.device,
    writer: RunWriter,
    processes: Processes,
) -> int:
    """The images of a step: as given, or with batch=auto as the run to go on with had it, or the largest that fits.

    Raises:
        RevtrainError: a given one is larger than the training set, or needs more than `memory_limit`.
    """
    batch = config.training.batch
    if batch == "auto" and resumed is not None:  # as it was: what fits now may be another number
        batch = int(resumed["config"]["batch"])
        writer.result["config"]["batch"] = batch
    if isinstance(batch, int):
        planning.check_batch(batch, available)
        if config.machine.memory_limit is None:
            return batch
    own_share = processes.of_one(with_batch(config, batch))
    plan = planning.make_plan(own_share, device, images.classes, images.size, available // processes.size)
    writer.planned(plan)
    writer.result["config"]["batch"] = batch = processes.least(plan.batch) * processes.size
    if not plan.fits:
        raise processes.of_one_process(plan.refusal())
    log.info("plan       batch %d needs %.1f of %.1f MiB; the largest that fits is %d",
             plan.batch, plan.needed_bytes / devices.MIB, (plan.limit_bytes or 0) / devices.MIB,
             plan.largest_batch)  # fmt: skip
    return batch


def with_batch(config: Config, batch: int | str) -> Config:
    """`config` with another batch."""
    return replace(config, training=replace(config.training, batch=batch))


def in_place(config: Config, run_dir: Path) -> bool:
    """Whether the run to resume is the one of this folder."""
    if config.machine.resume is None:
        return False
    resumed = Path(config.machine.resume)
    named = resumed.name in (checkpoint.NAME, checkpoint.PREVIOUS)
    return (resumed.parent if named else resumed).resolve() == run_dir.resolve()


def check_resumed(
    resumed: dict[str, Any], config: Config, run_dir: Path, images: Images, available: int, processes: Processes
) -> None:
    """Refuse a checkpoint of another network or data set; say what costs bit-equality."""
    same_folder = processes.of_leader(in_place(config, run_dir))
    differences = checkpoint.check_compatible(resumed, flat(config), images.classes, available, same_folder)
    if resumed.get("processes", 1) != processes.size:
        differences.append(f"processes: {resumed.get('processes', 1)} in the checkpoint, {processes.size} now")
    for difference in differences:
        log.warning("resume     no longer bit-equal to an uninterrupted run: %s", difference)
