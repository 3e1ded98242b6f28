"""Faults: killed, preempted, out of disk, damaged, attacked, misconfigured; nothing may be lost, nothing may be lied.

The long ones are marked slow; docs/reliability.md holds their figures. Run them with

    pytest tests/test_faults.py -m slow -s
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_state, at_call, read_checkpoint, read_metrics, read_result
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import revtrain.data
import revtrain.runs.writer
from revtrain.conf import compose
from revtrain.config.schema import BACKWARDS, POOLINGS, PRECISIONS, SCHEDULES, STATE_FORMATS
from revtrain.errors import RevtrainError
from revtrain.machine import files
from revtrain.models import for_task
from revtrain.runs import checkpoint
from revtrain.training import run as train

BASE = (*TINY, "arch=hybrid", "depth=1", "width=8", "data.image_size=16")
MIB = 2**20


def run(folder, *overrides, base=BASE):
    return train.train(compose([*base, *overrides]), folder, list(overrides))


def figures(what, tried, survived, remark=""):
    """A line for docs/reliability.md."""
    print(f"\n{what}: {tried} tried, {survived} survived, {tried - survived} lost" + (f"; {remark}" if remark else ""))


def assert_same_run(one, other):
    """The same weights, momentum, random states and numbers of every epoch, bit for bit."""
    assert_same_state(read_checkpoint(one), read_checkpoint(other))
    assert_same_state(read_metrics(one), read_metrics(other))


def go_on(folder, resumed, *overrides, base=BASE):
    """What a user does after a cut: resume, or begin again where not even the start was saved."""
    saved = any((folder / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS))
    return run(resumed, *([f"resume={folder}"] if saved else []), *overrides, base=base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 2 epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


# ---- SIGKILL ---------------------------------------------------------------------------------------------

# the child dies at the given one of the system calls that write a run's files; 0: it says which of them write the
# second checkpoint
KILLED_WRITING = """
import os, signal, sys
from revtrain.runs import checkpoint
import revtrain.models, revtrain.data, revtrain.planning.plan, torch.utils.tensorboard  # once for all children
from revtrain.conf import compose
from revtrain.training.run import train

folder, base = sys.argv[1], sys.argv[2:]

