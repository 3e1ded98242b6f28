"""The command: one run, sweeps, and every bad input with its few lines and its exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, at_call, read_checkpoint, read_metrics, read_result
from PIL import Image

import revtrain
import revtrain.conf
import revtrain.data
import revtrain.training.run
from revtrain.cli.train import main
from revtrain.data import datasets
from revtrain.models import architectures

REFUSED = [
    # groups
    (["arch=hybird"], "arch=hybird was given", "hybrid, hybrid_batch_pooling, hybrid_mixed", "Did you mean hybrid?"),
    (["data=cifar"], "data=cifar was given", "Did you mean cifar10?"),
    (["experiment=quick"], "experiment=quick was given", "quickstart"),
    (["arch=null"], "takes the name of one of its files", "arch=hybrid"),
    # keys
    (["dept=4"], "dept was given; there is no such key", "Did you mean depth?"),
    (["archi=hybrid"], "there is no such key", "Did you mean arch?"),
    (["data.augment.flop=1"], "no such key", "Did you mean data.augment.flip?"),
    (["hydra.bogus=1"], "hydra.bogus was given; there is no such key"),
    (["+foo=1"], "foo was given; there is no such key"),
    (["+data.rot=1"], "data.rot was given; there is no such key", "Did you mean data.root?"),
    (["+depth=4"], "depth exists already", "depth=VALUE"),
    (["~depth"], "a key cannot be removed"),
    (["~foo"], "foo was given; there is no such key"),
    # types and syntax
    (["batch=abc"], "batch=abc was given; expected a whole number"),
    (["slope=x"], "slope=x was given; expected a number"),
    (["lr=null"], "lr=null was given; expected a number"),
    (["data.augment.flip=maybe"], "expected true or false"),
    (["pooling=channel"], "expected a list, as in pooling=[channel,batch]"),
    (["data.augment=3"], "data.augment.KEY=VALUE"),
    (["depth=4,6"], "one run takes one value", "revtrain -m depth=4,6"),
    (["-m", "depth=a,2"], "depth=a was given; expected a whole number"),
    (["depth"], "'depth' was given; expected key=value"),
    (["depth=[1"], "'depth=[1' was given; expected key=value"),
    (["data.root=/a=b"], "Quote a value with special characters"),
    (["lr=${nope}"], "Interpolation key 'nope' not found"),
    (["--multirn", "depth=4"], "Did you mean --multirun?"),
    # values, refused before torch is loaded
    (["depth=0"], "depth=0 was given", "at least 1"),
    (["depth=-1"], "depth=-1 was given", "at least 1"),
    (["slope=0"], "slope=0 was given", "0 < slope <= 1"),
    (["slope=2"], "slope=2 was given", "slope=0.5"),
    (["batch=0"], "batch=0 was given", "One image can be the batch"),
    (["width=33"], "width=33 was given", "even"),
    (["device=gpu"], "device=gpu was given"),
    (["resume=no/such/run"], "resume=no/such/run was given", "outputs/DATE/RUN"),
    (["data=imagefolder"], "without data.root"),
    # folders
    (["hydra.run.dir=/dev/null/run"], "/dev/null/run: Not a directory", "hydra.run.dir=FOLDER"),
    (["-m", "hydra.sweep.dir=/dev/null/sweep", "depth=4,6"], "Not a directory", "hydra.sweep.dir=FOLDER"),
]  # fmt: skip


def assert_refused(ran, *fragments):
    assert ran.code == 2, ran.err
    for fragment in fragments:
        assert fragment in ran.err
    assert 2 <= len(ran.err.strip().splitlines()) <= 5, ran.err
    assert "Traceback" not in ran.out + ran.err


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join(case[0]))
def test_bad_input_is_refused_in_a_few_lines(command, case):
    words, *fragments = case
    ran = command(*words)
    assert_refused(ran, *fragments)
    for folder in ran.dirs:
        assert read_result(folder)["status"] == "failed"
        assert read_result(folder)["error"] == ran.err.strip()
        assert not (folder / "last.pt").exists()


DATA_AND_NETWORK = [
    (["batch=53"], "batch=53 was given; the training set has 52 images", "batch=52"),
    (["pooling=[channel]", "data.image_size=33"], "33", "pool"),
    (["data.classes=7"], "data.classes=7", "10 classes"),
    (["device=cuda:99"], "device=cuda:99 was given; this machine has: cpu", "device=auto"),
    (["arch=resnet18", "depth=19"], "depth=19", "18"),
]


@pytest.mark.parametrize("case", DATA_AND_NETWORK, ids=lambda case: " ".join(case[0]))
def test_what_does_not_fit_the_data_or_the_network_is_refused(command, case):
    words, *fragments = case
    ran = command(*TINY, *words)
    assert_refused(ran, *fragments)
    assert ran.result["error"] == ran.err.strip()


def image_folder(folder, size=8):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                shade = 40 * index + (100 if name == "dog" else 0)
                Image.new("RGB", (size, size), (shade, 0, 255 - shade)).save(folder / split / name / f"{index}.png")
    return folder


def of_folder(folder, cache):
    return [
        *(word for word in TINY if not word.startswith("data")),  # of data=synthetic
        "data=imagefolder",
        f"data.root={folder}",
        f"data.cache={cache}",
        "batch=4",
        "data.augment.pad=2",
    ]


def test_an_image_folder_trains(command, tmp_path):
    ran = command(*of_folder(image_folder(tmp_path / "images"), tmp_path / "cache"), "epochs=1")
    assert ran.code == 0, ran.err
    assert ran.result["config"]["data"]["root"] == str(tmp_path / "images")


def test_an_empty_image_folder_is_refused(command, tmp_path):
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "images/test").mkdir()
    assert_refused(
        command(*of_folder(tmp_path / "images", tmp_path / "cache")),
        str(tmp_path / "images"),
        "folder for each class",
    )


def test_a_corrupt_image_is_refused_by_name(command, tmp_path):
    bad = image_folder(tmp_path / "images") / "train/dog/1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert_refused(command(*of_folder(tmp_path / "images", tmp_path / "cache")), str(bad))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"text\n" * 50], ids=["empty", "cut", "text"])
def test_a_damaged_or_foreign_checkpoint_is_refused(command, tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    ran = command(*TINY, f"resume={tmp_path / 'last.pt'}")
    assert_refused(ran, "truncated, or no checkpoint at all", "nothing was changed")
    assert (tmp_path / "last.pt").read_bytes() == content


def test_another_architectures_checkpoint_is_refused_with_its_own_command(command):
    first = command(*TINY, "epochs=1")
    ran = command(*TINY, "arch=resnet18", "depth=18", f"resume={first.dir}")
    assert_refused(ran, "arch=layerwise", "arch=resnet18", f"revtrain resume={first.dir}")


def test_a_loss_that_turns_nan_and_a_full_memory_are_told_in_a_few_lines(command, monkeypatch):
    ran = command(*TINY, "lr=1e30", "probe.every=0")
    assert_refused(ran, "Training stopped", "epoch 1", "lr=")
    assert read_checkpoint(ran.dir)["epoch"] == 0

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(revtrain.data, "draw_augmentation", no_memory)  # in training alone: a plan makes no choices
    assert_refused(command(*TINY), "out of memory", "batch=")


def test_a_full_disk_is_told_in_a_few_lines(tmp_path):
    """The real thing: the system refuses to write files of more than 10 kB; last.pt has more."""
    code = (
        "import resource, sys; from revtrain.cli.train import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = [*TINY, "width=16", "hydra.run.dir=run"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "The disk is full" in done.stderr and "give the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/last.pt").exists() and not list((tmp_path / "run").glob(".last.pt*"))
    assert read_result(tmp_path / "run")["status"] == "failed"


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_from_end_to_end(command):
    ran = command(*TINY)
    assert ran.code == 0, ran.err
    assert re.fullmatch(
        r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-layerwise-[0-9a-f]{6}", str(ran.dir.relative_to(os.getcwd()))
    )
    names = {path.name.split(".")[0] if path.name.startswith("events") else path.name for path in ran.dir.iterdir()}
    assert names == {
        ".hydra", ".lock", "train.log", "metrics.jsonl", "result.json", "last.pt", "previous.pt", "events",
    }  # fmt: skip
    assert "test accuracy" in ran.out and "minimum SNR" in ran.out and "no CUDA" in ran.out
    assert f"tensorboard --logdir {ran.dir.relative_to(os.getcwd())}" in ran.out
    assert ran.err == ""  # the progress bar is silent where nobody watches
    log = (ran.dir / "train.log").read_text()
    assert "INFO revtrain.training.run: epoch 2/2" in log
    assert ran.result["overrides"] == list(TINY)


def test_two_runs_of_the_same_second_have_their_own_folders(command):
    ran = [command("depth=0").dir for _ in range(4)]
    assert len(set(ran)) == 4


def test_a_run_is_not_written_over_another(command):
    first = command(*TINY, "epochs=1", "hydra.run.dir=here")
    checkpoint = (first.dir / "last.pt").read_bytes()
    for words in ([], ["depth=0"]):
        ran = command(*TINY, "hydra.run.dir=here", *words)
        assert ran.code == 2
        assert first.result["status"] == "completed" and (first.dir / "last.pt").read_bytes() == checkpoint
    assert_refused(command(*TINY, "hydra.run.dir=here"), "here already holds a run")


def test_module_and_exit_code(tmp_path):
    done = subprocess.run([sys.executable, "-m", "revtrain", "slope=2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "slope=0.5" in done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"revtrain {revtrain.__version__} ")


def test_a_bug_goes_to_train_log_and_result_with_one_line_on_the_terminal(command, monkeypatch):
    def broken(*args):
        raise TypeError("inner workings")

    monkeypatch.setattr(revtrain.data, "load_data", broken)
    ran = command(*TINY)
    assert ran.code == 1
    assert "revtrain has a bug: TypeError: inner workings" in ran.err and "train.log" in ran.err
    assert "Traceback" not in ran.out + ran.err
    assert "Traceback" in (ran.dir / "train.log").read_text()
    assert ran.result["error"] == "TypeError: inner workings"


def test_ctrl_c_exits_with_130_and_says_how_to_continue(command, monkeypatch):
    at_call(monkeypatch, "draw_augmentation", 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    ran = command(*TINY)
    assert ran.code == 130
    assert ran.result["status"] == "interrupted" and read_checkpoint(ran.dir)["epoch"] == 1
    assert f"resume={ran.dir}" in ran.err and "Traceback" not in ran.err

    resumed = command(*TINY, f"resume={ran.dir}")
    assert resumed.code == 0
    assert [line["epoch"] for line in read_metrics(resumed.dir)] == [0, 1, 2]


def test_ctrl_c_before_training(command, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(revtrain.training.run, "train", interrupt)
    ran = command(*TINY)
    assert ran.code == 130 and ran.result["status"] == "interrupted"
    assert "nothing to continue from" in ran.err


# ---- sweeps --------------------------------------------------------------------------------------


def test_a_failing_job_leaves_the_others_of_its_sweep_complete(command):
    ran = command("-m", *TINY, "epochs=1", "depth=2,3", "slope=0.2,2")
    assert ran.code == 1
    assert len(ran.dirs) == 4 and len({folder.parent for folder in ran.dirs}) == 1
    results = {(r["config"]["depth"], r["config"]["slope"]): r for r in map(read_result, ran.dirs)}
    for (_, slope), result in results.items():
        assert result["status"] == ("completed" if slope == 0.2 else "failed")
        assert ("0 < slope <= 1" in (result["error"] or "")) == (slope == 2)
    assert len(results) == 4
    # the list at the end
    listed = ran.out.partition("4 jobs in outputs/")[2]
    assert listed.count("failed: slope=2 was given") == 2 and listed.count("bytes per pixel") == 2
    assert "tensorboard --logdir outputs/" in listed
    names = ["0-depth-2_slope-0.2", "1-depth-2_slope-2", "2-depth-3_slope-0.2", "3-depth-3_slope-2"]
    assert sorted(folder.name.rpartition("-")[0] for folder in ran.dirs) == names


def test_a_bug_in_one_job_does_not_end_the_sweep(command, monkeypatch):
    load = revtrain.data.load_data

    def sometimes(cfg, *rest):
        if cfg.own.seed == 1:
            raise TypeError("inner workings")
        return load(cfg, *rest)

    monkeypatch.setattr(revtrain.data, "load_data", sometimes)
    ran = command("-m", *TINY, "epochs=1", "probe.every=0", "data.seed=0,1,2")
    assert ran.code == 1
    assert [read_result(folder)["status"] for folder in sorted(ran.dirs)] == [
        "completed",
        "failed",
        "completed",
    ]
    assert "failed: TypeError: inner workings" in ran.out


def test_a_sweep_without_failures_exits_with_0(command):
    ran = command("-m", *TINY, "epochs=1", "probe.every=0", "seed=0,1")
    assert ran.code == 0
    assert [read_result(folder)["config"]["seed"] for folder in sorted(ran.dirs)] == [0, 1]


# ---- help and completion ---------------------------------------------------------------------------


def test_help_lists_the_groups(command):
    ran = command("--help")
    assert ran.code == 0
    presets = [path.stem for path in Path(revtrain.conf.__file__).parent.glob("arch/*.yaml")]
    assert set(architectures()) < set(presets)
    assert f"arch: {', '.join(sorted(presets))}" in ran.out
    assert f"data: {', '.join(sorted(datasets()))}" in ran.out
    assert "experiment: " in ran.out and "quickstart" in ran.out


@pytest.mark.parametrize(
    ("typed", "offered"), [("arch=h", "arch=hybrid"), ("dep", "depth="), ("data=im", "data=imagefolder")]
)
def test_shell_completion(typed, offered, tmp_path):
    line = f"revtrain {typed}"
    done = subprocess.run(
        [sys.executable, "-m", "revtrain", "-sc", "query=bash"],
        env={**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert offered in done.stdout.split(), done.stderr
