"""Sweeps that can be started again: what a job's folder says, and which process works in it.

The name of a job's folder ends in the fingerprint of its resolved configuration, so the same configuration finds the
same folder again. What lies there decides what happens:

    completed, planned                    skipped
    running or interrupted, with last.pt  resumed, in the same folder
    failed, or nothing to resume from     emptied and repeated

Whoever works in a folder holds the lock on `.lock` in it; the system lets go of it however that process ends. So a
sweep may be killed at any moment, and two may be started at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from revtrain.config import flatten
from revtrain.errors import RevtrainError
from revtrain.machine.files import LOCK, claim
from revtrain.runs import schema
from revtrain.runs.read import read_result, settled
from revtrain.runs.schema import ENDED, Result
from revtrain.runs.writer import new_result, write_result

log = logging.getLogger(__name__)

# no figure of a run depends on them; data.root is where the archive lies, but for data=imagefolder it is the data
NEUTRAL = ("resume", "experiment", "device", "data.root", "data.url", "data.cache")
GPUS = ".gpus"
PATIENCE_SECONDS = 10  # what a killed process may need to be gone
POLL_SECONDS = 1.0


# ---- names ---------------------------------------------------------------------------------------


def fingerprint(config: dict[str, Any], swept: Collection[str] = ()) -> str:
    """Eight hexadecimal digits that stand for everything that decides the result of a run.

    Args:
        config: the resolved configuration. Where it can be read, a default counts as given: `null` and the value that
            it stands for are one job.
        swept: keys that the sweep varies: they tell jobs apart, also where they are `NEUTRAL`.
    """
    values = flatten(settled(config))
    neutral = set(NEUTRAL) - set(swept)
    if values.get("data.name") == "imagefolder":
        neutral.discard("data.root")
    return digest({key: value for key, value in values.items() if key not in neutral})


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


def ended(run_dir: Path) -> Result | None:
    """The result of a job with which nothing is left to do, else None."""
    result = read_result(run_dir)
    return result if result and result["status"] in ENDED else None


def resume_from(run_dir: Path) -> Path | None:
    """Make the folder ready for its job: `run_dir` to resume what lies there, None after emptying it."""
    from revtrain.runs import checkpoint

    run_dir = Path(run_dir)
    result = read_result(run_dir)
    if result and result["status"] == "failed":
        log.info("sweep      repeated; before: %s", outcome(result))
    else:
        try:
            checkpoint.load(run_dir)
            return run_dir
        except RevtrainError as error:
            if (run_dir / schema.CHECKPOINT).exists():
                log.warning("sweep      from the start: %s", error)
    # result.json last: as long as it says `failed`, nothing of this is resumed
    leftovers = [each for each in run_dir.iterdir() if each.name not in schema.KEPT]
    for each in sorted(leftovers, key=lambda each: each.name == schema.RESULT):
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink(missing_ok=True)
    return None


def note_death(run_dir: Path, exit_code: int, config: dict[str, Any], overrides: list[str]) -> None:
    """Say in result.json that a signal ended the job's process. It counts as cut off: the next start resumes it."""
    if ended(run_dir):
        return
    result = read_result(run_dir) or new_result(settled(config), overrides)
    with suppress(ValueError):
        name = signal.Signals(-exit_code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        with suppress(OSError):
            write_result(run_dir, {**result, "status": "running", "error": f"its process was ended by {name}{hint}"})


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
    os._exit(1)


# ---- all jobs ------------------------------------------------------------------------------------


def jobs_in(sweep_dir: Path) -> list[Path]:
    """The folders of the jobs, by number."""
    folders = [each.parent for each in Path(sweep_dir).glob(f"*/{schema.HYDRA}")]
    return sorted(folders, key=lambda job: (int(number) if (number := job.name.split("-")[0]).isdigit() else 0, job))


def wait_for_others(sweep_dir: Path) -> None:
    """Wait until no process works in the sweep's folders any more."""
    for job in jobs_in(sweep_dir):
        while not ended(job):
            with claim(job / LOCK) as free:
                if free:
                    break
            print(f"waiting for another process that runs {job.name} (Ctrl-C: leave it to that)", flush=True)
            with claim(job / LOCK, patience_seconds=-1):
                pass


def summary(sweep_dir: Path) -> tuple[str, bool]:
    """A line for each job, and whether all of them are done."""
    jobs = jobs_in(sweep_dir)
    lines = [f"{len(jobs)} jobs in {sweep_dir}"]
    lines += [f"  {job.name}: {outcome(read_result(job))}" for job in jobs]
    missing = sum(not ended(job) for job in jobs)
    if missing:
        lines.append(f"{missing} of them not completed; the same command again resumes or repeats these alone")
    lines.append(f"dashboard: tensorboard --logdir {sweep_dir}")
    return "\n".join(lines), not missing


def outcome(result: Result | None) -> str:
    """How a job ended, in one line; None: it left no result."""
    if result is None or result["status"] == "running":
        error = _first_line(result)
        return f"cut off: {error or f'its process was ended; see its {schema.LOG}'}"
    if result["status"] == "planned" and (plan := result["plan"]):
        fits = {True: ", fits", False: ", does not fit", None: ""}[plan["fits"]]
        return f"planned: batch {plan['batch']}, {plan['peak_bytes'] / 2**20:,.1f} MiB{fits}"
    if result["status"] != "completed":
        return f"{result['status']}: {_first_line(result) or 'Ctrl-C or SIGTERM'}"
    snr = f", minimum SNR {result['snr_db']['minimum']:.1f} dB" if result["snr_db"] else ""
    return f"{100 * (result['test_accuracy'] or 0):.2f} %{snr}, {result['bytes_per_pixel'] or 0:.1f} bytes per pixel"


def _first_line(result: Result | None) -> str:
    return ((result and result.get("error")) or "").split("\n")[0]