def child(number):
    calls = 0
    def count():
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def counted(function):
        def call(*args, **kwargs):
            count()
            return function(*args, **kwargs)
        return call
    def half(handle, *args):
        file = open(handle, *args)
        write = file.write
        class Half:  # of a file's bytes, half are written before the count
            def __enter__(self):
                return self
            def __exit__(self, *error):
                file.close()
            def write(self, content):
                write(content[: len(content) // 2])
                file.flush()
                count()
                write(content[len(content) // 2 :])
            flush, fileno = file.flush, file.fileno
        return Half()
    os.fdopen = half
    for name in ("fsync", "link", "unlink", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    save, spans = checkpoint.save, []
    def noted(*args):
        before = calls
        save(*args)
        spans.append((before + 1, calls))
    checkpoint.save = noted
    train(compose(base), f"{folder}/{number}")
    return "{} {}".format(*spans[1])

def forked(number):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, child(number).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status), os.read(reading, 20)

first, last = map(int, forked(0)[1].split())
for number in range(first, last + 2):  # and the first call after it
    assert forked(number) == (signal.SIGKILL, b""), number
"""


def test_sigkill_at_each_system_call_of_a_checkpoint(tmp_path, whole):
    words = [sys.executable, "-c", KILLED_WRITING, str(tmp_path), *BASE]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = sorted((each for each in tmp_path.iterdir() if each.name != "0"), key=lambda each: int(each.name))
    assert len(killed) >= 6  # half of the bytes, fsync, unlink, link, rename, the next one
    epochs, leftovers = [], 0
    for folder in killed:
        leftovers += any(folder.glob(".last.pt.*"))
        epochs.append(checkpoint.load(folder)["epoch"])
        go_on(folder, tmp_path / f"resumed{folder.name}")
        assert_same_run(whole, tmp_path / f"resumed{folder.name}")
    assert epochs == [0] * (len(killed) - 1) + [1]  # before the rename the old one, then the new one
    assert leftovers == len(killed) - 1
    figures("SIGKILL at each system call of a checkpoint", len(killed), len(killed))


# starts a child for each line on its standard input, a folder, and says how it ended; a fresh start would take seconds
COMMANDS = """
import os, sys
import revtrain.cli.train, revtrain.training.run, revtrain.models, revtrain.data
import revtrain.planning.plan, torch.utils.tensorboard
for line in sys.stdin:
    folder = line.strip()
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(folder + name, os.O_WRONLY | os.O_CREAT), stream)
        code = revtrain.cli.train.main([*sys.argv[1:], f"hydra.run.dir={folder}"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
SIX = (*BASE, "epochs=6")


class Command:
    """`revtrain ... hydra.run.dir=FOLDER` as a process."""

    def __init__(self, server, folder):
        server.stdin.write(f"{folder}\n")
        server.stdin.flush()
        self.server, self.pid, self.code = server, int(server.stdout.readline()), None

    def poll(self):
        if self.code is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.wait()
        return self.code

    def wait(self):
        if self.code is None:
            self.code = int(self.server.stdout.readline())
        return self.code

    def send(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


@pytest.fixture(scope="module")
def server():
    words = [sys.executable, "-c", COMMANDS, *SIX]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def whole_six(tmp_path_factory):
    """A run of 6 epochs that nothing disturbs, and the seconds it took."""
    folder, started = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    run(folder, base=SIX)
    return folder, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3])
def test_sigkill_at_30_random_moments(tmp_path, server, whole_six, part):
    """Ten in each part; half are killed anywhere from the first file on, half while a checkpoint is written."""
    (whole, seconds), dice = whole_six, random.Random(part)
    survived, while_writing, completed, epochs = 0, 0, 0, []
    for trial in range(10):
        folder, resumed = tmp_path / f"killed{trial}", tmp_path / f"resumed{trial}"
        process = Command(server, folder)
        wait_for(lambda: (folder / "metrics.jsonl").exists(), process)  # noqa: B023
        if trial % 2:
            time.sleep(dice.uniform(0, seconds))
        else:
            line = dice.randint(1, 6)
            wait_for(lambda: count_lines(folder) >= line and any(folder.glob(".last.pt.*")), process)  # noqa: B023
        process.send(signal.SIGKILL)
        completed += process.wait() == 0
        assert process.code in (0, -signal.SIGKILL)
        while_writing += any(folder.glob(".last.pt.*"))
        if process.code == 0:
            resumed = folder
        else:
            epochs.append(checkpoint.load(folder)["epoch"] if (folder / "last.pt").exists() else None)
            go_on(folder, resumed, base=SIX)
        assert_same_run(whole, resumed)
        survived += 1
    remark = f"{while_writing} within the writing of a checkpoint, {completed} after the end; epochs saved {epochs}"
    figures("SIGKILL at random moments", 10, survived, remark)
    assert while_writing >= 1 and len(epochs) >= 5


def wait_for(condition, process, seconds=120.0):
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the process did not come that far"
        time.sleep(0.0005)


def count_lines(folder):
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


# ---- SIGTERM ---------------------------------------------------------------------------------------------


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# 3 steps an epoch; images are normalised by a probe, the two batches of the first test, a probe, the second test
@pytest.mark.parametrize(
    ("name", "call", "epoch", "step"),
    [("draw_augmentation", 1, 0, 1), ("draw_augmentation", 5, 1, 2), ("normalise", 5, 1, 3)],
    ids=["first step", "within an epoch", "at the test"],
)
def test_sigterm_saves_within_the_epoch_and_resume_is_bit_equal(command, monkeypatch, whole, name, call, epoch, step):
    with monkeypatch.context() as patch:
        at_call(patch, name, call, terminate)
        ran = command(*BASE)
    assert ran.code == 143 and ran.result["status"] == "interrupted"
    state = read_checkpoint(ran.dir)
    assert (state["epoch"], state["partial"]["step"]) == (epoch, step)
    assert f"The last completed step is in {ran.dir}/last.pt" in ran.err and f"resume={ran.dir}" in ran.err
    assert "Traceback" not in ran.err and len(ran.err.strip().splitlines()) <= 5
    assert "stopped    SIGTERM in epoch" in (ran.dir / "train.log").read_text()
    resumed = command(*BASE, f"resume={ran.dir}")
    assert resumed.code == 0, resumed.err
    assert f"after epoch {epoch} and {step} of 3 steps" in resumed.out
    assert_same_run(whole, resumed.dir)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_twice_in_one_epoch_and_sigkill_after_that(tmp_path, monkeypatch, whole):
    """A resumed run that is ended in the same epoch again, and what it leaves is used through previous.pt."""
    source = None
    for index in range(2):
        with monkeypatch.context() as patch:
            at_call(patch, "draw_augmentation", 1, terminate)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / f"{index}", *([f"resume={source}"] if source else []))
        source = tmp_path / f"{index}"
        assert read_checkpoint(source)["partial"]["step"] == index + 1
    (source / "last.pt").write_bytes(b"damaged")
    assert checkpoint.load(source)["partial"]["step"] == 1
    run(tmp_path / "resumed", f"resume={source}")
    assert_same_run(whole, tmp_path / "resumed")


def test_a_checkpoint_from_within_an_epoch_needs_the_same_data(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, "draw_augmentation", 4, terminate)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ended")
    with pytest.raises(RevtrainError, match=r"within epoch 2(.|\n)*batch=16; given now: batch=8(.|\n)*previous.pt"):
        run(tmp_path / "other", f"resume={tmp_path / 'ended'}", "batch=8")
    result = run(tmp_path / "before", f"resume={tmp_path / 'ended/previous.pt'}", "batch=8")
    assert result["status"] == "completed"


def test_sigterm_before_training_ends_at_once(command, monkeypatch):
    at_call(monkeypatch, "load_data", 1, terminate)
    ran = command(*BASE)
    assert ran.code == 143 and ran.result["status"] == "interrupted"
    assert "nothing to continue from" in ran.err and not (ran.dir / "last.pt").exists()


def test_sigterm_ends_a_sweep_after_its_job_is_saved_and_the_same_command_goes_on(command, monkeypatch, whole):
    with monkeypatch.context() as patch:
        at_call(patch, "draw_augmentation", 5, terminate)
        ran = command("-m", *BASE, "seed=0,1")
    assert ran.code == 143 and len(ran.dirs) == 1
    assert ran.result["status"] == "interrupted" and f"{ran.dir.name}: interrupted: Ctrl-C or a signal" in ran.out
    again = command("-m", *BASE, "seed=0,1")
    assert again.code == 0 and len(again.dirs) == 1
    assert f"resume     {ran.dir} after epoch 1 and 2 of 3 steps" in (ran.dir / "train.log").read_text()
    assert_same_run(whole, ran.dir)


def test_sigterm_at_the_end_of_a_job_lets_it_complete_and_begins_no_other(command, monkeypatch):
    save, calls = checkpoint.save, itertools.count(1)

    def save_then_terminate(*args):
        save(*args)
        if next(calls) == 3:
            terminate()

    monkeypatch.setattr(checkpoint, "save", save_then_terminate)
    ran = command("-m", *BASE, "seed=0,1,2")
    assert ran.code == 143
    assert [read_result(each)["status"] for each in sorted(ran.dirs)] == ["completed", "interrupted"]
    assert next(calls) == 4


def test_weights_that_are_no_longer_finite_are_not_saved_at_sigterm(tmp_path, monkeypatch):
    at_call(monkeypatch, "draw_augmentation", 3, terminate)
    with pytest.raises(RevtrainError, match="Training stopped"):
        run(tmp_path, "lr=1e30", "probe.every=0")
    assert read_checkpoint(tmp_path)["epoch"] == 0 and read_checkpoint(tmp_path)["partial"] is None


@pytest.mark.slow
def test_sigterm_at_10_random_moments(tmp_path, server, whole_six):
    (whole, whole_seconds), dice = whole_six, random.Random(21)
    survived, seconds, steps = 0, [], []
    for trial in range(10):
        folder, resumed = tmp_path / f"ended{trial}", tmp_path / f"resumed{trial}"
        process = Command(server, folder)
        wait_for(lambda: (folder / "metrics.jsonl").exists(), process)  # noqa: B023
        time.sleep(dice.uniform(0, 0.6 * whole_seconds))
        asked = time.monotonic()
        process.send(signal.SIGTERM)
        if process.wait() == 0:
            resumed = folder
        else:
            seconds.append(time.monotonic() - asked)
            said = Path(f"{folder}.err").read_text()
            assert process.code == 143 and "continue with" in said and "Traceback" not in said, said
            state = read_checkpoint(folder)
            steps.append(3 * state["epoch"] + (state["partial"] or {"step": 0})["step"])
            go_on(folder, resumed, base=SIX)
        assert_same_run(whole, resumed)
        survived += 1
    remark = f"{len(seconds)} before the end, gone within {max(seconds):.1f} s; steps saved {steps} of 18"
    figures("SIGTERM at random moments", 10, survived, remark)
    assert len(seconds) >= 3


# ---- the disk --------------------------------------------------------------------------------------------

# from the second epoch on, no file may grow beyond a kB less than a checkpoint: the write fails near its end
FULL_DISK = """
import os, resource, sys
import revtrain.data
from revtrain.cli.train import main
draw, calls = revtrain.data.draw_augmentation, 0
def draw_on_a_full_disk(*args):
    global calls
    calls += 1
    if calls == 5:
        size = os.path.getsize("run/last.pt") - 1000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return draw(*args)
revtrain.data.draw_augmentation = draw_on_a_full_disk
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path, whole):
    words = [sys.executable, "-c", FULL_DISK, *BASE, "hydra.run.dir=run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "The disk is full" in done.stderr and f"resume={tmp_path / 'run'}" in done.stderr
    assert not list((tmp_path / "run").glob(".last.pt*"))
    assert checkpoint.load(tmp_path / "run")["epoch"] == 1
    assert (tmp_path / "run/previous.pt").exists()
    go_on(tmp_path / "run", tmp_path / "resumed")
    assert_same_run(whole, tmp_path / "resumed")


@contextmanager
def mounted(folder, *steps):
    """Mount something on `folder`; each step is a list of words for mount."""
    for number, words in enumerate(steps):
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
        if done.returncode:
            if number:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disks_of_20_sizes_that_fill_up(command, tmp_path, monkeypatch):
    """A disk of its own, one of 20 sizes: it fills up in the log, the events, or any of the checkpoints."""
    run(tmp_path / "whole")
    survived, ends = 0, []
    for trial in range(20):
        disk = tmp_path / "disk"
        disk.mkdir()
        with mounted(disk, ["-t", "tmpfs", "-o", f"size={40 + 60 * trial}k", "tmpfs"]):
            ran = command(*BASE, f"hydra.run.dir={disk / 'run'}")
            assert "Traceback" not in ran.err and "has a bug" not in ran.err, ran.err
            assert ran.code in (0, 2)
            saved = (disk / "run/last.pt").exists()
            if ran.code == 2:
                assert "disk is full" in ran.err.lower() or "No space left" in ran.err, ran.err
                assert len(ran.err.strip().splitlines()) <= 5
                ends.append(checkpoint.load(disk / "run")["epoch"] if saved else None)
                go_on(disk / "run", tmp_path / "resumed")
            else:
                ends.append("completed")
                shutil.copytree(disk / "run", tmp_path / "resumed")
        assert_same_run(tmp_path / "whole", tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed")
        disk.rmdir()
        survived += 1
    figures("full disks", 20, survived, f"epochs saved {ends}")
    assert survived == 20 and {None, 0, 1} & set(ends) and "completed" in ends


@contextmanager
def read_only(folder):
    """For root, who may write into any folder, a read-only mount."""
    if os.geteuid() == 0:
        with mounted(folder, ["--bind", str(folder)], ["-o", "remount,ro,bind"]):
            yield
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_read_only_folder_is_told_in_a_few_lines(command, tmp_path, inside):
    disk = tmp_path / "disk"
    disk.mkdir()
    with read_only(disk):
        ran = command(*BASE, f"hydra.run.dir={disk / inside}")
    assert ran.code == 2 and str(disk) in ran.err and "hydra.run.dir=FOLDER" in ran.err
    assert "Traceback" not in ran.err and len(ran.err.strip().splitlines()) <= 5
    assert not list(disk.iterdir())


def test_a_folder_that_becomes_read_only_keeps_its_checkpoint(tmp_path, monkeypatch, whole):
    folder, calls, draw = tmp_path / "run", itertools.count(1), revtrain.data.draw_augmentation
    folder.mkdir()
    with pytest.raises(RevtrainError, match=r"(Read-only file system|Permission denied).*\n.*hydra.run.dir=FOLDER"):
        guard = read_only(folder)
        with monkeypatch.context() as patch:
            patch.setattr(
                revtrain.data, "draw_augmentation", lambda *a: (next(calls) == 5 and guard.__enter__(), draw(*a))[1]
            )
            try:
                run(folder)
            finally:
                guard.__exit__(None, None, None)
    assert checkpoint.load(folder)["epoch"] == 1
    run(tmp_path / "resumed", f"resume={folder}")
    assert_same_run(whole, tmp_path / "resumed")


def test_a_run_directory_that_is_deleted_under_way(command, monkeypatch, tmp_path):
    at_call(monkeypatch, "draw_augmentation", 5, lambda: shutil.rmtree(tmp_path / "run"))
    ran = command(*BASE, "hydra.run.dir=run")
    assert ran.code == 2 and f"{tmp_path / 'run'} was deleted while the run was writing to it" in ran.err
    assert "Traceback" not in ran.err and len(ran.err.strip().splitlines()) <= 5
    assert not (tmp_path / "run").exists()


# ---- damaged checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def two(whole, tmp_path):
    """A folder with the checkpoints of epochs 2 and 1, and the bytes of the former."""
    for name in (checkpoint.NAME, checkpoint.PREVIOUS, "metrics.jsonl"):
        shutil.copy(whole / name, tmp_path)
    return tmp_path, (tmp_path / "last.pt").read_bytes()


def damaged(content, kind, dice):
    if kind == "truncated":
        return content[: dice.randrange(len(content))]
    at = dice.randrange(len(content))
    return content[:at] + bytes([content[at] ^ dice.randint(1, 255)]) + content[at + 1 :]


@pytest.mark.parametrize("kind", ["truncated", "byte flipped"])
def test_50_damaged_checkpoints_are_refused_and_the_one_before_is_used(two, caplog, kind):
    folder, content = two
    dice = random.Random(kind)
    for _ in range(50):
        (folder / "last.pt").write_bytes(damaged(content, kind, dice))
        with pytest.raises(RevtrainError) as caught:
            checkpoint.load(folder / "last.pt")
        message = str(caught.value)
        assert "damaged" in message or "truncated" in message
        assert f"resume={folder / 'previous.pt'}" in message and len(message.splitlines()) <= 5
        caplog.clear()
        state = checkpoint.load(folder)
        assert state["epoch"] == 1 and [line["epoch"] for line in state["history"]] == [0, 1]
        assert f"Going on from {folder / 'previous.pt'} instead" in caplog.text
    figures(f"checkpoints {kind}", 50, 50)


def test_every_byte_of_the_seal_counts(two):
    folder, content = two
    for at in range(len(content) - 82, len(content)):
        for bit in (0, 5):
            (folder / "last.pt").write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with pytest.raises(RevtrainError):
                checkpoint.load(folder / "last.pt")


def test_a_run_goes_on_from_the_previous_checkpoint(command, two, whole):
    folder, content = two
    (folder / "last.pt").write_bytes(content[:-1])
    resumed = command(*BASE, f"resume={folder}")
    assert resumed.code == 0 and "Going on from" in resumed.out and "after epoch 1" in resumed.out
    assert_same_run(whole, resumed.dir)
    (folder / "previous.pt").write_bytes(b"")
    refused = command(*BASE, f"resume={folder}")
    assert refused.code == 2 and "last.pt was given; the file is truncated" in refused.err
    assert (folder / "last.pt").read_bytes() == content[:-1]


def test_a_run_that_goes_on_in_its_own_folder_never_keeps_the_damaged_file(command, two, whole, monkeypatch):
    """Nor is there a moment when that is the only one: here it is killed as soon as it writes."""
    folder, content = two
    (folder / "last.pt").write_bytes(content[:-1])
    words = [*BASE, f"resume={folder}", f"hydra.run.dir={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", at_most(files.os.replace, ["put in place", "metrics.jsonl", "result.json"]))
        assert command(*words).code == 1
    assert checkpoint.load(folder / "last.pt")["epoch"] == checkpoint.load(folder / "previous.pt")["epoch"] == 1
    resumed = command(*words)
    assert resumed.code == 0, resumed.err
    assert_same_run(whole, folder)
    assert checkpoint.load(folder / "previous.pt")["epoch"] == 1


def at_most(function, calls):
    """The function, which fails from then on."""
    left = iter(calls)

    def wrapped(*args):
        if next(left, None) is None:
            raise ArithmeticError
        return function(*args)

    return wrapped


def test_a_checkpoint_without_its_metrics_still_goes_on(tmp_path, whole, caplog):
    (tmp_path / "alone").mkdir()
    shutil.copy(whole / "previous.pt", tmp_path / "alone")
    result = run(tmp_path / "resumed", f"resume={tmp_path / 'alone/previous.pt'}")
    assert "metrics.jsonl is missing or damaged" in caplog.text
    assert result["status"] == "completed" and [line["epoch"] for line in read_metrics(tmp_path / "resumed")] == [2]
    one, other = read_checkpoint(whole), read_checkpoint(tmp_path / "resumed")
    assert_same_state({**one, "lines": 0}, {**other, "lines": 0})


@pytest.mark.parametrize("text", ["{}\n{}\n", '{"epoch": 0}\n[]\n', '{"epoch": 0}\n{"epoch"', "\xff", '{"epoch": 0}\n'])
def test_damaged_metrics_are_a_warning(two, caplog, text):
    folder, _ = two
    (folder / "metrics.jsonl").write_bytes(text.encode("latin1"))
    assert checkpoint.load(folder)["history"] == []
    assert "missing or damaged" in caplog.text


def test_the_format_without_checksum_is_refused_and_nothing_changed(tmp_path, whole, command):
    state = torch.load(whole / "previous.pt", weights_only=True)
    torch.save({**state, "format": "revtrain checkpoint 1", "history": read_metrics(whole)[:2]}, tmp_path / "last.pt")
    content = (tmp_path / "last.pt").read_bytes()
    ran = command(*BASE, f"resume={tmp_path}")
    assert ran.code == 2 and "it is a 'revtrain checkpoint 1'" in ran.err and "train anew" in ran.err
    assert 2 <= len(ran.err.strip().splitlines()) <= 5 and (tmp_path / "last.pt").read_bytes() == content


# ---- hostile checkpoints -------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def sealed(content):
    return content + checkpoint.SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


@pytest.mark.parametrize("where", ["format", "config", "model", "optimizer", "rng", "partial"])
@pytest.mark.parametrize("written", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_never_run(command, two, where, written):
    """With a valid checksum, in both files, and reached through the command."""
    folder, _ = two
    proof = folder / "proof"
    state = {**read_checkpoint(folder), where: Malicious(proof)}
    buffer = io.BytesIO()
    if written == "pickle":
        pickle.dump(state, buffer)
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=written == "zip")
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(sealed(buffer.getvalue()))
    ran = command(*BASE, "epochs=3", f"resume={folder}")
    assert ran.code == 2 and "Traceback" not in ran.err and not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))  # elsewhere it would have run
    assert proof.exists()


STRANGE = [None, 3, -1, "text", [], [1], {}, {"a": 1}, torch.zeros(2), float("nan")]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[] if key in ("partial", "rng") else pytest.mark.slow)
        for key in sorted(checkpoint.TYPES)
    ],
)
def test_a_sealed_file_with_strange_contents_is_refused_or_used(two, key):
    """Whatever a key holds: RevtrainError, or a run; nothing else is raised."""
    folder, _ = two
    state = torch.load(folder / "previous.pt", weights_only=True)
    os.remove(folder / "previous.pt")
    refused = 0
    for number, value in enumerate(STRANGE):
        (folder / "strange").mkdir(exist_ok=True)
        checkpoint.save(folder / "strange/last.pt", {**state, key: value})
        try:
            run(folder / f"run{number}", f"resume={folder / 'strange/last.pt'}")
        except RevtrainError as error:
            refused += 1
            assert 2 <= len(str(error).splitlines()) <= 6
    assert refused >= 6


# ---- hostile images --------------------------------------------------------------------------------------------


def png(width, height, *chunks):
    """A PNG that claims a size; its pixels are missing, or in `chunks`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
HOSTILE = {
    "of 4 billion pixels a side.png": png(2**31 - 1, 2**31 - 1, (b"IDAT", b"")),
    "of 60000 x 60000.png": png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(10**6)))),
    "of 9000 x 9000 that holds nothing.png": png(9000, 9000, (b"IDAT", b"")),
    "of no pixels.png": png(0, 0, (b"IDAT", b"")),
    "with a text that unpacks to 20 MB.png": png(
        8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2 * 10**7))), (b"IDAT", b"")
    ),
    "of too few pixels.png": png(8, 8, (b"IDAT", zlib.compress(bytes(30)))),
    "with a wrong checksum.png": saved(NOISE, "PNG")[:-20] + bytes(8) + saved(NOISE, "PNG")[-12:],
    "cut after its header.jpg": saved(NOISE, "JPEG")[:180],
    "a gif cut.png": saved(NOISE, "GIF")[:60],
    "a bmp that claims to be large.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 10**9, 0, 0, 54, 40, 10**6, 10**6,
                                                            1, 24, 0, 0, 0, 0, 0, 0),
    "text.jpg": b"not an image\n" * 10,
    "a script.png": b"#!/bin/sh\ntouch proof\n",
    "html.png": b"<html><script>alert(1)</script></html>",
    "a checkpoint.png": b"PK\x03\x04" + bytes(200),
    "nothing.png": b"",
    "zeros.tif": b"II*\0" + bytes(100),
    "a loop of directories.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(proof) (w) file\n",
}  # fmt: skip


