"""Faults of the command line and of what it leaves behind, kind by kind: each case was lost before.

docs/reliability.md counts them, from docs/figures/reliability_kinds.csv.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import hydra
import pytest
from cases import ARCHS
from conftest import assert_same_state, read_checkpoint, read_result
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_distributed import end, start
from test_faults import CONFIGURATIONS, PLAIN

import revtrain.data
import revtrain.figures
import revtrain.training.run
from revtrain.conf import compose
from revtrain.config import read, registry, word
from revtrain.inference.restore import restore
from revtrain.machine import sigterm
from revtrain.models import build_model
from revtrain.numerics.decibels import snr_text
from revtrain.report.group import group_runs
from revtrain.report.page import page
from revtrain.report.tables import markdown, snr_cell, terminal
from revtrain.runs import checkpoint, sweeps
from revtrain.runs.read import gather

QUICK = (
    "arch=layerwise", "depth=1", "pooling=[]", "width=4", "data=synthetic", "data.image_size=16",
    "data.train_images=20", "data.test_images=10", "batch=10", "epochs=1", "lr=0.01", "probe.every=0", "device=cpu",
)  # fmt: skip
NUMBERED = ("hydra.sweep.dir=outputs/s", "hydra.sweep.subdir=${hydra.job.num}")


def results(folder):
    """The results at and below a folder, by the name of theirs."""
    return {path.parent.name: read_result(path.parent) for path in sorted(Path(folder).rglob("result.json"))}


def seeds(folder):
    return {name: result["config"]["seed"] for name, result in results(folder).items()}


def interrupt_at_draw(patch, number):
    """Ctrl-C at the given training step."""
    draw, drawn = revtrain.data.draw_augmentation, []

    def draw_or_interrupt(*args):
        drawn.append(1)
        if len(drawn) == number:
            raise KeyboardInterrupt
        return draw(*args)

    patch.setattr(revtrain.data, "draw_augmentation", draw_or_interrupt)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They cost half of the time of such small runs."""
    monkeypatch.setattr(revtrain.figures, "available", lambda: False)


# ---- 1: what a folder holds is told by its content, not by its name ----------------------------------------


def test_a_sweep_into_the_folders_of_another_does_not_take_its_results(command):
    assert command("-m", *NUMBERED, *QUICK, "seed=0,1").code == 0
    before = {path: path.read_bytes() for path in Path("outputs/s").rglob("*.pt")}
    ran = command("-m", *NUMBERED, *QUICK, "seed=5,6")
    assert ran.code == 1
    assert ran.out.count("failed: the folder holds a run of another configuration (seed: ") == 2
    assert "seed: 0 there, 5 here" in ran.err and "nothing of it was changed" in ran.err
    assert {path: path.read_bytes() for path in Path("outputs/s").rglob("*.pt")} == before
    assert seeds("outputs/s") == {"0": 0, "1": 1}
    again = command("-m", *NUMBERED, *QUICK, "seed=0,1")  # and its own command still finds them
    assert again.code == 0 and again.out.count("skipped, complete") == 2


