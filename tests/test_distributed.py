"""Several processes compute what one does with the whole batch; one set of files; an error in one ends all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import ARCHS, ids
from conftest import TINY, read_checkpoint, read_metrics, read_result
from distributed_worker import CASES, losses, step

from revtrain.errors import RevtrainError
from revtrain.machine.processes import ALONE, Processes

TESTS = Path(__file__).parent


def start(words: list[str], folder: Path, processes: int = 2, only_second: tuple = ()) -> list[subprocess.Popen]:
    """`python WORDS` in several processes, as torchrun would start them; without its own start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *words, *(only_second if rank == 1 else ())],
            cwd=folder,
            env={**os.environ, **{k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def end(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none may hang."""
    try:
        said = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What two processes with half of the batch each computed, a dictionary for each process."""
    folder = tmp_path_factory.mktemp("steps")
    for code, _, err in end(start([str(TESTS / "distributed_worker.py"), str(folder / "step")], folder)):
        assert code == 0, err
    return [torch.load(folder / f"step.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_the_step_of_one(name, together):
    alone = step(name, ALONE)
    # 16 bit: the shares are rounded as the whole is, but sums of gradients are not
    rtol, atol = (0.1, 0.02) if "bf16" in name else (1e-7, 1e-9)
    for process in together:
        torch.testing.assert_close(process[name], alone, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_processes_stay_equal_to_the_bit(name, together):
    torch.testing.assert_close(together[0][name], together[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_twenty_steps_of_two_processes_have_the_losses_of_one(case, together):
    assert together[0][case.arch] == pytest.approx(losses(case, ALONE), rel=1e-6)


# ---- the command ---------------------------------------------------------------------------------


def run(folder: Path, *overrides: str, only_second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """`revtrain OVERRIDES` in two processes; `only_second` stands for what differs on another machine."""
    return start(["-m", "revtrain", *TINY, "hydra.run.dir=run", *overrides], folder, only_second=only_second)


def assert_same_losses(one: Path, other: Path, rtol: float) -> None:
    lines = zip(read_metrics(one), read_metrics(other), strict=True)
    for a, b in list(lines)[1:]:
        for key in ("loss_train", "loss_test"):
            assert a[key] == pytest.approx(b[key], rel=rtol), (a["epoch"], key)


def test_torchrun_trains_as_one_process_and_leaves_one_run(command, tmp_path):
    alone = command(*TINY)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "revtrain", *TINY]
    folder = tmp_path / "torchrun"
    folder.mkdir()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    (together,) = [each.parent for each in folder.glob("**/.hydra")]
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    kinds = ("last.pt", "metrics.jsonl", "result.json", "train.log", ".hydra")
    files = {path.name for path in together.iterdir()}
    assert files >= set(kinds) and len(files) == len(list(alone.dir.iterdir()))
    assert (together / "train.log").read_text().count("epoch 2/2") == 1
    assert_same_losses(alone.dir, together, 1e-4)
    one, two = alone.result, read_result(together)
    assert two["status"] == "completed" and two["test_accuracy"] == one["test_accuracy"]
    assert (one["device"]["processes"], two["device"]["processes"]) == (1, 2)
    assert two["config"]["batch"] == 16 and two["bytes_per_pixel"] == one["bytes_per_pixel"]
    assert two["snr_db"]["minimum"] == pytest.approx(one["snr_db"]["minimum"], abs=3)
    assert "processes: 2 in the checkpoint, 1 now" in command(*TINY, "epochs=3", f"resume={together}").out


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_is_bit_equal(tmp_path):
    constant = ("schedule=constant", "probe.every=0")
    for words in (
        ("epochs=2", "hydra.run.dir=whole"),
        ("epochs=1", "hydra.run.dir=half"),
        ("epochs=2", "hydra.run.dir=rest", "resume=half"),
        ("epochs=2", "hydra.run.dir=half", "resume=half"),  # in place
        ("epochs=2", "hydra.run.dir=half", "resume=half"),  # nothing is left to do
    ):
        for code, _, err in end(run(tmp_path, *constant, *words)):
            assert code == 0, err
    whole, rest, half = (read_checkpoint(tmp_path / name) for name in ("whole", "rest", "half"))
    for resumed in (rest, half):
        torch.testing.assert_close(resumed["model"], whole["model"], rtol=0, atol=0)
        torch.testing.assert_close(resumed["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)


# ---- one fails -----------------------------------------------------------------------------------


def test_an_error_in_the_second_process_is_told_by_the_first(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    (first, _, err), (second, *_) = end(run(tmp_path, only_second=("resume=last.pt",)))
    assert (first, second) == (2, 2)
    assert f"resume={tmp_path}/last.pt was given; the file is truncated" in err and "Traceback" not in err
    result = read_result(tmp_path / "run")
    assert result["status"] == "failed" and f"resume={tmp_path}/last.pt was given" in result["error"]


def when_it_trains(folder: Path, started: list[subprocess.Popen]) -> None:
    """Wait until the first epoch is complete."""
    while not (folder / "run" / "metrics.jsonl").exists() or len(read_metrics(folder / "run")) < 2:
        assert all(process.poll() is None for process in started), end(started)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path):
    started = run(tmp_path, "epochs=100000")
    when_it_trains(tmp_path, started)
    started[1].kill()
    (code, _, err), _ = end(started)
    assert code == 2 and "ended without a word" in err
    assert read_result(tmp_path / "run")["status"] == "failed"
    assert read_checkpoint(tmp_path / "run")["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_ctrl_c_in_any_process_interrupts_all(which, tmp_path):
    started = run(tmp_path, "epochs=100000")
    when_it_trains(tmp_path, started)
    for index in which:
        started[index].send_signal(signal.SIGINT)
    (code, _, err), (other, *_) = end(started)
    assert code == 130 and other in (2, 130)  # the first may be gone before the second can ask it
    assert "torchrun --nproc-per-node=2 -m revtrain" in err and "resume=" in err and "Traceback" not in err
    assert read_result(tmp_path / "run")["status"] == "interrupted"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def as_first_of_two(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


def test_a_batch_that_cannot_be_shared_is_refused(command, as_first_of_two):
    ran = command(*TINY, "batch=15")
    assert ran.code == 2
    assert "batch=15 was given to 2 processes" in ran.err and "batch=14 or batch=16" in ran.err


def test_a_sweep_under_torchrun_is_refused(command, as_first_of_two):
    ran = command("-m", *TINY, "depth=2,3")
    assert ran.code == 2 and "one torchrun takes one run" in ran.err and ran.dirs == []


def test_a_process_needs_two_images():
    assert Processes(0, 4).share(8) == 2 and Processes().share(1) == 1
    with pytest.raises(RevtrainError, match="Use batch=8 or batch=12"):
        Processes(0, 4).share(4)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Processes(rank, 4, local_rank=rank % 2).device_name("auto") for rank in range(4)] == [
        "cuda:0",
        "cuda:1",
    ] * 2
    assert Processes(1, 2, 1).device_name("cpu") == "cpu" and Processes().device_name("cuda:1") == "cuda:1"
    with pytest.raises(RevtrainError, match="has no GPU; there are 2"):
        Processes(2, 3, 2).device_name("cuda")
    with pytest.raises(RevtrainError, match="expected auto, cuda or cpu"):
        Processes(0, 2, 0).device_name("cuda:1")


# ---- twenty steps --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "revnet", "irevnet", "layerwise", "hybrid", "chunked"])
def test_twenty_steps_of_the_command_have_the_losses_of_one_process(arch, tmp_path):
    # One step an epoch, so that metrics.jsonl holds the loss of each step. At higher rates float32 training amplifies
    # any rounding, such as the order of the images of a batch, within twenty steps (docs/distributed.md).
    words = [
        "-m", "revtrain", f"arch={arch}", "width=8", "data=synthetic", "data.train_images=64", "data.test_images=32",
        "batch=64", "epochs=20", "lr=0.0005", "probe.every=0", "device=cpu",
    ]  # fmt: skip
    for processes in (1, 2):
        for code, _, err in end(start([*words, f"hydra.run.dir={processes}"], tmp_path, processes)):
            assert code == 0, err
    one, two = ([line["loss_train"] for line in read_metrics(tmp_path / name)[1:]] for name in ("1", "2"))
    assert len(one) == 20
    off = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
    print(f"{arch}: losses {one[0]:.4f} ... {one[-1]:.4f}, at most {off:.1e} off")
    assert off < 1e-4