def image_folder(folder, side=8):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                shade = 40 * index + (100 if name == "dog" else 0)
                Image.new("RGB", (side, side), (shade, 0, 255)).save(folder / split / name / f"{index}.png")
    return folder


def of_folder(folder):
    words = ["data=imagefolder", f"data.root={folder}", f"data.cache={folder.parent / 'cache'}", "batch=4"]
    others = [word for word in TINY if not word.startswith("data")]  # of data=synthetic
    return [*others, *words, "data.augment.pad=2", "epochs=1", "probe.batch=2"]


def assert_refused(ran, *fragments):
    assert ran.code == 2, ran.err
    assert all(each in ran.err for each in fragments), ran.err
    assert "Traceback" not in ran.out + ran.err and 2 <= len(ran.err.strip().splitlines()) <= 5, ran.err


@pytest.mark.parametrize("size", ["null", "8"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "among others"])
def test_hostile_images_are_refused_by_name(command, tmp_path, first, size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (name, content) in enumerate(HOSTILE.items()):
        folder = image_folder(tmp_path / f"{number}")
        bad = folder / "train/cat" / ("0" * first + name)
        if first:
            (folder / "train/cat/0.png").unlink()
        bad.write_bytes(content)
        assert_refused(command(*of_folder(folder), f"data.image_size={size}"), str(folder))
        assert not (folder / "proof").exists() and not (tmp_path / "proof").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # kB: nothing was unpacked whole
    figures("hostile images", len(HOSTILE), len(HOSTILE))


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to itself", "socket"])
def test_what_is_no_file_in_an_image_folder_is_refused(command, tmp_path, kind):
    folder = image_folder(tmp_path / "images")
    bad = folder / "train/cat/odd.png"
    if kind == "pipe":
        os.mkfifo(bad)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as opened:
            os.chdir(bad.parent)  # the name of a socket may not be long
            opened.bind(bad.name)
            os.chdir(tmp_path)
    else:
        bad.symlink_to(bad if kind == "link to itself" else "absent")
    assert_refused(command(*of_folder(folder)), str(bad))


def test_images_that_would_not_fit_into_memory_are_refused(command, tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 10}.get(name, 1))
    assert_refused(command(*of_folder(folder)), "8 images of 8x8 pixels", "data.image_size=32")


