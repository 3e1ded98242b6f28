"""The command line: `revtrain [key=value ...]`.

Hydra composes the configuration and makes the run directory. This module says in a few lines what is wrong
when something is, and turns the end of the run into an exit code:

    0    completed
    1    a bug in revtrain, or a sweep in which a job did not complete
    2    something the user can mend
    130  Ctrl-C
    143  SIGTERM

torch is imported inside the task, so that --help, shell completion and refusals answer at once.
"""

from __future__ import annotations

import io
import json
import logging
import logging.config
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from revtrain import __version__
from revtrain.cli.messages import check_keys, explain, first_line
from revtrain.conf import constant_keys, search_path
from revtrain.config import did_you_mean, read
from revtrain.errors import RevtrainError
from revtrain.machine import files
from revtrain.machine import sigterm as preemption
from revtrain.machine import torchrun as launch
from revtrain.runs import schema, sweeps
from revtrain.runs.read import settled
from revtrain.runs.schema import Status

# our presets are called as the launchers are, and complete in themselves
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
log = logging.getLogger(__name__)
file_log = logging.getLogger("revtrain.errors")  # train.log alone

COMPLETED, BUG, MENDABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PATIENCE_SECONDS = 5.0  # that the first process gets to report an error before another does
PARENT = "REVTRAIN_SWEEP_PID"  # of the process that runs the sweep, for its workers

_exit_codes: list[int] = []  # of the jobs that ran in this process
_sweeps: list[Path] = []  # folders of the sweeps that this process started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `revtrain`; by default those of this process.

    Returns:
        The exit code, see the head of this module.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if launch.rank() == 0:
        return _command(argv)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = _command(launch.silenced(argv))
    if code in (BUG, MENDABLE):
        time.sleep(PATIENCE_SECONDS)  # if the first process fails, too, torchrun ends this one now
        _say(said.getvalue())
    return code


def _command(argv: list[str]) -> int:
    _exit_codes.clear()
    _sweeps.clear()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        if "--version" in argv:
            print(f"revtrain {__version__} (Hydra {hydra.__version__})")
            return COMPLETED
        _check_flags(argv)
        with _raising_hydra(argv), preemption.watching():
            _run()
    except KeyboardInterrupt as end:
        terminated = isinstance(end, preemption.Terminated)
        _say("Ended by SIGTERM." if terminated else "Interrupted.")
        _list_sweeps(wait=False)
        return TERMINATED if terminated else INTERRUPTED
    except SystemExit as end:  # Hydra's --help and the like
        return end.code if isinstance(end.code, int) else COMPLETED
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        message = explain(error)
        if message is None and any(map(sweeps.jobs_in, _sweeps)):
            _say(f"The launcher of the sweep failed: {type(error).__name__}: {first_line(error)}")
            _list_sweeps(wait=False)
            return BUG
        if message is None:
            _say_bug(error, "Set HYDRA_FULL_ERROR=1 to see the traceback.")
            return BUG
        _say(message)
        return MENDABLE
    finally:
        os.environ.pop(PARENT, None)
    if not _sweeps:
        return max(_exit_codes, default=COMPLETED)
    try:
        return _list_sweeps()
    except KeyboardInterrupt:
        return INTERRUPTED


@hydra.main(version_base="1.3", config_path="pkg://revtrain.conf", config_name="config")
def _run(cfg: DictConfig) -> float | None:
    """One job. It raises nothing but KeyboardInterrupt: a failing job must not end the others of its sweep.

    Returns:
        The test accuracy, for Hydra's optimising sweepers; None when the job failed.
    """
    context = HydraConfig.get()
    run_dir = Path(context.runtime.output_dir)
    overrides = cast(list[str], OmegaConf.to_container(context.overrides.task, resolve=False))
    if context.mode != RunMode.MULTIRUN:
        return _single_job(cfg, run_dir, overrides)
    done = sweeps.ended(run_dir)
    if done:
        log.info("sweep      skipped, complete since an earlier start: %s", run_dir)
        return done["test_accuracy"]
    if context.launcher._target_.endswith(".BasicLauncher"):
        return _sweep_job(cfg, run_dir, overrides)
    # Parallel launchers get a process for each job: one that is killed, or breaks CUDA, leaves the others alone.
    sweeps.end_with(int(os.environ.get(PARENT, 0)))
    with suppress(OmegaConfBaseException):  # or the job says what is wrong
        OmegaConf.resolve(cfg)
    logs = cast(dict[str, Any], OmegaConf.to_container(context.job_logging, resolve=True))
    logs["formatters"]["plain"]["format"] = f"{run_dir.name}: %(message)s"
    multiprocessing.set_start_method("spawn", force=True)  # joblib's own one is unknown to a new process
    process = multiprocessing.Process(target=_in_own_process, args=(cfg, run_dir, overrides, logs))
    process.start()
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        sweeps.note_death(run_dir, process.exitcode, _plain(cfg), overrides)
    done = sweeps.ended(run_dir)
    return done["test_accuracy"] if done else None


def _in_own_process(cfg: DictConfig, run_dir: Path, overrides: list[str], logs: dict[str, Any]) -> None:
    """A job of a sweep as a process; it ends when the worker that started it does."""
    sweeps.end_with(os.getppid())
    for name in ("SIGUSR1", "SIGUSR2"):  # SLURM's warning of a timeout is for the worker, which sees to it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.config.dictConfig(logs)
    sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    sweeps.share_cores()
    try:
        _sweep_job(cfg, run_dir, overrides)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(max(_exit_codes, default=COMPLETED))


class _NoTerminal(io.TextIOWrapper):
    """Keeps the progress bars of parallel jobs off each other's lines."""

    def isatty(self) -> bool:
        return False