def test_a_job_that_was_cut_off_is_not_continued_with_another_configuration(command, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_draw(patch, 2)
        assert command("-m", *NUMBERED, *QUICK, "seed=0,1").code == 130
    ran = command("-m", *NUMBERED, *QUICK, "seed=5,6")
    assert ran.code == 1 and "seed: 0 there, 5 here" in ran.err
    assert read_checkpoint(Path("outputs/s/0"))["config"]["seed"] == 0
    assert seeds("outputs/s") == {"0": 0, "1": 6}  # the second folder was still empty


def test_one_folder_for_all_jobs_is_refused_from_the_second_on(command):
    ran = command("-m", "hydra.sweep.dir=here", "hydra.sweep.subdir=.", *QUICK, "seed=0,1")
    assert ran.code == 1 and "seed: 0 there, 1 here" in ran.err
    assert "0 (.): failed" not in ran.out and "1 (.): failed" in ran.out
    assert read_result(Path("here"))["config"]["seed"] == 0


def test_a_checkpoint_that_was_put_into_a_jobs_folder_is_not_continued(command):
    assert command("-m", "hydra.sweep.dir=a", "hydra.sweep.subdir=x", *QUICK, "lr=0.02").code == 0
    Path("b/x").mkdir(parents=True)
    shutil.copy("a/x/last.pt", "b/x")
    ran = command("-m", "hydra.sweep.dir=b", "hydra.sweep.subdir=x", *QUICK, "lr=0.01")
    assert ran.code == 1 and "lr: 0.02 there, 0.01 here" in ran.err


def test_a_job_that_was_trained_on_by_hand_is_no_longer_that_job(command):
    words = ("-m", "hydra.sweep.dir=s", "hydra.sweep.subdir=x", *QUICK)
    assert command(*words).code == 0
    assert command(*QUICK, "epochs=2", "resume=s/x", "hydra.run.dir=s/x").code == 0
    ran = command(*words)
    assert ran.code == 1 and "epochs: 2 there, 1 here" in ran.err


def test_an_automatic_batch_is_not_the_number_that_it_came_to_elsewhere(command):
    words = ("-m", "hydra.sweep.dir=s", "hydra.sweep.subdir=x", *QUICK, "memory_limit=1GiB", "plan=true")
    assert command(*words, "batch=auto").code == 0
    batch = read_result(Path("s/x"))["config"]["batch"]
    ran = command(*words, f"batch={batch}")
    assert ran.code == 1 and f"batch: auto there, {batch} here" in ran.err
    assert command(*words, "batch=auto").code == 0


def test_the_same_words_in_another_folder_are_other_images(command, monkeypatch, tmp_path):
    """data.root is relative to where it was typed."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    words = ["-m", f"hydra.sweep.dir={tmp_path}/s", "data=imagefolder", "data.root=images", "plan=true"]
    network = [word for word in QUICK if not word.startswith("data")]
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        command(*words, *network, "data.image_size=16", "data.classes=2")
    roots = {result["config"]["data"]["root"] for result in results(tmp_path / "s").values()}
    assert roots == {f"{tmp_path}/one/images", f"{tmp_path}/two/images"}


def test_where_a_job_begins_decides_its_result(command):
    first = command(*QUICK).dir
    words = ("-m", "hydra.sweep.dir=s", *QUICK, "epochs=2")
    for resume in ("null", first):
        ran = command(*words, f"resume={resume}")
        assert ran.code == 0 and "skipped" not in ran.out, ran.err
    assert len(results("s")) == 2


def test_files_of_the_user_in_a_jobs_folder_stay(command):
    Path("mine/notes").mkdir(parents=True)
    Path("mine/notes/a.txt").write_text("a year's work")
    Path("mine/.last.txt").write_text("hidden")
    words = ("-m", "hydra.sweep.dir=.", "hydra.sweep.subdir=mine", *QUICK)
    assert command(*words, "slope=2").code == 1
    assert command(*words).code == 0  # what failed at once is not worth keeping
    assert Path("mine/notes/a.txt").read_text() == "a year's work" and Path("mine/.last.txt").exists()
    assert read_result(Path("mine"))["status"] == "completed"


# ---- 2: jobs are counted where they begin, not where their folders are ---------------------------------------


@pytest.mark.parametrize(
    "setting",
    ["hydra.output_subdir=null", "hydra.output_subdir=conf", "hydra.sweep.subdir=a/b/${hydra.job.num}",
     "hydra.sweep.subdir=../beside/${hydra.job.num}", "hydra/job_logging=none"],
)  # fmt: skip
def test_a_sweep_whose_jobs_all_fail_says_so(command, setting):
    ran = command("-m", setting, *QUICK, "slope=2,3")
    assert ran.code == 1
    assert "2 jobs in outputs/sweeps" in ran.out and ran.out.count("failed: slope=") == 2
    assert "2 of them not completed" in ran.out


def test_jobs_of_an_earlier_sweep_are_not_counted_again(command):
    words = ("-m", "hydra.sweep.dir=s", *QUICK, "plan=true")
    assert command(*words, "slope=2,3").code == 1
    ran = command(*words, "slope=0.5")
    assert ran.code == 0 and "1 jobs in s" in ran.out


def test_a_sweep_without_its_callback_is_refused(command):
    ran = command("-m", *QUICK, "~hydra.callbacks.sweep", "slope=2,3")
    assert ran.code != 0 and "nobody counts" in ran.err and "Traceback" not in ran.err


def test_a_sweep_of_no_jobs_is_no_success(command):
    ran = command("-m", *QUICK, "depth=range(1,1)")
    assert ran.code != 0 and "Traceback" not in ran.err


def test_a_job_that_cannot_write_its_result_counts_as_failed(command, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", "result.json")

    monkeypatch.setattr("revtrain.runs.writer.write_result", refuse)
    monkeypatch.setattr("revtrain.runs.writer.RunWriter.start", refuse)
    ran = command("-m", *QUICK)
    assert ran.code == 1 and "1 of them not completed" in ran.out


def test_the_ledger_leaves_nothing_behind(command):
    assert command("-m", "hydra.sweep.dir=s", *QUICK, "plan=true").code == 0
    assert not (Path("s") / sweeps.LEDGER).exists()


# ---- 3: what is printed to be pasted works when pasted -------------------------------------------------------

AWKWARD = (
    "müller", "a,b", "x=y", "it's", "a b", "$HOME", 'say "hi"', "[1]", "{a: 1}", "a\\b", "a\\", "\\'", "100%", "(x)",
    "#1", "a;b", "a&b", "*", "~x", "null", "a\tb", "-m", "日本", "a:b", "!x", "`x`", "'", "''",
)  # fmt: skip


def pasted(line):
    """The words that a shell makes of a line."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of QUICK."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    revtrain.training.run.train(compose(QUICK), folder, list(QUICK))
    return folder


@pytest.mark.parametrize("name", AWKWARD)
def test_the_command_that_continues_a_run_can_be_pasted(tmp_path, trained, name):
    folder = tmp_path / name / "run"
    shutil.copytree(trained, folder)
    program, *words = pasted(checkpoint.command(folder))
    assert program == "revtrain" and len(words) == 1
    cfg = compose(words)  # parsed and composed by Hydra, read by the program
    assert read(cfg).machine.resume == str(folder)
    assert (cfg.arch, cfg.data.name, cfg.width) == ("layerwise", "synthetic", 4)


@pytest.mark.parametrize("name", ["müller, it's x=y", "a b"])
def test_a_run_in_an_awkward_folder_that_was_stopped_goes_on_with_what_it_printed(command, monkeypatch, tmp_path, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with monkeypatch.context() as patch:
        interrupt_at_draw(patch, 3)
        ran = command(*QUICK, "epochs=2")
    assert ran.code == 130
    [line] = [line for line in ran.err.splitlines() if line.startswith("revtrain ")]
    resumed = command(*pasted(line)[1:])
    assert resumed.code == 0, resumed.err
    assert resumed.result["epochs"] == 2 and resumed.result["config"]["resume"] == str(ran.dir)


def test_lines_for_tensorboard_can_be_pasted(command):
    ran = command(*QUICK, "hydra.run.dir='a b/it\\'s'")
    [line] = [line.partition("tensorboard ")[2] for line in ran.out.splitlines() if "tensorboard" in line]
    assert pasted(line) == ["--logdir", "a b/it's"]
    ran = command("-m", *QUICK, "plan=true", "hydra.sweep.dir='s; rm x'")
    [line] = [line.partition("tensorboard ")[2] for line in ran.out.splitlines() if "tensorboard" in line]
    assert pasted(line) == ["--logdir", "s; rm x"]


def test_other_words_that_are_offered_can_be_pasted(command, tmp_path, trained):
    ran = command("pooling=channel, batch")
    offered = ran.err.partition("revtrain -m ")[2].splitlines()[0]
    assert pasted(offered) == ["pooling=channel, batch"]
    folder = tmp_path / "it's"
    shutil.copytree(trained, folder)
    (folder / "last.pt").write_bytes(b"damaged")
    ran = command(*QUICK, f"resume='{tmp_path}/it\\'s/last.pt'")
    offered = ran.err.partition("The checkpoint before it: ")[2].strip()
    assert read(compose(pasted(offered))).machine.resume == str(folder / "previous.pt")


# ---- 8: Hydra as its users use it ------------------------------------------------------------------------------


def test_compose_within_another_hydra_application(tmp_path):
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_]\nmine: ${now:%Y}\n")
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node={"theirs": 3})
    with initialize_config_dir(str(tmp_path), job_name="theirs", version_base="1.2"):
        before = hydra_compose("config")
        HydraConfig.instance().set_config(hydra_compose("config", return_hydra_config=True))
        cfg = compose(["arch=hybrid", "depth=2"])
        assert (cfg.arch, cfg.depth) == ("hybrid", 2)
        assert hydra_compose("config") == before and before.theirs == 3
        assert HydraConfig.get().job.name == "theirs" and str(hydra.version.getbase()) == "1.2"
    assert compose(["depth=3"]).depth == 3
    HydraConfig.instance().cfg = None