# ---- two runs at once, and the clock ---------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path):
    words = [sys.executable, "-m", "revtrain", *BASE, "epochs=1", "probe.every=0"]
    both = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    results = list(tmp_path.glob("outputs/*/*/result.json"))
    assert len(results) == 2
    assert all(json.loads(each.read_text())["status"] == "completed" for each in results)


def test_a_folder_that_another_run_is_about_to_use_is_left_alone(command, tmp_path):
    """The other has not written anything yet; a job of a sweep holds the same lock."""
    (tmp_path / "here").mkdir()
    with files.claim(tmp_path / "here" / files.LOCK):
        ran = command(*BASE, "hydra.run.dir=here")
        assert ran.code == 2 and "another run is writing there right now" in ran.err
        assert not {each.name for each in (tmp_path / "here").iterdir()} - {".hydra", "train.log", files.LOCK}
    assert command(*BASE, "epochs=1", "hydra.run.dir=here").code == 0


@pytest.mark.parametrize("clock", ["stands still", "runs backwards", "jumps"])
def test_a_clock_that_jumps(command, monkeypatch, whole, clock):
    now = itertools.count()
    tick = {
        "stands still": lambda: 1e9,
        "runs backwards": lambda: 1e9 - next(now),
        "jumps": lambda: 1e9 + (-1) ** next(now) * 1e6,
    }[clock]
    with monkeypatch.context() as patch:
        for name in ("time", "perf_counter", "monotonic"):
            patch.setattr(time, name, tick)
        ran = command(*BASE)
    assert ran.code == 0, ran.err
    assert_same_run(whole, ran.dir)
    lines, result = read_metrics(ran.dir)[1:], ran.result
    assert all(line["train_seconds"] >= 0 and (line["images_per_second"] or 1) > 0 for line in lines)
    assert result["train_seconds"] >= 0
    if clock != "jumps":
        assert result["train_seconds"] == 0 and result["images_per_second"] is None
        assert "speed            not measured" in ran.out or "not measured" in ran.out


