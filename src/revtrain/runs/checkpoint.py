"""`last.pt`: written in one step, read without running code from it, refused where it does not fit.

A checkpoint is a file of `torch.save` with a SHA-256 of its bytes at the end, which `torch.load` passes over. The
checkpoint before it is kept as `previous.pt`, and takes its place when it is damaged or missing. What it holds is
stated in `revtrain.runs.schema.Checkpoint`, with `format` beside it: the version of that statement. Files of another
version are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shlex
import warnings
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import nn

from revtrain.config import all_keys, flatten, typed, word
from revtrain.errors import RevtrainError
from revtrain.machine import torchrun as launch
from revtrain.machine.files import write_atomic
from revtrain.runs import schema
from revtrain.runs.schema import CHECKPOINT as NAME
from revtrain.runs.schema import METRICS, PREVIOUS, Line

log = logging.getLogger(__name__)

FAMILY = "revtrain checkpoint "
FORMAT = f"{FAMILY}3"
SEAL = b"\nrevtrain sha256 "  # then 64 digits and a line feed end the file


class Stateful(Protocol):
    """What can be put down in a checkpoint and put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def _classes(hint: Any) -> tuple[type, ...]:
    """What `isinstance` must be asked for a value of this type: dict[str, Any] | None -> (dict, NoneType)."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(dict if is_typeddict(each) else get_origin(each) or each for each in options)


# checked before the network is there to judge the rest
TYPES = {name: _classes(hint) for name, hint in get_type_hints(schema.Checkpoint).items()}
# parts that a checkpoint of before has not
LATER: dict[str, Any] = {"average": None}
# another value here is another network: the weights do not fit
NETWORK_KEYS = ("arch", "depth", "width", "pooling")
# another value here leaves every number of the run the same
FREE_KEYS = (
    *("resume", "experiment", "memory_limit", "graph", "plan", "target_accuracy"),
    *("data.root", "data.url", "data.cache", "data.workers"),
)
# of an optimizer's groups: how it works rather than what it has come to
OWN_WAY = ("fused", "foreach", "capturable", "differentiable")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` in one step; the file that was there becomes `previous.pt`.

    Raises:
        OSError: the disk is full or the folder not writable; an earlier checkpoint is still whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    buffer.write(_seal(buffer.getbuffer()))
    write_atomic(path, buffer.getbuffer(), keep=path.with_name(PREVIOUS))


def load(path: str | Path, key: str = "resume=") -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file, or the run directory that holds it. In a directory `previous.pt` is read, with a warning,
            where `last.pt` is damaged or missing.
        key: how the user gave it, for the messages.

    Returns:
        What `save` was given, and `path`: the file that was read, and `history`: the lines of metrics.jsonl up to
        this checkpoint. Where that file is missing or damaged they are [], with a warning.

    Raises:
        RevtrainError: missing, damaged, or not a checkpoint of revtrain.
    """
    state, error = _find(Path(path), key)
    if error is not None:
        log.warning("resume     %s\n           Going on from %s instead, which is whole.",
                    str(error).rpartition("\n")[0].replace("\n", "\n           "), state["path"])  # fmt: skip
    state["history"] = _read_lines(state["path"].with_name(METRICS), state["lines"], state["epoch"])
    return state


