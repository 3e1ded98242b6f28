"""Reading what runs left behind, in any state.

A run directory may be half-finished, damaged, or belong to another program. Nothing here raises for what is in a
file: what cannot be used becomes a `Problem`, and a value that is missing, not finite, of the wrong type or out of
its range becomes None.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from revtrain.config import flat, read
from revtrain.errors import RevtrainError
from revtrain.runs.schema import CONFIG, HYDRA, METRICS, RESULT, Result

RUNNING = "running or cut off"
UNKNOWN = "unknown"
MIB = 2**20
FILES = (RESULT, METRICS, CONFIG)
LARGEST_BYTES = 256 * MIB  # a run of a million epochs stays below
DEEPEST = 40  # levels of nesting; a result has four
LAST_EPOCH = 10**9
LARGEST = 1e40  # beyond float32: not a figure of any run, and sums of its squares might overflow


@dataclass(frozen=True)
class Problem:
    """What could not be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Epoch:
    """A line of metrics.jsonl; None where nothing was measured. Accuracies are 0..1."""

    epoch: int
    loss_train: float | None = None
    loss_test: float | None = None
    accuracy_train: float | None = None
    accuracy_test: float | None = None
    train_images: float | None = None
    train_seconds: float | None = None
    snr_minimum_db: float | None = None
    gradient_cosine: float | None = None  # the least of all parameters
    vram_allocated_mib: float | None = None
    vram_reserved_mib: float | None = None


@dataclass(frozen=True)
class Run:
    """One run directory. Accuracies are 0..1; None where nothing is known."""

    path: Path
    status: str
    error: str | None
    config: dict[str, Any]
    history: list[Epoch]  # by epoch, without duplicates
    epochs_done: int
    modified: float  # seconds since 1970, of the newest of its files
    params: float | None = None
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None
    test_accuracy_flip: float | None = None  # of image and mirror image averaged
    test_iou: float | None = None  # 0..1, with task=segment
    test_accuracy_ema: float | None = None  # of the average of the weights
    train_seconds: float | None = None
    images_per_second: float | None = None
    snr_db: dict[str, float] = field(default_factory=dict)  # of the last probe: layer -> dB, in forward order
    first_snr_db: dict[str, float] = field(default_factory=dict)  # of the first probe
    snr_minimum_db: float | None = None
    snr_minimum_layer: str | None = None
    bytes_per_pixel: float | None = None
    macs_per_image: float | None = None
    target_seconds: float | None = None  # of training, until the run's target accuracy
    step_peak_mib: float | None = None  # counted: storages alive in a training step, weights included
    vram_allocated_mib: float | None = None  # measured on a GPU
    vram_reserved_mib: float | None = None
    device: str | None = None

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @property
    def arch(self) -> str:
        arch = self.config.get("arch")
        return arch if isinstance(arch, str) else "?"

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def epochs_planned(self) -> float | None:
        return _number(self.config.get("epochs"), low=0)

    @property
    def progress(self) -> str:
        """Epochs, as in `12 of 40`."""
        planned = self.epochs_planned
        return str(self.epochs_done) if planned in (None, self.epochs_done) else f"{self.epochs_done} of {planned:g}"

    @property
    def step_seconds(self) -> float | None:
        """Seconds of one training step."""
        batch = _number(self.config.get("batch"), low=1)
        rate = self.images_per_second
        return batch / rate if batch and rate and rate > 1e-9 else None


class _Unreadable(Exception):
    """Why a file is of no use."""


def settled(config: dict[str, Any], stored: bool = False) -> dict[str, Any]:
    """The configuration as a run records it: the keys that its architecture and data set have, each with the value
    that it came to. One that cannot be read (it is of another program, or refused) is returned as it is.

    Args:
        config: resolved.
        stored: it comes from a run of before (see `revtrain.config.read`).
    """
    try:
        return flat(read({**config, "resume": None}, stored)) | {"resume": config.get("resume")}
    except (RevtrainError, LookupError, TypeError, ValueError, AttributeError, ImportError):
        return dict(config)


