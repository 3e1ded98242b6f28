"""The command line: `revtrain [key=value ...]`.

Hydra composes the configuration and makes the run directory. This module says in a few lines what is wrong
when something is, and turns the end of the run into an exit code:

    0    completed
    1    a bug in revtrain, or a sweep in which a job did not complete
    2    something the user can mend
    130  Ctrl-C
    143  SIGTERM; 128 and its number for SIGHUP, SIGUSR1 and the like

torch is imported inside the task, so that --help, shell completion and refusals answer at once.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from revtrain import __version__
from revtrain.cli import guard
from revtrain.cli.messages import check_keys, explain, first_line
from revtrain.conf import constant_keys, job_identity, search_path, take_from_run, varied
from revtrain.config import all_keys, did_you_mean, read, registry
from revtrain.errors import RevtrainError
from revtrain.machine import files
from revtrain.machine import sigterm as preemption
from revtrain.machine import torchrun as launch
from revtrain.runs import schema, sweeps
from revtrain.runs.read import settled
from revtrain.runs.schema import Result, Status

# our presets are called as the launchers are, and complete in themselves
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
log = logging.getLogger(__name__)
file_log = logging.getLogger("revtrain.errors")  # train.log alone

COMPLETED, BUG, MENDABLE, INTERRUPTED = 0, 1, 2, 130
PATIENCE_SECONDS = 5.0  # that the first process gets to report an error before another does
PARENT = "REVTRAIN_SWEEP_PID"  # of the process that runs the sweep, for its workers

_exit_codes: list[int] = []  # of the jobs that ran in this process
_sweeps: list[tuple[Path, Path]] = []  # folder and ledger of the sweeps that this process started
_folders: list[Path] = []  # that Hydra makes for a run or a sweep


def command_line() -> NoReturn:
    """The command `revtrain`."""
    launch.leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `revtrain`; by default those of this process.

    Returns:
        The exit code, see the head of this module.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with guard.enduring_streams():
        return _main(argv)


def _main(argv: list[str]) -> int:
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
    _folders.clear()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        if "--version" in argv:
            print(f"revtrain {__version__} (Hydra {hydra.__version__})")
            return COMPLETED
        registry.fix_plugin_folders()
        with _raising_hydra(_flags_first(argv)), preemption.watching():
            _run()
    except KeyboardInterrupt as end:
        _say(f"Ended by {end.name}." if isinstance(end, preemption.Terminated) else "Interrupted.")
        _list_sweeps(wait=False)
        return end.exit_code if isinstance(end, preemption.Terminated) else INTERRUPTED
    except SystemExit as end:  # Hydra's --help and the like
        return end.code if isinstance(end.code, int) else COMPLETED
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        message = explain(error, _folders)
        if message is None and any(sweeps.jobs_of(ledger) for _, ledger in _sweeps):
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
    _fix_paths(cfg, Path(context.runtime.cwd))
    _take_from_run(cfg, overrides, run_dir, context.output_subdir)
    if context.mode != RunMode.MULTIRUN:
        return _single_job(cfg, run_dir, overrides)
    launch.refuse_sweep()
    job = _entered(cfg, cast(DictConfig, context))
    if done := _done(job):
        return done["test_accuracy"]
    if _shares_this_process(context):
        return _sweep_job(cfg, job, overrides)
    logging.raiseExceptions = False  # a worker's log may go to a pipe that nobody reads any more
    # Parallel launchers get a process for each job: one that is killed, or breaks CUDA, leaves the others alone.
    sweeps.end_with(int(os.environ.get(PARENT, 0)))
    with suppress(OmegaConfBaseException):  # or the job says what is wrong
        OmegaConf.resolve(cfg)
    multiprocessing.set_start_method("spawn", force=True)  # joblib's own one is unknown to a new process
    # plain containers: types that were made at run time cannot be sent to another process
    args = (_plain(cfg), job, overrides, _logs(context, job))
    process = multiprocessing.Process(target=_in_own_process, args=args)
    process.start()
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        job.note_death(process.exitcode, _plain(cfg), overrides)
    finished = job.done()
    return finished["test_accuracy"] if finished else None


def _shares_this_process(context: Any) -> bool:
    """Whether the launcher runs one job after the other in the process of the sweep."""
    return context.launcher._target_.endswith(".BasicLauncher")


def _fix_paths(cfg: DictConfig, typed_in: Path) -> None:
    """Where Hydra has changed the working folder (hydra.job.chdir), let paths mean what they meant where they were
    typed."""
    try:
        if typed_in == Path.cwd():
            return
    except OSError:  # the working folder is gone
        return
    for name, key in all_keys().items():
        with suppress(OmegaConfBaseException):
            path = OmegaConf.select(cfg, name) if key.rule.path else None
            if isinstance(path, str) and path and not path.startswith("~"):
                OmegaConf.update(cfg, name, str(typed_in / path))


def _take_from_run(cfg: DictConfig, overrides: list[str], run_dir: Path, output_subdir: str | None) -> None:
    """`resume=RUN` continues that run with its own configuration; say what the command changes of it."""
    try:
        if cfg.resume is None:
            return
        changed = take_from_run(cfg, overrides)
    except (RevtrainError, OmegaConfBaseException):  # what is wrong with that run is said when it is to be trained
        return
    if output_subdir is not None and launch.rank() == 0:
        with suppress(OSError):
            OmegaConf.save(cfg, run_dir / output_subdir / "config.yaml")  # Hydra has written it without the run's
    log.info("resume     %s with its own configuration%s", cfg.resume,
             f"; this command changes {'; '.join(changed)}" if changed else "")  # fmt: skip


def _entered(cfg: DictConfig, context: DictConfig) -> sweeps.Job:
    """This job of a sweep, entered in the sweep's ledger."""
    token = OmegaConf.select(context, "callbacks.sweep.token")
    if not token:
        raise RevtrainError(
            "hydra.callbacks.sweep was changed; without it nobody counts how the jobs of a sweep end.\n"
            "Leave it as it is; callbacks of your own go beside it, as in +hydra.callbacks.mine._target_=..."
        )
    sweep_dir = Path(context.runtime.cwd, context.sweep.dir)
    asked, ledger = job_identity(cfg, context), sweep_dir / sweeps.LEDGER / str(token)
    job = sweeps.Job(context.job.num, Path(context.runtime.output_dir), asked, sweep_dir, ledger)
    job.enter()
    return job