def config_of(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run in a checkpoint; `path` and what is raised are as with `load`."""
    config: dict[str, Any] = _find(Path(path), "resume=")[0]["config"]
    return config


def _find(path: Path, key: str) -> tuple[dict[str, Any], RevtrainError | None]:
    """The file, or of a directory the one that can be used, and why `last.pt` is not that."""
    if not path.is_dir():
        return _read(path, key), None
    last, previous = path / NAME, path / PREVIOUS
    try:
        return _read(last, key), None
    except RevtrainError as error:
        if not previous.is_file():
            raise
        try:
            return _read(previous, key), error
        except RevtrainError:
            raise error from None


def _read(path: Path, key: str) -> dict[str, Any]:
    """One file, its checksum verified."""
    remedy = f"Give the {NAME} of an earlier run of revtrain; nothing was changed."
    if path.name == NAME and path.with_name(PREVIOUS).is_file():
        before = str(path.with_name(PREVIOUS))
        before = shlex.quote(word(key[:-1], before) if key else before)
        remedy = f"Nothing was changed. The checkpoint before it: {before}"
    if not path.is_file():
        raise RevtrainError(
            f"{key}{path} was given; there is no such file.\n"
            f"Give the directory of an earlier run, or the {NAME} in it, as in {key}outputs/DATE/RUN."
        )

    def refusal(what: str) -> RevtrainError:
        return RevtrainError(f"{key}{path} was given; {what}\n{remedy}")

    try:
        content = path.read_bytes()
    except OSError as error:
        raise refusal(f"the file cannot be read: {error.strerror}.") from error
    sealed = content[-len(_seal(b"")) :]
    whole = sealed.startswith(SEAL)
    if whole and sealed != _seal(memoryview(content)[: -len(sealed)]):
        raise refusal("the file is damaged: it no longer has the SHA-256 it was written with.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what a foreign file might be
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser that is given any bytes at all may fail in any way
        raise refusal(f"the file is truncated, or no checkpoint at all.\n({_first_line(error)})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if isinstance(found, str) and found.startswith(FAMILY) and found != FORMAT:
        raise RevtrainError(
            f"{key}{path} was given; it is a {found!r}, of another version of revtrain; expected {FORMAT!r}.\n"
            f"Use the version that wrote it ({schema.RESULT} beside it names that), or train anew."
        )
    if found != FORMAT:
        held = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise refusal(f"the file is no checkpoint of this revtrain ({FORMAT!r}).\nIt holds: {held}.")
    if not whole:
        raise refusal("the file is truncated or damaged: its checksum is missing, or wrong.")
    state = LATER | state
    wrong = [name for name, kinds in TYPES.items() if name not in state or not isinstance(state[name], kinds)]
    if wrong:
        raise refusal(f"the file is incomplete: {', '.join(wrong)} missing, or not of the type expected.")
    return state | {"path": path}


def folder_of(path: str | Path) -> Path:
    """The folder, resolved, of the run that `resume=path` names: the path itself, or that of the checkpoint in it."""
    path = Path(path)
    return (path.parent if path.name in (NAME, PREVIOUS) else path).resolve()


def put_in_place(state: dict[str, Any]) -> None:
    """Let the file that `state` was read from be `last.pt`: a run that goes on in its own folder keeps the file that
    is there as `previous.pt`, and that must not be a damaged one.

    Raises:
        OSError: the folder is not writable.
    """
    if state["path"].name == PREVIOUS:
        os.replace(state["path"], state["path"].with_name(NAME))


def _read_lines(path: Path, count: int, epoch: int) -> list[Line]:
    """The first `count` lines of metrics.jsonl, the last of them of `epoch`; the checkpoint knows of no later ones."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
        if [line["epoch"] for line in lines] != list(range(epoch + 1 - count, epoch + 1)):
            raise ValueError(f"{count} lines were expected")
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("resume     %s is missing or damaged (%s): the curves and the times of this run begin anew",
                    path, _first_line(error))  # fmt: skip
        return []
    return lines


def _seal(content: bytes | memoryview) -> bytes:
    return SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def check_compatible(
    state: dict[str, Any],
    config: dict[str, Any],
    classes: int,
    images: int | None = None,
    in_place: bool = False,
) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it.

    Args:
        state: from `load`.
        config: the resolved configuration of the new run.
        classes: of its data set.
        images: of its training set.
        in_place: the run goes on in its own folder; then it may be one that was cut off after its last epoch.

    Returns:
        The differences that cost bit-equality, as "lr: 0.4 in the checkpoint, 0.1 now".

    Raises:
        RevtrainError: the checkpoint is of another network, its run is already complete, or it was saved within
            an epoch that cannot be continued with another batch or other data.
    """
    before, now = flatten(state["config"]), flatten(config)
    before["data classes"], now["data classes"] = state["classes"], classes
    if images is not None and state.get("images") is not None:
        before["training images"], now["training images"] = state["images"], images
    usual = {name: key.default for name, key in all_keys().items()}  # of keys that are younger than the checkpoint
    differing = [key for key in now if key not in FREE_KEYS and before.get(key, usual.get(key)) != now[key]]
    foreign = [key for key in (*NETWORK_KEYS, "data classes") if key in differing]
    if foreign:
        raise RevtrainError(
            "resume: the checkpoint is of another network.\n"
            f"In the checkpoint: {', '.join(f'{key}={typed(before.get(key))}' for key in foreign)}; "
            f"given now: {', '.join(f'{key}={typed(now[key])}' for key in foreign)}.\n"
            f"To go on with it as it was: {command(config['resume'])}"
        )
    if state["epoch"] >= config["epochs"] and not in_place:
        raise RevtrainError(
            f"resume: this run has already completed its {state['epoch']} epochs; "
            f"epochs={config['epochs']} was given.\n"
            f"To train on, ask for more, as in epochs={2 * state['epoch']}."
        )
    order = [key for key in differing if key in ("batch", "training images") or key.startswith("data.")]
    if state.get("partial") and order:
        raise RevtrainError(
            f"resume: the checkpoint is from within epoch {state['epoch'] + 1}, which needs the same batch and data.\n"
            f"In the checkpoint: {', '.join(f'{key}={typed(before.get(key))}' for key in order)}; "
            f"given now: {', '.join(f'{key}={typed(now[key])}' for key in order)}.\n"
            f"Give the same, or begin at the end of the last complete epoch: the {PREVIOUS} beside it."
        )
    return [f"{key}: {typed(before.get(key))} in the checkpoint, {typed(now[key])} now" for key in differing]


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    generator: torch.Generator,
    device: torch.device,
    average: Stateful | None = None,
) -> dict[str, Any]:
    """The state that `restore` puts back."""
    return {
        "model": model.state_dict(),
        "optimizer": _with_numbers(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "average": None if average is None else average.state_dict(),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "data": generator.get_state(),
        },
    }


def _with_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state whose rates are numbers, also where they lie on the device: what goes on may be a CPU."""
    groups = [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return state | {"param_groups": groups}


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    generator: torch.Generator,
    device: torch.device,
    average: Stateful | None = None,
) -> None:
    """Put a captured state back, random generators last: whatever ran before has no influence. An average of which the
    state holds nothing begins anew.

    Raises:
        RevtrainError: the weights do not fit the model.
    """
    try:
        model.load_state_dict(state["model"])
        own_way = [{key: group[key] for key in OWN_WAY if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, own_way, strict=True):
            group.update(own)
        scaler.load_state_dict(state["scaler"])
        if average is not None and state["average"] is not None:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
        generator.set_state(state["rng"]["data"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RevtrainError(
            f"resume: the weights in the checkpoint do not fit this network ({_first_line(error)}).\n"
            "It may come from another version of revtrain; train anew, or use that version."
        ) from error


def command(resume: str | Path) -> str:
    """The command line that continues a run as it was, to be pasted into a shell."""
    return shlex.join([*launch.command(), word("resume", str(resume))])


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 100 else text[:97] + "..."