# ---- any configuration ---------------------------------------------------------------------------------------------

ODD = st.sampled_from(["null", "-1", "0", "1", "2", "3", "1.5", "nan", "-inf", "1e400", "true", "[]", "{}", "''", "x"])
HUGE = st.sampled_from([str(10**9), str(2**31), str(2**63), str(10**30)])
NEARBY = st.integers(-1, 24).map(str)
JUNK = st.text(max_size=8).filter(lambda text: "\0" not in text)


def mostly(usual, odd=ODD):
    """One value in ten is odd: with several keys, about half of the configurations run."""
    return st.integers(0, 9).flatmap(lambda dice: usual if dice else odd)


FLOAT = mostly(st.floats(0.001, 1).map(repr), st.one_of(st.floats().map(repr), ODD))


def whole_numbers(low, high, huge=HUGE):
    """`huge` is NEARBY where a huge number would only take a huge time."""
    return mostly(st.integers(low, high).map(str), st.one_of(ODD, huge))


def one_of(*choices):
    return mostly(st.sampled_from(choices), st.one_of(ODD, JUNK))


def listed(*choices):
    return st.lists(st.sampled_from(choices), max_size=4).map(lambda each: f"[{','.join(each)}]")


KEYS = {
    "arch": one_of(*for_task("classify")),
    "depth": whole_numbers(1, 6),
    "width": whole_numbers(1, 9),
    "slope": FLOAT,
    "epsilon_i": FLOAT,
    "pooling": mostly(listed(*POOLINGS), JUNK),
    "residual_scale": FLOAT,
    "zero_last": one_of("true", "false"),
    "stage_channels": listed("8", "10", "0"),
    "stream": one_of("auto", *STATE_FORMATS),
    "grid_bits": whole_numbers(1, 20),
    "activation": one_of("relu", "gelu", "silu", "leaky_relu"),
    "norm": one_of("input", "hidden"),
    "expansion": mostly(listed("2", "1", "0.5"), listed("0", "-1", "nan", "0.001")),
    "hidden_chunk": whole_numbers(1, 9),
    "backward": one_of(*BACKWARDS),
    "chunk_mib": FLOAT,
    "batch": st.one_of(whole_numbers(2, 20), st.just("auto")),
    "epochs": whole_numbers(1, 2, st.just("-1")),
    "lr": FLOAT,
    "momentum": FLOAT,
    "weight_decay": FLOAT,
    "decay_norm_and_bias": one_of("true", "false"),
    "label_smoothing": FLOAT,
    "schedule": one_of(*SCHEDULES),
    "warmup": FLOAT,
    "clip_grad_norm": FLOAT,
    "ema_decay": FLOAT,
    "test_flip": one_of("true", "false"),
    "precision": one_of(*PRECISIONS),
    "device": mostly(st.sampled_from(["cpu", "auto"]), st.one_of(st.just("cuda:99"), JUNK)),
    "memory_limit": one_of("1GiB", "10MiB", "0.1GB"),
    "plan": mostly(st.just("false"), st.just("true")),
    "seed": whole_numbers(0, 9),
    "resume": mostly(st.just("null"), st.sampled_from(["absent", "."])),
    "data.image_size": whole_numbers(16, 40, NEARBY),
    "data.classes": whole_numbers(10, 10),
    "data.train_limit": whole_numbers(10, 20),
    "data.test_limit": whole_numbers(1, 10),
    "data.train_images": whole_numbers(20, 25, NEARBY),
    "data.test_images": whole_numbers(10, 25, NEARBY),
    "data.seed": whole_numbers(0, 9),
    "data.augment.pad": whole_numbers(0, 8),
    "data.augment.cutout": whole_numbers(0, 40),
    "data.augment.flip": one_of("true", "false"),
    "data.augment.alternate_flip": one_of("true", "false"),
    "probe.batch": whole_numbers(2, 30),
    "probe.every": whole_numbers(0, 3),
}  # fmt: skip
PLAIN = (
    *TINY,
    "data.train_images=20",
    "data.test_images=10",
    "data.image_size=16",
    "batch=10",
    "epochs=1",
    "probe.batch=4",
)
CONFIGURATIONS = st.lists(
    st.sampled_from(sorted(KEYS)).flatmap(lambda key: KEYS[key].map(lambda value: f"{key}={value}")),
    min_size=1, max_size=6,
)  # fmt: skip