def _advise(arch: str, keys: Collection[str], doing: str) -> None:
    """Say which of these keys make no difference to an architecture, before anybody waits for the results."""
    with suppress(ImportError, AttributeError):  # an architecture that does not exist is refused elsewhere
        for key, why in registry.load("models", arch).TRAITS.hardly_uses.items():
            if key in keys:
                log.warning("advice     %s hardly matters with arch=%s (%s); %s tells little", key, arch, why, doing)


def _done(job: sweeps.Job) -> Result | None:
    """The result of a job that an earlier start completed; the log says so."""
    done = job.done()
    if done:
        log.info("sweep      skipped, complete since an earlier start: %s", job.folder)
    return done


def _logs(context: Any, job: sweeps.Job) -> dict[str, Any]:
    """How the process of a job logs: as configured; where that is as we have it, its lines on the terminal begin with
    its name."""
    logs = cast(dict[str, Any], OmegaConf.to_container(context.job_logging, resolve=True))
    if plain := logs.get("formatters", {}).get("plain"):
        name = job.folder.name.replace("%", "%%").replace("$", "_")  # neither a format of logging nor one of Hydra
        plain["format"] = f"{name}: %(message)s"
    return logs


def _in_own_process(values: dict[str, Any], job: sweeps.Job, overrides: list[str], logs: dict[str, Any]) -> None:
    """A job of a sweep as a process; it ends when the worker that started it does."""
    with guard.enduring_streams():
        sys.exit(_job_of_process(values, job, overrides, logs))


def _job_of_process(values: dict[str, Any], job: sweeps.Job, overrides: list[str], logs: dict[str, Any]) -> int:
    sweeps.end_with(os.getppid())
    for name in ("SIGUSR1", "SIGUSR2"):  # SLURM's warning of a timeout is for the worker, which sees to it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    configure_log(OmegaConf.create(logs))
    logging.captureWarnings(True)  # into train.log, and to the terminal once
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_OncePerSweep(job.ledger))
    sys.stderr = _NoTerminal(sys.stderr.buffer, sys.stderr.encoding)
    sweeps.share_cores()
    try:
        _sweep_job(OmegaConf.create(values), job, overrides)
    except KeyboardInterrupt:
        return INTERRUPTED
    return max(_exit_codes, default=COMPLETED)


class _OncePerSweep(logging.Filter):
    """Lets a warning pass that no job of this start has given before; train.log has them all."""

    def __init__(self, ledger: Path):
        super().__init__()
        self.said = ledger / "said"

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        try:
            self.said.mkdir(exist_ok=True)
            (self.said / sweeps.digest([record.name, record.getMessage()])).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # better twice than not at all
            return True
        return True


class _NoTerminal(guard.Enduring):
    """Keeps the progress bars of parallel jobs off each other's lines."""

    def isatty(self) -> bool:
        return False