@pytest.fixture
def own_processes(monkeypatch):
    """Jobs of a sweep as with a parallel launcher, each `process` a call within this one."""
    from revtrain.cli import train

    class Process:
        def __init__(self, target, args):
            self.call, self.exitcode = lambda: target(*args), None

        def start(self):
            try:
                self.call()
            except SystemExit as end:
                self.exitcode = end.code

        def join(self):
            pass

    monkeypatch.setattr(train, "_shares_this_process", lambda context: False)
    monkeypatch.setattr(train.multiprocessing, "Process", Process)
    monkeypatch.setattr(train.multiprocessing, "set_start_method", lambda *args, **kwargs: None)
    monkeypatch.setattr(train.sweeps, "end_with", lambda parent: None)
    monkeypatch.setattr(train.sweeps, "share_cores", lambda: None)
    monkeypatch.setattr(train, "_NoTerminal", lambda *args, **kwargs: sys.stderr)
    before = {name: signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    logging.captureWarnings(False)
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("logging", ["none", "default", "disabled", "stdout", "revtrain"])
def test_any_job_logging_with_a_parallel_launcher(command, own_processes, logging):
    ran = command("-m", *QUICK, "plan=true", f"hydra/job_logging={logging}", "slope=0.2,2")
    assert ran.code == 1 and "2 jobs in" in ran.out and "planned: batch 10" in ran.out
    assert ran.out.count("failed: slope=2 was given") == 1 and "Traceback" not in ran.out + ran.err


@pytest.mark.parametrize(
    "words",
    [["hydra.sweeper.params.seed='0,1'"], ["hydra.sweeper.params={seed:'0,1'}"], ["+hydra.sweeper.params.seed='0,1'"], 
     ["hydra.mode=MULTIRUN", "seed=0,1"]],
    ids=str,
)  # fmt: skip
def test_a_sweep_that_is_written_in_hydras_own_keys(command, words):
    flag = [] if "hydra.mode=MULTIRUN" in words else ["-m"]
    ran = command(*flag, *QUICK, "plan=true", *words)
    assert ran.code == 0, ran.err
    assert sorted(seeds("outputs").values()) == [0, 1]
    assert all("seed-" in job for job in seeds("outputs")) and "2 jobs in outputs/sweeps/seed-" in ran.out


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], ["hydra.mode=MULTIRUN", "seed=0,1"], ["seed=0,1", "--multirun"]])
def test_a_sweep_under_torchrun_is_refused_however_it_is_asked_for(command, monkeypatch, words):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ran = command(*QUICK, *words)
    assert ran.code == 2 and "one torchrun takes one run" in ran.err and len(ran.err.splitlines()) == 2
    assert not list(Path().rglob("result.json"))


