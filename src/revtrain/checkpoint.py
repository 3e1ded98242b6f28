"""`last.pt`: written in one step, read without running code from it, refused where it does not fit.

A checkpoint is a dictionary of plain containers and tensors:

    format      "revtrain checkpoint 1"
    config      the resolved configuration, a dictionary
    overrides   the command line that made it, a list of strings
    classes     number of classes of the data set
    data        what inference needs of it: names of the classes, image_size in pixels, mean and std a channel (0..1)
    processes   that trained together under torchrun
    epoch       epochs completed; 0 is the state before the first
    model       state_dict
    optimizer   state_dict
    scaler      state_dict ({} but for fp16)
    rng         states of torch's CPU and CUDA generators and of the data's generator
    best_accuracy   best test accuracy so far, 0..1
    history     the lines of metrics.jsonl so far

The learning rate is a function of the step, which follows from the epoch: there is no schedule to store.
"""

from __future__ import annotations

import io
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revtrain import launch
from revtrain.config import flatten
from revtrain.errors import RevtrainError
from revtrain.files import write_atomic

FORMAT = "revtrain checkpoint 1"
NAME = "last.pt"
# another value here is another network: the weights do not fit
NETWORK_KEYS = ("arch", "depth", "width", "pooling")
# another value here leaves every number of the run the same
FREE_KEYS = ("resume", "experiment", "memory_limit", "plan", "data.root", "data.url", "data.cache")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` in one step.

    Raises:
        OSError: the disk is full or the folder not writable; an earlier checkpoint is still whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(path, buffer.getbuffer())


def load(path: str | Path, key: str = "resume=") -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file, or the run directory that holds it.
        key: how the user gave it, for the messages.

    Raises:
        RevtrainError: missing, truncated, or not a checkpoint of revtrain.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise RevtrainError(
            f"{key}{path} was given; there is no such file.\n"
            f"Give the directory of an earlier run, or the last.pt in it, as in {key}outputs/DATE/RUN."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what a foreign file might be
            state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser that is given any bytes at all may fail in any way
        raise RevtrainError(
            f"{key}{path} was given; the file is truncated, or no checkpoint at all.\n"
            f"({_first_line(error)})\n"
            "Give the last.pt of an earlier run of revtrain; nothing was changed."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise RevtrainError(
            f"{key}{path} was given; the file is no checkpoint of this revtrain ({FORMAT!r}).\n"
            f"It holds: {found}.\nGive the last.pt of an earlier run of revtrain; nothing was changed."
        )
    return state


def check_compatible(state: dict[str, Any], config: dict[str, Any], classes: int, in_place: bool = False) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it.

    Args:
        state: from `load`.
        config: the resolved configuration of the new run.
        classes: of its data set.
        in_place: the run goes on in its own folder; then it may be one that was cut off after its last epoch.

    Returns:
        The differences that cost bit-equality, as "lr: 0.4 in the checkpoint, 0.1 now".

    Raises:
        RevtrainError: the checkpoint is of another network, or its run is already complete.
    """
    before, now = flatten(state["config"]), flatten(config)
    before["data classes"], now["data classes"] = state["classes"], classes
    differing = [key for key in now if key not in FREE_KEYS and before.get(key) != now[key]]
    foreign = [key for key in (*NETWORK_KEYS, "data classes") if key in differing]
    if foreign:
        raise RevtrainError(
            "resume: the checkpoint is of another network.\n"
            f"In the checkpoint: {', '.join(f'{key}={before.get(key)}' for key in foreign)}; "
            f"given now: {', '.join(f'{key}={now[key]}' for key in foreign)}.\n"
            f"Repeat its own command line: {command(state['overrides'], config['resume'])}"
        )
    if state["epoch"] >= config["epochs"] and not in_place:
        raise RevtrainError(
            f"resume: this run has already completed its {state['epoch']} epochs; "
            f"epochs={config['epochs']} was given.\n"
            f"To train on, ask for more, as in epochs={2 * state['epoch']}."
        )
    return [f"{key}: {before.get(key)} in the checkpoint, {now[key]} now" for key in differing]


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Any]:
    """The state that `restore` puts back."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "data": generator.get_state(),
        },
    }


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Put a captured state back, random generators last: whatever ran before has no influence.

    Raises:
        RevtrainError: the weights do not fit the model.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise RevtrainError(
            f"resume: the weights in the checkpoint do not fit this network ({_first_line(error)}).\n"
            "It may come from another version of revtrain; train anew, or use that version."
        ) from error
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if device.type == "cuda" and state["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    generator.set_state(state["rng"]["data"])


def command(overrides: list[str], resume: str | Path) -> str:
    """The command line that continues a run."""
    kept = [each for each in overrides if not each.startswith("resume=")]
    return shlex.join([*launch.command(), *kept, f"resume={resume}"])


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 100 else text[:97] + "..."