def _single_job(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """A run of its own, alone in its folder; of torchrun's processes the first alone has one."""
    with files.claim(run_dir / files.LOCK) if launch.rank() == 0 else nullcontext(True) as mine:
        if not mine:
            raise RevtrainError(
                f"{run_dir}: another run is writing there right now; nothing of it was changed.\n"
                "Choose another folder, or leave hydra.run.dir out: each run then gets a new one."
            )
        return _job(cfg, run_dir, overrides)


def _sweep_job(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """A job of a sweep, alone in its folder, from where an earlier start of the sweep left it."""
    with files.claim(run_dir / files.LOCK, sweeps.PATIENCE_SECONDS) as mine:
        if not mine:
            log.info("sweep      left to the process that runs it: %s", run_dir)
            return None
        done = sweeps.ended(run_dir)
        if done:
            log.info("sweep      skipped, complete since an earlier start: %s", run_dir)
            return done["test_accuracy"]
        if sweeps.resume_from(run_dir):
            cfg.resume = str(run_dir)
        return _job(cfg, run_dir, overrides, sweep_dir=run_dir.parent)


def _job(cfg: DictConfig, run_dir: Path, overrides: list[str], sweep_dir: Path | None = None) -> float | None:
    """Train; what goes wrong becomes a message, a result.json and an exit code."""
    try:
        OmegaConf.resolve(cfg)
        check_keys(cfg)
        read(cfg)
        from revtrain.training.run import train

        with sweeps.gpu_for_job(cfg.device, sweep_dir) if sweep_dir else nullcontext(cfg.device) as device:
            cfg.device = device
            result = train(cfg, run_dir, overrides)
    except KeyboardInterrupt as end:
        _record(run_dir, cfg, overrides, "interrupted")
        if sweep_dir is None:
            kept = "step" if isinstance(end, preemption.Terminated) else "epoch"
            _say(_how_to_continue(run_dir, overrides, kept))
        raise
    except Exception as error:
        _record(run_dir, cfg, overrides, "failed", error)
        message = explain(error)
        if message is None:
            file_log.exception("a bug")
            _say_bug(error, f"The traceback is in {run_dir / schema.LOG}.")
            _exit_codes.append(BUG)
        else:
            file_log.error("%s", message)
            _say(message)
            _exit_codes.append(MENDABLE)
        return None
    _exit_codes.append(COMPLETED)
    return result["test_accuracy"]


class Sweep(Callback):
    """Tells `main` where a sweep's results lie, and names each job's folder after what the sweep varies."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _sweeps.append(Path(config.hydra.sweep.dir))
        os.environ[PARENT] = str(os.getpid())
        if config.hydra.launcher._target_.endswith("submitit_launcher.LocalLauncher"):
            with read_write(config):  # it starts all jobs of a batch at once
                config.hydra.sweeper.max_batch_size = config.hydra.sweeper.max_batch_size or sweeps.parallel_jobs()
        constant = constant_keys(config)
        if constant:
            # each job is composed anew, from these overrides
            with read_write(config), open_dict(config):
                config.hydra.overrides.hydra.append(
                    f"hydra.job.config.override_dirname.exclude_keys={json.dumps(constant)}"
                )


# ---- what goes to the terminal and the run directory ---------------------------------------------


def _record(
    run_dir: Path, cfg: DictConfig, overrides: list[str], status: Status, error: Exception | None = None
) -> None:
    """Write result.json where `train` was not reached; it writes its own, and none beside an earlier run."""
    from revtrain.runs.writer import holds_run, new_result, one_line, write_result

    if launch.rank() > 0 or not run_dir.is_dir() or holds_run(run_dir):
        return
    result = new_result(settled(_plain(cfg)), overrides)
    result["status"] = status
    result["error"] = None if error is None else explain(error) or one_line(error)
    with suppress(OSError):  # the folder may be what is wrong
        write_result(run_dir, result)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def _how_to_continue(run_dir: Path, overrides: list[str], kept: str) -> str:
    kept_in = run_dir / schema.CHECKPOINT
    if not kept_in.exists():
        return f"Stopped before training; nothing to continue from in {run_dir}."
    from revtrain.runs.checkpoint import command

    return f"Stopped. The last completed {kept} is in {kept_in}; continue with:\n{command(overrides, run_dir)}"


def _list_sweeps(wait: bool = True) -> int:
    """A line for each job of each sweep; the exit code is non-zero when one did not complete."""
    worst = COMPLETED
    for folder in _sweeps:
        if wait:
            sweeps.wait_for_others(folder)
        text, complete = sweeps.summary(folder)
        print(f"\n{text}", flush=True)
        worst = worst if complete else BUG
    return worst


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _say_bug(error: Exception, where: str) -> None:
    _say(f"revtrain has a bug: {type(error).__name__}: {first_line(error)}\n{where} Please report it.")


# ---- what Hydra is told, and what it says --------------------------------------------------------


@contextmanager
def _raising_hydra(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and raises what it would print otherwise when HYDRA_FULL_ERROR is set."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["revtrain", *argv, *search_path()]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _check_flags(argv: list[str]) -> None:
    """Refuse flags that do not exist without argparse's page of usage."""
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> None:
        given = next((word for word in argv if word.startswith("-") and word.split("=")[0] not in flags), "")
        raise RevtrainError(
            f"{message}.{did_you_mean(given.split('=')[0], flags)}\n"
            "revtrain takes key=value words, and -m (--multirun) for sweeps; see revtrain --help."
        )

    parser.error = refuse  # type: ignore[method-assign, assignment]
    if parser.parse_args(argv).multirun:
        launch.refuse_sweep()