@pytest.mark.parametrize("place", [0, 3, len(QUICK)])
def test_a_flag_may_stand_anywhere(command, place):
    ran = command(*QUICK[:place], "-m", *QUICK[place:], "plan=true", "seed=0,1")
    assert ran.code == 0 and "2 jobs in" in ran.out, ran.err
    ran = command(*QUICK[:place], "--cfg", "job", *QUICK[place:])
    assert ran.code == 0 and "width: 4" in ran.out


def test_relative_paths_mean_where_they_were_typed(command, monkeypatch, tmp_path):
    first = command(*QUICK, "hydra.run.dir=first", "data.root=images", "data.cache=cache").dir
    config = read_checkpoint(first)["config"]
    assert config["data"]["root"] == f"{tmp_path}/images" and config["data"]["cache"] == f"{tmp_path}/cache"
    ran = command(*QUICK, "epochs=2", "resume=first", "hydra.job.chdir=true", "data.root=images")
    assert ran.code == 0, ran.err
    assert ran.result["config"]["resume"] == str(first)
    assert ran.result["config"]["data"]["root"] == f"{tmp_path}/images"
    assert f"tensorboard --logdir {ran.dir}" in ran.out  # it would be "." from within
    sweep = command("-m", *QUICK, "resume=first", "epochs=2", "hydra.job.chdir=true", "seed=0,1", "hydra.sweep.dir=s")
    assert sweep.code == 0, sweep.err
    assert command("-m", *QUICK, "resume=first", "epochs=2", "seed=0,1", "hydra.sweep.dir=s").out.count("skipped") == 2
    monkeypatch.chdir("/")
    assert restore(ran.dir).config.data.root == f"{tmp_path}/images"


def test_a_relative_plugin_folder_is_found_from_the_runs_folder(command, monkeypatch, tmp_path):
    (tmp_path / "plug/conf/experiment").mkdir(parents=True)
    (tmp_path / "plug/conf/experiment/mine.yaml").write_text("# @package _global_\nwidth: 6\n")
    monkeypatch.setenv("REVTRAIN_PATH", "plug")
    ran = command(*(word for word in QUICK if not word.startswith("width")), "experiment=mine", "hydra.job.chdir=true")
    assert ran.code == 0 and ran.result["config"]["width"] == 6, ran.err


# ---- 10: resume=RUN alone ----------------------------------------------------------------------------------------


def stopped(command, monkeypatch, *words, at=3):
    with monkeypatch.context() as patch:
        interrupt_at_draw(patch, at)
        ran = command(*words)
    assert ran.code == 130, ran.err
    return ran.dir


LONG = (*QUICK, "epochs=2", "lr=0.02", "slope=0.3", "data.augment.flip=false")


def test_resume_alone_continues_the_run_as_it_was(command, monkeypatch):
    whole = command(*LONG)
    cut = stopped(command, monkeypatch, *LONG)
    ran = command(f"resume={cut}")
    assert ran.code == 0, ran.err
    assert_same_state(read_checkpoint(whole.dir), read_checkpoint(ran.dir))
    assert "with its own configuration\n" in ran.out and "no longer bit-equal" not in ran.out
    assert "-layerwise-" in ran.dir.name
    assert OmegaConf.load(ran.dir / ".hydra/config.yaml").data.name == "synthetic"
    again = command(f"resume={cut}/last.pt", "hydra/job_logging=none", "hydra.output_subdir=null")
    assert again.code == 0, again.err