def try_configuration(command, folder, words, ends):
    ran = command(*PLAIN, *words)
    assert ran.code in (0, 2), (words, ran.err)
    assert "Traceback" not in ran.out + ran.err and "has a bug" not in ran.err, (words, ran.err)
    if ran.code == 2:
        assert 1 <= len(ran.err.strip().splitlines()) <= 6, (words, ran.err)
        ends.append("refused")
    else:
        ends.append(ran.result["status"])
        assert ran.result["status"] in ("completed", "planned"), words
    for each in ran.dirs:
        shutil.rmtree(each)


CLEAN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def test_16_random_configurations_run_or_are_refused(command, tmp_path):
    ends = []

    @settings(max_examples=16, derandomize=True, database=None, deadline=None, suppress_health_check=CLEAN)
    @given(CONFIGURATIONS)
    def check(words):
        try_configuration(command, tmp_path, words, ends)

    check()
    assert ends.count("completed") >= 3 and ends.count("refused") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_500_random_configurations_run_or_are_refused(command, tmp_path, part):
    """A hundred in each part; REVTRAIN_FUZZ_SEED=N tries others."""
    ends = []

    @seed(10 * int(os.environ.get("REVTRAIN_FUZZ_SEED", "0")) + part)
    @settings(max_examples=100, database=None, deadline=None, suppress_health_check=CLEAN)
    @given(CONFIGURATIONS)
    def check(words):
        try_configuration(command, tmp_path, words, ends)

    check()
    counts = {end: ends.count(end) for end in sorted(set(ends))}
    figures("random configurations", len(ends), len(ends), str(counts))
    assert len(ends) >= 100 and counts["completed"] >= 10 and counts["refused"] >= 10