def _single_job(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """A run of its own, alone in its folder; of torchrun's processes the first alone has one."""
    _advise(str(cfg.arch), [word.split("=")[0] for word in overrides], "setting it")
    with files.claim(run_dir / files.LOCK) if launch.rank() == 0 else nullcontext(True) as mine:
        if not mine:
            raise RevtrainError(
                f"{run_dir}: another run is writing there right now; nothing of it was changed.\n"
                "Choose another folder, or leave hydra.run.dir out: each run then gets a new one."
            )
        return _job(cfg, run_dir, overrides)


def _sweep_job(cfg: DictConfig, job: sweeps.Job, overrides: list[str]) -> float | None:
    """A job of a sweep, alone in its folder, from where an earlier start of the sweep left it."""
    with files.claim(job.folder / files.LOCK, sweeps.PATIENCE_SECONDS) as mine:
        if not mine:
            log.info("sweep      left to the process that runs it: %s", job.folder)
            return None
        if done := _done(job):
            return done["test_accuracy"]
        return _job(cfg, job.folder, overrides, job)


def _job(cfg: DictConfig, run_dir: Path, overrides: list[str], job: sweeps.Job | None = None) -> float | None:
    """Train; what goes wrong becomes a message, a result.json and an exit code. `job`: where a sweep is at work."""
    try:
        if job and job.make_ready():
            cfg.resume = str(run_dir)
        OmegaConf.resolve(cfg)
        check_keys(cfg)
        read(cfg)
        from revtrain.training.run import train

        with sweeps.gpu_for_job(cfg.device, job.sweep_dir) if job else nullcontext(cfg.device) as device:
            cfg.device = device
            result = train(cfg, run_dir, overrides)
    except KeyboardInterrupt as end:
        _record(run_dir, cfg, overrides, "interrupted")
        if job is None:
            kept = "step" if isinstance(end, preemption.Terminated) else "epoch"
            _say(_how_to_continue(run_dir, kept))
        raise
    except Exception as error:
        _record(run_dir, cfg, overrides, "failed", error)
        message = explain(error, [run_dir])
        if job:
            with suppress(OSError):  # as it stands there the job is not completed either
                job.enter(message or f"{type(error).__name__}: {first_line(error)}")
        if message is None:
            file_log.exception("a bug")
            _say_bug(error, f"The traceback is in {run_dir / schema.LOG}.")
            _exit_codes.append(BUG)
        else:
            # where the system's error came from may help, but not on the terminal
            file_log.error("%s", message, exc_info=isinstance(error.__cause__, OSError))
            _say(f"{job.folder.name}: {message}" if job else message)  # of several jobs, which
            _exit_codes.append(MENDABLE)
        return None
    _exit_codes.append(COMPLETED)
    return result["test_accuracy"]


class Sweep(Callback):
    """Tells `main` where the jobs of a sweep say how they ended, and names each job's folder after what the sweep
    varies.

    Args:
        token: of this start of the sweep; Hydra composes each job anew, and makes this with it.
    """

    def __init__(self, token: str | None = None):
        self.token = token

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OmegaConfBaseException):  # what cannot be resolved is told where it is needed
            _folders.append(Path(os.path.abspath(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _folders.append(Path(os.path.abspath(config.hydra.sweep.dir)))
        token, sweep_dir = secrets.token_hex(4), Path(config.hydra.sweep.dir)
        _sweeps.append((sweep_dir, sweep_dir.absolute() / sweeps.LEDGER / token))
        os.environ[PARENT] = str(os.getpid())
        for arch, swept in varied(config).items():
            _advise(arch, swept, "varying it")
        with read_write(config), open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.callbacks.sweep.token='{token}'")  # quoted: it is no number
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


def _how_to_continue(run_dir: Path, kept: str) -> str:
    kept_in = run_dir / schema.CHECKPOINT
    if not kept_in.exists():
        return f"Stopped before training; nothing to continue from in {run_dir}."
    from revtrain.runs.checkpoint import command

    return f"Stopped. The last completed {kept} is in {kept_in}; continue with:\n{command(run_dir)}"


def _list_sweeps(wait: bool = True) -> int:
    """A line for each job of each sweep; the exit code is non-zero when one did not complete."""
    worst = BUG if any(_exit_codes) else COMPLETED
    for folder, ledger in _sweeps:
        jobs = sweeps.jobs_of(ledger)
        if wait:
            sweeps.wait_for_others(jobs)
        text, complete = sweeps.summary(folder, jobs)
        sweeps.close_ledger(ledger)
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


def _flags_first(argv: list[str]) -> list[str]:
    """The same words with the flags in front, where Hydra looks for them; those that do not exist are refused without
    argparse's page of usage."""
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> None:
        given = next((word for word in argv if word.startswith("-") and word.split("=")[0] not in flags), "")
        raise RevtrainError(
            f"{message}.{did_you_mean(given.split('=')[0], flags)}\n"
            "revtrain takes key=value words, and -m (--multirun) for sweeps; see revtrain --help."
        )

    parser.error = refuse  # type: ignore[method-assign, assignment]
    parsed = parser.parse_intermixed_args(argv)
    if parsed.multirun or any(re.fullmatch(r"\+*hydra\.mode=MULTIRUN", word) for word in parsed.overrides):
        launch.refuse_sweep()
    front = list(argv)
    for word in reversed(parsed.overrides):
        del front[len(front) - 1 - front[::-1].index(word)]
    # what a sweep varies is an open mapping: whether a key is new in it is of no interest to who types it
    return [*front, *(re.sub(r"^(?=hydra\.sweeper\.params[.=])", "++", word) for word in parsed.overrides)]