def test_words_beside_resume_change_the_run_and_what_that_means_is_said(command, monkeypatch):
    cut = stopped(command, monkeypatch, *LONG)
    ran = command(f"resume={cut}", "lr=0.4", "epochs=3")  # the default of lr
    assert ran.code == 0, ran.err
    config = ran.result["config"]
    assert (config["lr"], config["epochs"], config["slope"], config["data"]["name"]) == (0.4, 3, 0.3, "synthetic")
    assert "this command changes epochs=3, before 2; lr=0.4, before 0.02" in ran.out
    assert "no longer bit-equal to an uninterrupted run: lr: 0.02 in the checkpoint, 0.4 now" in ran.out


def test_a_preset_beside_resume_counts_as_the_words_in_it(command, monkeypatch):
    words = (*(word for word in QUICK if not word.startswith(("width", "lr"))), "epochs=2")
    cut = stopped(command, monkeypatch, "experiment=quickstart", *words)
    assert read_checkpoint(cut)["config"]["width"] == 8
    ran = command(f"resume={cut}")
    assert ran.code == 0, ran.err
    assert (ran.result["config"]["lr"], ran.result["config"]["experiment"]) == (0.1, "quickstart")
    other = command(f"resume={cut}", "arch=layerwise")
    assert other.code == 2 and "of another network" in other.err and f"revtrain resume={cut}" in other.err


def test_a_sweep_over_runs_to_resume_takes_each_ones_own_configuration(command, monkeypatch):
    runs = [stopped(command, monkeypatch, *LONG, f"seed={seed}", f"width={width}") for seed, width in ((1, 4), (2, 6))]
    ran = command("-m", f"resume={runs[0]},{runs[1]}")
    assert ran.code == 0, ran.err
    found = [(result["config"]["seed"], result["config"]["width"]) for result in results("outputs/sweeps").values()]
    assert sorted(found) == [(1, 4), (2, 6)]


def test_the_python_library_resumes_alone_too(command, monkeypatch, tmp_path):
    cut = stopped(command, monkeypatch, *LONG)
    result = revtrain.training.run.train(compose([f"resume={cut}"]), tmp_path / "on")
    assert (result["epochs"], result["config"]["lr"]) == (2, 0.02)


def test_a_resumed_run_that_is_stopped_again_is_resumed_alone_again(command, monkeypatch):
    whole = command(*LONG)
    cut = stopped(command, monkeypatch, *LONG, at=2)  # of the first epoch
    cut = stopped(command, monkeypatch, f"resume={cut}", at=3)
    ran = command(f"resume={cut}")
    assert ran.code == 0, ran.err
    assert_same_state(read_checkpoint(whole.dir), read_checkpoint(ran.dir))


# ---- 9: signals ------------------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in sigterm.NAMES if hasattr(signal, name)]


def send_at_draw(patch, number, sent):
    """The given signal at the given training step."""
    draw, drawn = revtrain.data.draw_augmentation, []

    def draw_and_send(*args):
        drawn.append(1)
        if len(drawn) == number:
            os.kill(os.getpid(), sent)
        return draw(*args)

    patch.setattr(revtrain.data, "draw_augmentation", draw_and_send)


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda each: each.name)
def test_each_signal_that_announces_the_end_saves_the_step_under_way(command, monkeypatch, sent):
    before = signal.getsignal(sent)
    with monkeypatch.context() as patch:
        send_at_draw(patch, 3, sent)
        ran = command(*LONG)
    assert ran.code == 128 + sent and f"Ended by {sent.name}." in ran.err
    state = read_checkpoint(ran.dir)
    assert (state["epoch"], state["partial"]["step"]) == (1, 1)
    assert f"stopped    {sent.name} in epoch 2, after 1 of 2 steps" in (ran.dir / "train.log").read_text()
    assert signal.getsignal(sent) == before
    assert f"revtrain resume={ran.dir}" in ran.err


def test_what_a_signal_left_goes_on_to_the_same_bits(command, monkeypatch):
    whole = command(*LONG)
    with monkeypatch.context() as patch:
        send_at_draw(patch, 2, signal.SIGHUP)
        cut = command(*LONG)
    ran = command(f"resume={cut.dir}")
    assert ran.code == 0, ran.err
    assert_same_state(read_checkpoint(whole.dir), read_checkpoint(ran.dir))


