"""Sweeps that can be started again: what a job's folder holds, which process works in it, how each job ended.

The name of a job's folder ends in the fingerprint of its resolved configuration, so the same configuration finds the
same folder again. A user may name the folders otherwise (hydra.sweep.subdir), so the name proves nothing: the folder
itself says what lies there, in job.json (what was asked for) and in what the run recorded. That decides what happens:

    a run of another configuration        left alone, the job fails
    completed, planned                    skipped
    running or interrupted, with last.pt  resumed, in the same folder
    failed, or nothing to resume from     the run's files are removed, and it is repeated

Whoever works in a folder holds the lock on `.lock` in it; the system lets go of it however that process ends. So a
sweep may be killed at any moment, and two may be started at once.

Each job enters itself in the ledger of its sweep, a small file a job in SWEEP/.jobs/TOKEN, whatever launcher started
it and wherever its folder is: the list at the end says of each what became of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revtrain.config import absolute, flatten, registry
from revtrain.errors import RevtrainError
from revtrain.machine.files import LOCK, claim, write_atomic
from revtrain.numerics.decibels import snr_text
from revtrain.runs import schema
from revtrain.runs.read import read_result, settled
from revtrain.runs.schema import ENDED, Result
from revtrain.runs.writer import new_result, write_result

log = logging.getLogger(__name__)

# no figure of a run depends on them; nor on data.root, where a data set says so (SAME_IMAGES_ANYWHERE)
NEUTRAL = ("experiment", "device", "data.url", "data.cache", "data.workers")
GPUS, LEDGER = ".gpus", ".jobs"  # in the sweep's folder
PATIENCE_SECONDS = 10  # what a killed process may need to be gone
POLL_SECONDS = 1.0
SAVING_SECONDS = 20.0  # that a job may take to save itself when its sweep was killed


# ---- names ---------------------------------------------------------------------------------------


def identity(config: Mapping[str, Any], swept: Collection[str] = ()) -> dict[str, Any]:
    """Everything that decides the result of a run: dotted keys and their values, of JSON's types.

    Args:
        config: the resolved configuration. Where it can be read, a default counts as given: `null` and the value that
            it stands for are one job.
        swept: keys that the sweep varies: they tell jobs apart, also where they are `NEUTRAL`.
    """
    values = flatten(settled(dict(config)))
    if isinstance(values.get("resume"), str):
        values["resume"] = absolute(values["resume"])
    neutral = set(NEUTRAL) | ({"data.root"} if _same_images_anywhere(values.get("data.name")) else set())
    kept = {key: value for key, value in values.items() if key not in neutral or key in swept}
    return json.loads(json.dumps(kept, default=str))


def _same_images_anywhere(name: Any) -> bool:
    with suppress(ImportError, TypeError):
        return getattr(registry.load("data", name), "SAME_IMAGES_ANYWHERE", False)
    return False


def fingerprint(config: Mapping[str, Any], swept: Collection[str] = ()) -> str:
    """Eight hexadecimal digits that stand for the `identity` of a configuration."""
    return digest(identity(config, swept))


def digest(value: Any) -> str:
    """Eight hexadecimal digits, the same for equal values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def job_folder(sweep_dir: Path, name: str, mark: str) -> str:
    """The folder of the job with this fingerprint: the one that is there, else a new one called after `name`."""
    with suppress(OSError):  # no sweep yet
        for each in sorted(os.listdir(sweep_dir)):
            if each.endswith(f"-{mark}"):
                return each
    return f"{name}-{mark}"