def read_result(run_dir: str | Path) -> Result | None:
    """result.json as a program of revtrain wrote it; None where there is none, or none that can be read."""
    try:
        result = json.loads((Path(run_dir) / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return cast(Result, result) if isinstance(result, dict) and "status" in result else None


def gather(paths: Iterable[str | Path]) -> tuple[list[Run], list[Problem]]:
    """All runs at and below `paths`, each once, and everything that could not be read."""
    runs: list[Run] = []
    problems: list[Problem] = []
    seen: set[tuple[int, int]] = set()
    for path in map(Path, paths):
        for folder in _folders(path, problems):
            try:
                status = folder.stat()
            except OSError as error:
                problems.append(Problem(folder, _why(error)))
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                run = read_run(folder, problems)
                runs += [run] if run else []
    return runs, problems


def _folders(path: Path, problems: list[Problem]) -> Iterator[Path]:
    """The folders at and below `path` that hold a file of a run. Links to folders are not followed."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problems.append(Problem(path, _why(error)))
        return
    if not stat.S_ISDIR(mode):
        if path.name in FILES:
            yield path.parent
        else:
            problems.append(Problem(path, f"neither a folder nor one of {', '.join(FILES[:2])}"))
        return
    found, before = False, len(problems)

    def refused(error: OSError) -> None:
        problems.append(Problem(Path(error.filename or path), _why(error)))

    for name, folders, files in os.walk(path, onerror=refused):
        names = {*folders, *files}
        if names & {RESULT, METRICS} or (HYDRA in names and _exists(Path(name, CONFIG))):
            found = True
            yield Path(name)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
    if not found and len(problems) == before:
        problems.append(Problem(path, "no run directory at or below it"))


def read_run(folder: Path, problems: list[Problem]) -> Run | None:
    """The run in `folder`, or None with the reasons in `problems`."""

    def taken(name: str, reader: Any) -> Any:
        path = folder / name
        if not _exists(path):
            return None
        try:
            return reader(path, lambda reason: problems.append(Problem(path, reason)))
        except _Unreadable as error:
            problems.append(Problem(path, str(error)))
            return None

    result = taken(RESULT, _result)
    history, first, last = taken(METRICS, _history) or ([], {}, {})
    config = result["config"] if result else None
    if not config:
        config = taken(CONFIG, _yaml_config)
    if not (result or history or config):
        return None

    # a result that is there, but of no use, leaves open how the run ended
    ended = {"status": UNKNOWN if _exists(folder / RESULT) else RUNNING, "error": None}
    known = {key: value for key, value in (result or {}).items() if value not in (None, {})}
    arch = {"arch": known.pop("arch", None)}
    values = _from_history(history, last) | ended | known | {"first_snr_db": first}
    values["epochs_done"] = max([known.get("epochs_done", 0), *(each.epoch for each in history)])
    values["config"] = arch | settled(config or {}, stored=True)
    return Run(path=folder, history=history, modified=max(_modified(folder / name) for name in FILES), **values)


# ---- the three files -----------------------------------------------------------------------------


def _result(path: Path, note: Any) -> dict[str, Any]:
    """result.json by the names of `Run`."""
    data = _plain(_json(_content(path)))
    if not isinstance(data, dict) or not {"status", "config"} <= data.keys():
        raise _Unreadable("not a result of revtrain: it has no status and config")
    values = _Values(data, note)
    snr = _Values(values.mapping("snr_db"), note, "snr_db.")
    memory = _Values(values.mapping("memory_bytes"), note, "memory_bytes.")
    vram = _Values(values.mapping("peak_vram_mib"), note, "peak_vram_mib.")
    device = _Values(values.mapping("device"), note, "device.")
    reached = _Values(values.mapping("target_reached"), note, "target_reached.")
    peak = memory.number("peak", low=0)
    status = values.text("status") or UNKNOWN
    return {
        "status": RUNNING if status == "running" else status,
        "error": values.text("error"),
        "config": values.mapping("config"),
        "arch": values.text("arch"),
        "epochs_done": int(values.number("epochs", low=0, high=LAST_EPOCH) or 0),
        "params": values.number("params", low=0),
        "test_accuracy": values.number("test_accuracy", low=0, high=1),
        **{
            key: values.number(key, low=0, high=1)
            for key in ("best_test_accuracy", "test_accuracy_flip", "test_accuracy_ema", "test_iou")
        },
        "train_seconds": values.number("train_seconds", low=0),
        "images_per_second": values.number("images_per_second", low=0),
        "snr_db": _layers(snr),
        "snr_minimum_db": snr.number("minimum"),
        "snr_minimum_layer": snr.text("minimum_layer"),
        "bytes_per_pixel": values.number("bytes_per_pixel", low=0),
        "macs_per_image": values.number("macs_per_image", low=0),
        "target_seconds": reached.number("train_seconds", low=0),
        "step_peak_mib": None if peak is None else peak / MIB,
        "vram_allocated_mib": vram.number("allocated", low=0),
        "vram_reserved_mib": vram.number("reserved", low=0),
        "device": device.text("title") or device.text("name"),
    }


def _history(path: Path, note: Any) -> tuple[list[Epoch], dict[str, float], dict[str, float]]:
    """The lines of metrics.jsonl that can be read, by epoch, of two for one epoch the later; the layers' SNRs of the
    first probe, and of the last."""
    lines = [(number, line) for number, line in enumerate(_content(path).split(b"\n"), start=1) if line.strip()]
    if not lines:
        note("empty")
    epochs: dict[int, Epoch] = {}
    first: tuple[int, Any] = (LAST_EPOCH + 1, {})
    last: tuple[int, Any] = (-1, {})
    bad: list[str] = []
    for number, line in lines:

        def bad_line(reason: str, number: int = number) -> None:
            bad.append(f"line {number}: {reason}")

        try:
            data = _json(line)
            epoch = _epoch(data, bad_line)
        except _Unreadable as error:
            bad_line(str(error))
            continue
        epochs[epoch.epoch] = epoch
        if epoch.snr_minimum_db is not None:
            first = min(first, (epoch.epoch, data["snr_db"]), key=lambda each: each[0])
            last = max((epoch.epoch, data["snr_db"]), last, key=lambda each: each[0])
    layers = [_layers(_Values(probe, bad.append, "snr_db.")) for _, probe in (first, last)]
    if bad:
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        note(f"{bad[0]}{others}; {len(epochs)} epochs were read")
    return [epochs[number] for number in sorted(epochs)], layers[0], layers[1]


def _epoch(data: Any, note: Any) -> Epoch:
    """One line, but for the SNRs of single layers: those of the first and the last probe are enough."""
    values = _Values(data if isinstance(data, dict) else {}, note)
    epoch = _number(values.data.get("epoch"), low=0, high=LAST_EPOCH)
    if epoch is None or epoch != int(epoch):
        raise _Unreadable("not a line of revtrain: it has no epoch")
    snr = _Values(values.mapping("snr_db"), note, "snr_db.")
    gradients = _Values(values.mapping("gradients"), note, "gradients.")
    vram = _Values(values.mapping("peak_vram_mib"), note, "peak_vram_mib.")
    return Epoch(
        epoch=int(epoch),
        loss_train=values.number("loss_train"),
        loss_test=values.number("loss_test"),
        accuracy_train=values.number("accuracy_train", low=0, high=1),
        accuracy_test=values.number("accuracy_test", low=0, high=1),
        train_images=values.number("train_images", low=0),
        train_seconds=values.number("train_seconds", low=0),
        snr_minimum_db=snr.number("minimum"),
        gradient_cosine=gradients.number("minimum_cosine"),
        vram_allocated_mib=vram.number("allocated", low=0),
        vram_reserved_mib=vram.number("reserved", low=0),
    )


def _yaml_config(path: Path, note: Any) -> dict[str, Any]:
    """.hydra/config.yaml, where Hydra wrote it for a run of revtrain."""
    import yaml  # comes with OmegaConf, which takes four times as long to import

    class Loader(yaml.SafeLoader):
        """Without aliases: a few of them, nested, stand for more than any memory holds. Hydra writes none."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has aliases")
            return super().compose_node(parent, index)

    try:
        data = _plain(yaml.load(_content(path).decode(), Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _Unreadable(f"not YAML: {_first_line(error)}") from None
    if not isinstance(data, dict) or not {"arch", "backward"} <= data.keys():
        raise _Unreadable("not a configuration of revtrain: it has no arch and backward")
    return data


# ---- values --------------------------------------------------------------------------------------


@dataclass
class _Values:
    """Takes values out of a mapping; what is of the wrong type is noted, and None."""

    data: dict[str, Any]
    note: Any
    prefix: str = ""

    def number(self, key: str, low: float = -LARGEST, high: float = LARGEST) -> float | None:
        value = self.data.get(key)
        taken = _number(value, low, high)
        if taken is None and value is not None:
            within = f" from {low:g}" * (low > -LARGEST) + f" to {high:g}" * (high < LARGEST)
            self._note(key, f"a number{within}")
        return taken

    def text(self, key: str) -> str | None:
        return self._of_type(key, str, "text")

    def mapping(self, key: str) -> dict[str, Any]:
        return self._of_type(key, dict, "a mapping") or {}

    def _of_type(self, key: str, kind: type, name: str) -> Any:
        value = self.data.get(key)
        if value is None or isinstance(value, kind):
            return value
        self._note(key, name)
        return None

    def _note(self, key: str, expected: str) -> None:
        value = self.data[key]
        given = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:40]
        self.note(f"{self.prefix}{key} is {given}; expected {expected}")


def _number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> float | None:
    """The value, if it is a number within the range; NaN is not."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high else None


def _layers(snr: _Values) -> dict[str, float]:
    """The probe lists layers as the backward pass meets them; here the first layer comes first."""
    layers = _Values(snr.mapping("layers"), snr.note, "snr_db.layers.")
    found = {name: layers.number(name) for name in reversed(layers.data)}
    return {name: value for name, value in found.items() if value is not None}


def _from_history(history: list[Epoch], layers: dict[str, float]) -> dict[str, Any]:
    """What result.json would say, for a run that has none yet."""
    accuracies = [each.accuracy_test for each in history if each.accuracy_test is not None]
    timed = [(each.train_images, each.train_seconds) for each in history if each.train_seconds and each.train_images]
    seconds = sum(taken for _, taken in timed if taken)
    minima = [each.snr_minimum_db for each in history if each.snr_minimum_db is not None]
    return {
        "test_accuracy": accuracies[-1] if accuracies else None,
        "best_test_accuracy": max(accuracies, default=None),
        "train_seconds": seconds or None,
        "images_per_second": sum(images for images, _ in timed if images) / seconds if seconds else None,
        "snr_db": layers,
        "snr_minimum_db": minima[-1] if minima else None,
        "snr_minimum_layer": min(layers, key=layers.__getitem__, default=None),
        **{
            key: max((value for each in history if (value := getattr(each, key)) is not None), default=None)
            for key in ("vram_allocated_mib", "vram_reserved_mib")
        },
    }


# ---- files and bytes -----------------------------------------------------------------------------


def _content(path: Path) -> bytes:
    """The whole file.

    Raises:
        _Unreadable: it is no file, may not be read, or is larger than any run's.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise _Unreadable("not a file")
        if status.st_size > LARGEST_BYTES:
            raise _Unreadable(f"{status.st_size / MIB:,.0f} MiB, more than any run writes")
        return path.read_bytes()
    except OSError as error:
        raise _Unreadable(_why(error)) from None


def _json(content: bytes) -> Any:
    """The value in `content`.

    Raises:
        _Unreadable: it is not JSON.
    """
    if not content.strip(b" \t\r\n\0"):  # a crash of the machine can leave zeros
        raise _Unreadable("empty" if not content.strip() else "nothing but zero bytes")
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError:
        raise _Unreadable("not text in UTF-8") from None
    except RecursionError:
        raise _Unreadable("not JSON of revtrain: nested too deep") from None
    except ValueError as error:
        raise _Unreadable(f"not JSON, or cut off: {_first_line(error)}") from None


def _plain(value: Any, depth: int = 0) -> Any:
    """The same value with text for keys, and of the types that JSON has.

    Raises:
        _Unreadable: it is nested deeper than anything of revtrain.
    """
    if depth > DEEPEST:
        raise _Unreadable(f"nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        return {str(key): _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, int) and value.bit_length() > 64:  # Python might refuse to print it
        return math.inf
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _exists(path: Path) -> bool:
    """Whether something of that name is there, be it readable or not."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    except OSError:
        return True
    return True


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _why(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