def test_a_signal_that_is_ignored_or_taken_by_a_host_program_stays_so(command, monkeypatch):
    came = []
    monkeypatch.setattr(sigterm, "NAMES", sigterm.NAMES)
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: came.append(1))]
    try:
        for sent in (signal.SIGHUP, signal.SIGUSR1):  # under nohup; with a scheduler's own handler
            with monkeypatch.context() as patch:
                send_at_draw(patch, 1, sent)
                assert command(*QUICK).code == 0
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert came == [1]


def test_a_warning_of_the_scheduler_ends_a_sweep_after_its_job_is_saved(command, monkeypatch):
    words = ("-m", *LONG, "seed=0,1")
    with monkeypatch.context() as patch:
        send_at_draw(patch, 3, signal.SIGUSR1)
        ran = command(*words)
    assert ran.code == 128 + signal.SIGUSR1 and len(ran.dirs) == 1
    assert command(*words).code == 0


# the terminal of the command is closed once its first epoch is told
CLOSED_TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "revtrain", *sys.argv[1:]])
said = b""
while b" test  accuracy" not in said:
    said += os.read(terminal, 1000)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_terminal_that_is_closed(tmp_path):
    words = [*LONG, "epochs=2000", "hydra.run.dir=run"]
    done = subprocess.run([sys.executable, "-c", CLOSED_TERMINAL, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(128 + signal.SIGHUP), done.stderr
    result = read_result(tmp_path / "run")
    assert result["status"] == "interrupted" and "stopped    SIGHUP" in (tmp_path / "run/train.log").read_text()
    assert checkpoint.load(tmp_path / "run")["epoch"] >= 1


def test_sigterm_under_torchrun_saves_the_step_under_way(tmp_path):
    """One of two processes gets it; both stop after the same step, within their first epoch."""
    words = ["-m", "revtrain", *LONG, "data.train_images=20000", "hydra.run.dir=run"]
    started = start(words, tmp_path)
    until = time.monotonic() + 300
    while not (tmp_path / "run/last.pt").exists():  # it is written when training begins
        assert time.monotonic() < until and started[0].poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    started[1].terminate()
    codes = [code for code, _, err in end(started)]
    assert codes == [143, 143]
    state = checkpoint.load(tmp_path / "run")
    assert state["epoch"] == 0 and 0 < state["partial"]["step"] < 2_000
    assert read_result(tmp_path / "run")["status"] == "interrupted"


# a job of a parallel launcher, and the worker that started it
JOB = """
import os, sys, time
from revtrain.machine import sigterm
from revtrain.runs import sweeps
with sigterm.watching(), sigterm.deferred():
    sweeps.end_with(os.getppid())
    print("trains", flush=True)
    while not sigterm.asked():
        time.sleep(0.05)
open(sys.argv[1], "w").write("saved")
"""
WORKER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_job_whose_sweep_was_killed_saves_itself(tmp_path):
    words = [sys.executable, "-c", WORKER, JOB, str(tmp_path / "saved")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "trains\n"
        worker.kill()
        worker.wait()
        assert worker.stdout.read() == ""  # until the job has ended
    assert (tmp_path / "saved").read_text() == "saved"


# ---- 11: numbers that are words, and keys that say nothing ---------------------------------------------------------


def test_an_exact_reconstruction_is_called_exact_everywhere(command):
    network = [word for word in QUICK if not word.startswith(("arch", "probe"))]
    ran = command("-m", *network, "arch=chunked", "probe.batch=4", "seed=0,1")
    assert ran.code == 0, ran.err
    assert ran.out.count("SNR min exact") == 2 and ran.out.count("minimum SNR exact") == 2
    assert "320" not in ran.out.replace("-320", "")
    runs, _ = gather(["outputs"])
    groups = group_runs(runs)
    for text in (terminal(groups, []), markdown(groups, []), page(groups, [], ["outputs"])):
        assert "exact" in text and "320.0" not in text
    from revtrain.runs import dashboard

    assert all("320: exact" in name for charts in dashboard.LAYOUT.values() for name in charts if "SNR" in name)


def test_an_snr_that_is_no_number_is_not_averaged():
    assert snr_cell([320.0, 320.0]) == "exact" and snr_cell([320.0]) == "exact"
    assert snr_cell([60.0, 62.0]).startswith("61.0 ± 1.4") and snr_cell([None]) == "-"
    assert snr_cell([60.0, 320.0]) == "60.0 (1 of 2 exact)"
    assert snr_cell([-320.0]) == "nothing left" and snr_text(-320.0) == "nothing left"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arch=chunked", "slope=0.1,0.2"], "slope hardly matters with arch=chunked"),
        (["arch=layerwise,irevnet", "slope=0.1,0.2"], "slope hardly matters with arch=irevnet"),
        (["arch=resnet18", "depth=18", "backward=invert,store"], "backward hardly matters with arch=resnet18"),
        (["arch=revnet", "pooling=[]", "+hydra.sweeper.params.slope='1,0.2'"], "slope hardly matters with"),
        (["arch=layerwise", "slope=0.1,0.2"], None),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_the_architecture_does_not_use_is_not_swept_over_without_a_word(command, words, said):
    network = [word for word in QUICK if not word.startswith(("arch", "depth", "pooling"))]
    ran = command("-m", *network, "depth=4", "plan=true", *words)
    text = ran.out + ran.err
    assert text.count("hardly matters") == (said is not None) and (said is None or said in text), text


def test_what_hardly_matters_is_told_from_the_networks_themselves():
    """What an architecture says of its keys is what building it twice shows."""
    values = {"slope": (0.2, 0.7), "backward": ("invert", "store")}
    for case in ARCHS:
        for key, (one, other) in values.items():
            pair = [
                build_model(compose([f"arch={case.arch}", *case.small, f"{key}={value}"])) for value in (one, other)
            ]
            parts = [
                [str({name: value for name, value in vars(module).items() if isinstance(value, int | float | str)})
                 for name, module in model.named_modules() if "head" not in name]
                for model in pair
            ]  # fmt: skip
            hardly = key in registry.load("models", compose([f"arch={case.arch}"]).arch).TRAITS.hardly_uses
            assert (parts[0] == parts[1]) == hardly, (case.arch, key)


# ---- 12: a run's own messages --------------------------------------------------------------------------------------


def test_a_warning_that_every_job_gives_reaches_the_terminal_once(command, own_processes, monkeypatch):
    load = revtrain.data.load_data

    def load_and_warn(config, *rest):
        logging.getLogger("revtrain.data").warning("data       three files were left out")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("an old driver", stacklevel=1)
        logging.getLogger("revtrain.data").warning("data       only %d of them", config.own.seed)
        return load(config, *rest)

    monkeypatch.setattr(revtrain.data, "load_data", load_and_warn)
    ran = command("-m", *QUICK, "data.seed=0,1,2", "hydra.sweep.subdir='100% ${hydra.job.num}'")
    assert ran.code == 0, ran.err
    said = ran.out + ran.err
    assert said.count("three files were left out") == 1 and said.count("UserWarning: an old driver") == 1
    assert said.count("only ") == 3
    for folder in ran.dirs:
        log = (folder / "train.log").read_text()
        assert "three files were left out" in log and "an old driver" in log


@pytest.mark.parametrize(
    ("package", "level", "text"),
    [("matplotlib.font_manager", logging.INFO, "generated new fontManager"),
     ("matplotlib.font_manager", logging.WARNING, "Matplotlib is building the font cache; this may take a moment."),
     ("tensorboard.plugins", logging.INFO, "starting"), ("numexpr.utils", logging.INFO, "NumExpr defaulting to 8")],
)  # fmt: skip
def test_the_progress_of_other_packages_is_no_news_of_a_run(command, monkeypatch, package, level, text):
    load = revtrain.data.load_data

    def load_and_say(config, *rest):
        logging.getLogger(package).log(level, text)
        logging.getLogger("another.package").warning("something is wrong")
        return load(config, *rest)

    monkeypatch.setattr(revtrain.data, "load_data", load_and_say)
    ran = command(*QUICK)
    log = (ran.dir / "train.log").read_text()
    assert text not in ran.out + ran.err + log and "something is wrong" in log and "epoch 1/1" in log


def test_a_job_can_be_sent_to_a_process_of_its_own(command, own_processes, monkeypatch):
    """With types that were made at run time it could not: no parallel launcher started anything."""
    from revtrain.cli import train

    class Sent(train.multiprocessing.Process):
        def __init__(self, target, args):
            super().__init__(target, pickle.loads(pickle.dumps(args)))

    monkeypatch.setattr(train.multiprocessing, "Process", Sent)
    assert command("-m", *QUICK, "plan=true").code == 0


@pytest.mark.slow
def test_a_sweep_with_joblib(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="extra [sweep]")
    words = ["-m", *QUICK, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "slope=0.2,0.3,2"]
    for logging_ in ("none", "revtrain"):
        command = [sys.executable, "-m", "revtrain", *words, f"hydra/job_logging={logging_}", "hydra.sweep.dir=s"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and "3 jobs in s" in done.stdout, done.stderr
        listed = done.stdout.partition("3 jobs in s")[2]
        assert listed.count("failed: slope=2") == 1 and "Traceback" not in done.stdout + done.stderr


# ---- any configuration with any of Hydra's settings ---------------------------------------------------------------

HYDRA = st.fixed_dictionaries(
    {
        "hydra.output_subdir": st.sampled_from(["", "null", "conf", "a/b"]),
        "hydra.job.chdir": st.sampled_from(["", "true"]),
        "hydra/job_logging": st.sampled_from(["", "none", "default", "disabled", "stdout"]),
        "subdir": st.sampled_from(["", "", "${hydra.job.num}", "a/${hydra.job.num}", "x", "."]),
        "parallel": st.booleans(),
        "sweep": st.sampled_from([True, True, False]),
        "folder": st.sampled_from(AWKWARD),
        "seeds": st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True), min_size=1, max_size=2),
    }
)


def try_hydra(command, monkeypatch, root, drawn, words, ends):
    """A sweep, or a run; perhaps a second one into the same folder. Nothing may be claimed that is not there."""
    from revtrain.cli import train

    settings_ = [f"{key}={value}" for key, value in drawn.items() if key.startswith("hydra") and value]
    words = [word for word in words if not word.startswith(("seed=", "resume=", "plan="))]
    kind = ["plan=true"] if len(ends) % 3 else []
    folder = root / f"{len(ends)}" / drawn["folder"]
    monkeypatch.setattr(train, "_shares_this_process", lambda context: not drawn["parallel"])
    for seeds_ in drawn["seeds"]:
        if drawn["sweep"]:
            where = ["-m", word("hydra.sweep.dir", str(folder))]
            where += [f"hydra.sweep.subdir={drawn['subdir']}"] if drawn["subdir"] else []
        else:
            seeds_, where = seeds_[:1], [word("hydra.run.dir", str(folder))]
        ran = command(*PLAIN, *words, *kind, *settings_, *where, f"seed={','.join(map(str, seeds_))}")
        said = (drawn, words, seeds_, ran.out[-1500:], ran.err)
        assert ran.code in (0, 1, 2), said
        assert "Traceback" not in ran.out + ran.err and "has a bug" not in ran.err, said
        found = [read_result(path.parent) for path in folder.rglob("result.json")]
        there = {each["config"]["seed"] for each in found if each["status"] in ("completed", "planned")}
        if ran.code == 0:
            assert set(seeds_) <= there, said  # what is called complete is there, with its own seed
        elif drawn["sweep"] and f"{len(seeds_)} jobs in" in ran.out:
            assert "not completed" in ran.out or "not begun" in ran.out, said
            assert not (drawn["subdir"] != "x" and set(seeds_) <= there and len(found) > 1 and "failed" not in ran.out)
        ends.append(ran.code)


CLEAN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def test_6_random_settings_of_hydra(command, own_processes, monkeypatch, tmp_path):
    ends = []

    @settings(max_examples=6, derandomize=True, database=None, deadline=None, suppress_health_check=CLEAN)
    @given(HYDRA, CONFIGURATIONS)
    def check(drawn, words):
        try_hydra(command, monkeypatch, tmp_path, drawn, words, ends)

    check()
    assert ends.count(0) >= 2 and len(ends) > ends.count(0)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_500_random_settings_of_hydra(command, own_processes, monkeypatch, tmp_path, part):
    """A hundred in each part; REVTRAIN_FUZZ_SEED=N tries others."""
    ends = []

    @seed(10 * int(os.environ.get("REVTRAIN_FUZZ_SEED", "0")) + part)
    @settings(max_examples=100, database=None, deadline=None, suppress_health_check=CLEAN)
    @given(HYDRA, CONFIGURATIONS)
    def check(drawn, words):
        try_hydra(command, monkeypatch, tmp_path, drawn, words, ends)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        os.chdir(tmp_path)

    check()
    counts = f"{ends.count(0)} complete, {ends.count(1)} with failed jobs, {ends.count(2)} refused"
    print(f"\nrandom settings of Hydra: {len(ends)} commands, {counts}")
    assert len(ends) >= 100 and ends.count(0) >= 10


@pytest.mark.parametrize("step", [0, 1])
def test_a_signal_between_two_epochs_is_told_and_loses_nothing(command, monkeypatch, step):
    """It comes while the checkpoint of an epoch is written: there is no epoch under way."""
    save, saved = checkpoint.save, []

    def save_and_send(*args):
        if len(saved) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(args)
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_send)
        ran = command(*LONG)
    assert ran.code == 128 + signal.SIGTERM
    assert f"stopped    SIGTERM after epoch {step}" in (ran.dir / "train.log").read_text()
    assert read_checkpoint(ran.dir)["epoch"] == step


# has said something that is still in a buffer, and is not to be cleaned up as one of two processes
LEAVING = """
import atexit, sys
from revtrain.machine import torchrun
atexit.register(print, "cleaned up")
print("done", end=" ")
torchrun.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_at_once_with_its_code_and_all_that_it_said(processes):
    place = {"RANK": "0", "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    words = [sys.executable, "-c", LEAVING, "3"]
    done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (3, ["done"] if processes == 2 else ["done", "cleaned", "up"])