# ---- one job -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One job of one start of a sweep: what it was asked for, and where.

    Args:
        asked: its `identity`.
        sweep_dir: absolute; what all jobs of the sweep share lies there.
        ledger: the folder where the jobs of this start enter themselves.
        error: why it did not do what it was asked for, as far as it could say.
    """

    number: int
    folder: Path
    asked: dict[str, Any]
    sweep_dir: Path
    ledger: Path
    error: str | None = None

    def enter(self, error: str | None = None) -> None:
        """Write the entry into the ledger.

        Raises:
            OSError: it cannot be written; the job must not count as done then.
        """
        self.ledger.mkdir(parents=True, exist_ok=True)
        entry = {"folder": os.fspath(self.folder), "asked": self.asked, "error": error}
        write_atomic(self.ledger / f"{self.number}.json", json.dumps(entry).encode())

    def foreign(self) -> list[str]:
        """In what the run in the folder differs from this job, as "seed: 0 there, 1 here"; [] where none is there."""
        noted = _read_json(self.folder / schema.JOB)
        found = _differences(noted, self.asked, sorted({*noted, *self.asked})) if noted else []
        result = read_result(self.folder)
        return found or self.differs_from(result.get("config") if result else None)

    def differs_from(self, recorded: Any) -> list[str]:
        """The same for the configuration that a run has recorded, in result.json or last.pt: of what was asked for
        that says less (what it is resumed from) or more (device, batch=auto)."""
        if not (isinstance(recorded, dict) and recorded):
            return []
        open_keys = {*NEUTRAL, "resume", *(["batch"] if self.asked.get("batch") == "auto" else [])}
        there = identity(settled(recorded, stored=True))
        return _differences(there, self.asked, [key for key in self.asked if key not in open_keys])

    def done(self) -> Result | None:
        """The result of this very job, where nothing is left to do, else None."""
        result = read_result(self.folder)
        return result if result and result["status"] in ENDED and not self.foreign() else None

    def make_ready(self) -> bool:
        """Make the folder ready for this job, and say whether it is resumed there; else no run is left in it.

        Raises:
            RevtrainError: it holds a run of another configuration. Only one that failed before it had a checkpoint
                is not worth keeping.
        """
        foreign, result = self.foreign(), read_result(self.folder)
        if foreign and (_saved(self.folder) or (result and result["status"] in ENDED)):
            raise self.refusal(foreign)
        resumed = not foreign and self._can_be_resumed(result)
        if not resumed:
            remove_run(self.folder)
        write_atomic(self.folder / schema.JOB, json.dumps(self.asked, indent=2).encode())
        return resumed

    def _can_be_resumed(self, result: Result | None) -> bool:
        from revtrain.runs import checkpoint

        if result and result["status"] == "failed":
            log.info("sweep      repeated; before: %s", outcome(result))
            return False
        try:
            state = checkpoint.load(self.folder)
        except RevtrainError as error:
            if (self.folder / schema.CHECKPOINT).exists():
                log.warning("sweep      from the start: %s", error)
            return False
        if foreign := self.differs_from(state["config"]):
            raise self.refusal(foreign)
        return True

    def refusal(self, foreign: Sequence[str]) -> RevtrainError:
        """The folder holds a run of another configuration."""
        return RevtrainError(
            f"{self.folder} holds a run of another configuration; nothing of it was changed.\n"
            f"{_listed(foreign)}.\n"
            "Choose another hydra.sweep.dir, or leave hydra.sweep.subdir out: each configuration then has its own "
            "folder."
        )

    def note_death(self, exit_code: int, config: dict[str, Any], overrides: list[str]) -> None:
        """Say that a signal ended the job's process. It counts as cut off: the next start resumes it."""
        if self.done():
            return
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        error = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        if not self.foreign():
            result = read_result(self.folder) or new_result(settled(config), overrides)
            with suppress(OSError):
                write_result(self.folder, {**result, "status": "running", "error": error})
        with suppress(OSError):
            self.enter(error)


def remove_run(folder: Path) -> None:
    """Remove the files of a run, and nothing else: the folder may be one in which a user keeps other things."""
    written = (schema.METRICS, schema.CHECKPOINT, schema.PREVIOUS, schema.JOB, schema.RESULT)
    unfinished = [f".{name}.*" for name in written]  # by `write_atomic`, where it was killed
    leftovers = [each for pattern in (schema.EVENTS, *unfinished) for each in folder.glob(pattern)]
    # result.json last: as long as it says `failed`, nothing of this is resumed
    for each in [*leftovers, *(folder / name for name in written)]:
        each.unlink(missing_ok=True)


def _saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in (schema.CHECKPOINT, schema.PREVIOUS))


def _read_json(path: Path) -> dict[str, Any]:
    """A file's mapping; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, default=str)  # NaN is itself

    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in keys
        if text(there.get(key)) != text(here.get(key))
    ]


def _listed(differences: Sequence[str], most: int = 3) -> str:
    more = f", and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


# ---- the machine ---------------------------------------------------------------------------------


def gpu_count() -> int:
    """GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


def parallel_jobs() -> int:
    """Jobs that share a machine well: one for each GPU, or for each core where there is none."""
    return gpu_count() or _cores()


