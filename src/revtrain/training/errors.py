"""What a run says when it must stop: what happened, where it stands, what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from torch import Tensor, nn

from revtrain.config import Config, ImageSize, InvertibleSettings
from revtrain.data import AnySplit
from revtrain.errors import RevtrainError
from revtrain.machine import device as devices
from revtrain.machine import files
from revtrain.machine.processes import Processes
from revtrain.models import Images, traits
from revtrain.planning import plan as planning
from revtrain.planning import predict
from revtrain.runs import checkpoint

SPARED = 0.9  # of the memory there is: the rest is for the allocator's rounding and the workspace of convolutions


# ---- training diverged -----------------------------------------------------------------------------------


def check_finite(losses: Tensor, epoch: int, config: Config) -> None:
    """Raise on the first loss of this epoch that is NaN or infinite; `losses` (steps,) are those so far."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise _diverged(f"the loss became {losses[step].item()} at step {step + 1} of epoch {epoch}", epoch, config)


def check_weights(model: nn.Module, epoch: int, config: Config) -> None:
    """Raise when the last step of an epoch left NaN or infinity in the weights or running statistics."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _diverged(f"{name} was no longer finite at the end of epoch {epoch}", epoch, config)


def _diverged(what: str, epoch: int, config: Config) -> RevtrainError:
    network = config.network
    ways = [f"a lower rate, as in lr={config.training.lr / 4:g}", "clip_grad_norm=1"]
    if network.backward == "invert" and traits(network.arch).reversible:
        if isinstance(network.own, InvertibleSettings):
            ways.append("a larger slope or epsilon_i")
        ways.append("backward=store to see whether the inversion is to blame")
    if network.precision != "fp32":
        ways.append("precision=fp32")
    good = f"epoch {epoch - 1}" if epoch > 1 else "the start: no epoch was completed"
    return RevtrainError(f"Training stopped: {what}.\nlast.pt holds {good}.\nTry {', or '.join(ways)}.")


# ---- images of different sizes ---------------------------------------------------------------------------


def check_sizes(train: AnySplit, share: int, accumulate: int) -> None:
    """Refuse to put images of different sizes together; `share` are those of a step in one process."""
    if train.is_uniform or share == accumulate:
        return
    raise RevtrainError(
        f"The training images differ in size (up to {train.image_size}), and batch={share} with "
        f"accumulate={accumulate} puts {share // accumulate} of them together.\n"
        f"Take one at a time (batch=1, or accumulate={share}), or bring all to one size: "
        "data.crop=SIDE cuts parts out, data.image_size=SIDE resizes."
    )


# ---- the folder and the disk -----------------------------------------------------------------------------


def folder_taken(run_dir: Path) -> RevtrainError:
    """Another run's results are there."""
    return RevtrainError(
        f"{run_dir} already holds a run; nothing of it was changed.\n"
        "Choose another folder, or leave hydra.run.dir out: each run then gets a new one."
    )


def explain(error: Exception, run_dir: Path) -> RevtrainError | None:
    """What the user can do about an error from below; None where it is a bug of ours."""
    if isinstance(error, RevtrainError):
        return error
    if isinstance(error, OSError) and error.errno in files.DISK_FULL and files.is_about(error, run_dir):
        saved = any((run_dir / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS))
        remedy = (
            f"What last.pt held before is still whole. Make room, then continue:\n{checkpoint.command(run_dir)}"
            if saved
            else "Nothing had been saved yet. Make room, then give the same command again."
        )
        return RevtrainError(
            f"The disk is full: a file in {run_dir} could not be written ({error.strerror}).\n{remedy}"
        )
    if not isinstance(error, OSError):
        return None
    if files.is_about(error, run_dir):
        return _unusable_folder(error, run_dir)
    return RevtrainError(files.told(error))


def _unusable_folder(error: OSError, run_dir: Path) -> RevtrainError:
    if error.errno == errno.ENOENT and not run_dir.exists():
        return RevtrainError(
            f"{run_dir} was deleted while the run was writing to it; what it held is gone.\nRun the same command again."
        )
    return RevtrainError(
        f"{error.filename}: {error.strerror}. The run's files go to {run_dir}.\n"
        "Choose another folder with hydra.run.dir=FOLDER, or give yourself the right to write there."
    )


# ---- out of memory ---------------------------------------------------------------------------------------


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: the CPU's allocator and Apple's raise a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    )


def out_of_memory(
    config: Config, batch: int, images: Images, device: torch.device, processes: Processes
) -> RevtrainError:
    """Say how large a batch would fit: a step's peak grows linearly with the batch, so two sizes tell.

    Args:
        config: of the run. batch: of one process.
        images: what the network knows of the data.
    """
    network, small = config.network, max(2, batch // 2)
    low, high = (
        predict.predict_step_memory(config, images.classes, images.size, each).peak_bytes for each in (small, 2 * small)
    )
    per_image = (high - low) / small
    fixed = low - per_image * small
    available = planning.limit_bytes(config.machine.memory_limit, device) or devices.available_bytes(device)
    budget = SPARED * available
    fits = min(int((budget - fixed) / per_image), batch - 1)
    fits -= fits % 8 if fits > 8 else 0
    if fits >= 2:
        advice = f"A batch of about {fits} would fit: batch={fits}."
    else:
        advice = "No batch fits: choose a smaller width, or a smaller depth."
    return processes.of_one_process(
        RevtrainError(
            f"{device} is out of memory: arch={network.arch} width={network.width} batch={batch} at "
            f"{ImageSize.of(images.size)}\n"
            f"needs about {_mib(fixed + per_image * batch)}; {_mib(available)} are available of "
            f"{_mib(devices.total_memory_bytes(device))}.\n{advice}{_other_networks(config, images, batch, budget)}"
        )
    )


def _other_networks(config: Config, images: Images, batch: int, budget: float) -> str:
    """Advice to one that stores every activation."""
    network = config.network
    if traits(network.arch).reversible:
        return " With backward=invert it needs far less." if network.backward == "store" else ""
    fitting = planning.alternatives(config, images, batch, int(budget))
    return f" At batch={batch} would fit: {'; '.join(fitting)}." if fitting else ""


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / devices.MIB:,.0f} MiB"