@pytest.mark.parametrize("word", ["data.train_images=2000000000", "depth=1000000000", "width=10000000000"])
def test_huge_numbers_are_refused_at_once(command, word):
    assert_refused(command(*PLAIN, word), word.partition("=")[0])


# ---- long runs -------------------------------------------------------------------------------------------------


def long_run():
    """scripts/long_run.py as a module."""
    path = Path(__file__).parents[1] / "scripts" / "long_run.py"
    spec = importlib.util.spec_from_file_location("long_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_does_not_grow_with_the_epochs(tmp_path):
    """Its lines stay in metrics.jsonl; of the numbers in it only some have a digit more."""
    sizes = []
    for epochs in (1, 12):
        run(tmp_path / f"{epochs}", f"epochs={epochs}")
        sizes.append((tmp_path / f"{epochs}/last.pt").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 300 < (tmp_path / "12/metrics.jsonl").stat().st_size


def test_the_report_keeps_no_lines(tmp_path):
    """What a process holds of its epochs is sums and maxima, not the epochs."""
    report = revtrain.runs.writer.RunWriter(tmp_path, compose_plain(), [])
    report.start([])
    line = {key: None for key in revtrain.runs.writer.LINE_KEYS} | {"snr_db": {"minimum": 1.0, "layers": {}}}
    sizes = []
    for epoch in range(60):
        report.epoch({**line, "epoch": epoch, "train_seconds": 1.0, "train_images": 10, "accuracy_test": 0.5})
        sizes.append(len(pickle.dumps(report.result)) + len(vars(report)))
    report.finish("completed")
    assert sizes[-1] == sizes[-2] and report.lines == 60
    assert not [value for value in vars(report).values() if isinstance(value, list | tuple) and len(value) > 10]
    assert read_result(tmp_path)["train_seconds"] == 60.0


def compose_plain():
    return OmegaConf.to_container(compose(BASE), resolve=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_and_writing_over_300_epochs_are_flat(tmp_path):
    script = long_run()
    seen = script.measure(300, tmp_path / "run")
    memory = script.slope(seen, "resident_kib", 100)
    early = np.interp(150, seen["epoch"], seen["written_bytes"]) - np.interp(100, seen["epoch"], seen["written_bytes"])
    late = np.interp(299, seen["epoch"], seen["written_bytes"]) - np.interp(249, seen["epoch"], seen["written_bytes"])
    checkpoints = script.slope(seen, "last.pt", 100)
    remark = f"{memory:.2f} KiB of memory an epoch, {late / early:.3f} times the bytes written late as early"
    figures("runs of 300 epochs", 1, 1, remark)
    assert len(seen["epoch"]) > 150
    assert memory < 8 and late < 1.1 * early and checkpoints < 1