def share_cores() -> None:
    """Leave this job its share of the cores, where nothing (OMP_NUM_THREADS; joblib sets it) has decided that yet."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, _cores() // parallel_jobs()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def gpu_for_job(device: str, sweep_dir: Path) -> Iterator[str]:
    """The device for one job of a sweep: of several GPUs the one with the fewest jobs of this sweep.

    Args:
        device: as configured; only `auto` and `cuda` leave a choice.
        sweep_dir: where lock files count the jobs on each GPU, for each machine apart.
    """
    import torch

    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count < 2:
        yield device
        return
    folder = Path(sweep_dir) / GPUS
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        yield f"cuda:{_take_gpu(folder, count, held)}"


def _take_gpu(folder: Path, count: int, held: ExitStack) -> int:
    layer = 0
    while True:  # a second job goes to a GPU when each has one
        for gpu in range(count):
            if held.enter_context(claim(folder / f"{platform.node()}-{gpu}-{layer}")):
                return gpu
        layer += 1


def end_with(parent: int) -> None:
    """End this process when its parent is gone: a worker whose sweep was killed must not go on in secret.

    Args:
        parent: process id; where it is not the parent's, nothing happens.
    """
    if os.getppid() == parent:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # a job then saves the step under way
    time.sleep(SAVING_SECONDS)
    os._exit(1)


# ---- all jobs ------------------------------------------------------------------------------------


def jobs_of(ledger: Path) -> list[Job]:
    """The jobs that one start of a sweep has begun, by number."""
    found = []
    for path in Path(ledger).glob("*.json"):
        entry = _read_json(path)
        if entry and path.stem.isdecimal():
            sweep_dir = ledger.parent.parent
            job = Job(int(path.stem), Path(entry["folder"]), entry["asked"], sweep_dir, ledger, entry["error"])
            found.append(job)
    return sorted(found, key=lambda job: job.number)


def close_ledger(ledger: Path) -> None:
    """Remove it; the folders of the jobs stay."""
    shutil.rmtree(ledger, ignore_errors=True)
    with suppress(OSError):
        ledger.parent.rmdir()  # another start may have its own there


def wait_for_others(jobs: Sequence[Job]) -> None:
    """Wait until no process works in the jobs' folders any more."""
    for job in jobs:
        while job.folder.is_dir() and not job.error and not job.done():
            with claim(job.folder / LOCK) as free:
                if free:
                    break
            print(f"waiting for another process that runs {job.folder.name} (Ctrl-C: leave it to that)", flush=True)
            with claim(job.folder / LOCK, patience_seconds=-1):
                pass


def summary(sweep_dir: Path, jobs: Sequence[Job]) -> tuple[str, bool]:
    """A line for each job, and whether all of them are done."""
    numbers = range(max((job.number for job in jobs), default=-1) + 1)
    begun = {job.number: job for job in jobs}
    lines = [f"{len(numbers)} jobs in {sweep_dir}"]
    lines += [f"  {_line(sweep_dir, begun[each]) if each in begun else f'{each}: never begun'}" for each in numbers]
    missing = sum(number not in begun or not begun[number].done() for number in numbers)
    taken = sum(bool(job.foreign()) for job in jobs)
    if missing > taken:
        lines.append(f"{missing} of them not completed; the same command again resumes or repeats these alone")
    elif taken:
        lines.append(f"{taken} of them not begun: choose another hydra.sweep.dir, or leave hydra.sweep.subdir out")
    lines.append(f"dashboard: tensorboard --logdir {shlex.quote(os.fspath(sweep_dir))}")
    return "\n".join(lines), not missing and bool(jobs)


def _line(sweep_dir: Path, job: Job) -> str:
    """A job's folder, and how it ended."""
    name = os.path.relpath(job.folder, sweep_dir)
    name = f"{job.number} ({name})" if not name.startswith(str(job.number)) else name
    if foreign := job.foreign():
        return f"{name}: failed: the folder holds a run of another configuration ({_listed(foreign, 1)})"
    result = read_result(job.folder)
    if result is None and job.error:
        return f"{name}: failed: {job.error.splitlines()[0]}"
    return f"{name}: {outcome(result)}"


def outcome(result: Result | None) -> str:
    """How a job ended, in one line; None: it left no result."""
    if result is None or result["status"] == "running":
        error = _first_line(result)
        return f"cut off: {error or f'its process was ended; see its {schema.LOG}'}"
    if result["status"] == "planned" and (plan := result["plan"]):
        fits = {True: ", fits", False: ", does not fit", None: ""}[plan["fits"]]
        return f"planned: batch {plan['batch']}, {plan['peak_bytes'] / 2**20:,.1f} MiB{fits}"
    if result["status"] != "completed":
        return f"{result['status']}: {_first_line(result) or 'Ctrl-C or a signal'}"
    snr = f", minimum SNR {snr_text(result['snr_db']['minimum'])}" if result["snr_db"] else ""
    return f"{100 * (result['test_accuracy'] or 0):.2f} %{snr}, {result['bytes_per_pixel'] or 0:.1f} bytes per pixel"


def _first_line(result: Result | None) -> str:
    return ((result and result.get("error")) or "").split("\n")[0]
