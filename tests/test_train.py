"""The training loop: what it writes, that it repeats and resumes bit by bit, how it stops when it must."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_same_state, at_call, read_checkpoint, read_metrics, read_result
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import revtrain.data
import revtrain.models
import revtrain.numerics.snr
import revtrain.planning.predict
from revtrain.conf import compose
from revtrain.config import read
from revtrain.errors import RevtrainError
from revtrain.machine import device as devices
from revtrain.machine import files
from revtrain.optim import learning_rate, make_optimizer
from revtrain.planning.predict import predict_step_memory
from revtrain.runs.writer import LINE_KEYS
from revtrain.training import run as train
from revtrain.training.forecast import Forecast, in_words

HYBRID = (*TINY, "arch=hybrid", "depth=1", "width=8")


def run(folder, *overrides, base=TINY):
    """Train in `folder`; the result."""
    return train.train(compose([*base, *overrides]), folder, list(overrides))


# ---- what a run writes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    return run(folder, base=HYBRID), folder


def test_the_result_has_all_that_the_contract_names(hybrid):
    result, folder = hybrid
    assert result == read_result(folder)
    assert (result["status"], result["error"], result["arch"], result["epochs"]) == (
        "completed",
        None,
        "hybrid",
        2,
    )
    assert 0 <= result["test_accuracy"] <= result["best_test_accuracy"] <= 1
    assert result["train_seconds"] > 0 and result["images_per_second"] > 0
    assert result["peak_vram_mib"] is None
    model = revtrain.models.build_model(compose(HYBRID), 10, 32)
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["device"]["name"] == "cpu" and result["device"]["memory_mib"] > 0
    assert result["config"]["arch"] == "hybrid" and result["config"]["data"]["train_images"] == 52


def test_memory_is_that_of_the_device_independent_count(hybrid):
    result, _ = hybrid
    memory = predict_step_memory(compose(HYBRID), 10, 32, 16)
    assert result["bytes_per_pixel"] == memory.bytes_per_pixel
    assert result["memory_bytes"] == {
        "peak": memory.peak_bytes, "parameters": memory.parameter_bytes, "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes, "activations": memory.activation_bytes,
    }  # fmt: skip


def test_snr_is_measured_per_layer_before_and_after_each_epoch(hybrid):
    result, folder = hybrid
    lines = read_metrics(folder)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        snr = line["snr_db"]
        assert snr["minimum"] == min(snr["layers"].values()) == snr["layers"][snr["minimum_layer"]]
        assert 60 < snr["minimum"] < 320
    assert lines[0]["snr_db"] != lines[1]["snr_db"]
    assert result["snr_db"] == lines[2]["snr_db"]


def test_metrics_have_one_line_an_epoch_with_the_same_keys(hybrid):
    _, folder = hybrid
    first, *others = read_metrics(folder)
    assert all(tuple(line) == LINE_KEYS for line in (first, *others))
    assert all(first[key] is None for key in ("loss_train", "accuracy_test", "train_seconds"))
    # 52 images make 3 batches of 16; the last 4 images are left for another epoch
    assert [(line["step"], line["train_images"]) for line in others] == [(3, 48), (6, 48)]
    assert all(line["images_per_second"] == line["train_images"] / line["train_seconds"] for line in others)


def test_the_last_checkpoint_gives_the_reported_accuracy(hybrid):
    result, folder = hybrid
    cfg = compose(HYBRID)
    data = revtrain.data.load_data(read(cfg).data)
    model = revtrain.models.build_model(cfg, 10, 32)
    model.load_state_dict(read_checkpoint(folder)["model"])
    model.eval()
    with torch.no_grad():
        logits = model(revtrain.data.normalise(data.test.images, data.mean, data.std))
    assert len(data.test.labels) == 20  # not a multiple of the batch
    assert result["test_accuracy"] == (logits.argmax(1) == data.test.labels).sum().item() / 20
    loss = F.cross_entropy(logits, data.test.labels).item()
    assert read_metrics(folder)[-1]["loss_test"] == pytest.approx(loss, rel=1e-5)


def test_store_mode_has_no_snr(tmp_path):
    result = run(tmp_path, "backward=store", "epochs=1")
    assert result["snr_db"] is None
    assert all(line["snr_db"] is None for line in read_metrics(tmp_path))
    assert result["bytes_per_pixel"] > run(tmp_path / "invert", "epochs=1")["bytes_per_pixel"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_runs(tmp_path, precision):
    result = run(tmp_path, f"precision={precision}", "epochs=1")
    assert result["status"] == "completed"
    state = read_checkpoint(tmp_path)
    assert all(each.dtype != torch.float16 for each in state["model"].values())
    assert bool(state["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("arch", ["resnet18", "revnet", "irevnet"])
def test_the_other_architectures_run(tmp_path, arch):
    chosen = {"resnet18": ["depth=18", "pooling=[stride,stride,stride]"], "revnet": [], "irevnet": []}[arch]
    result = run(tmp_path, f"arch={arch}", "epochs=1", "data.train_images=32", *chosen)
    assert result["status"] == "completed" and result["arch"] == arch
    assert (result["snr_db"] is None) == (arch == "resnet18")


def test_training_learns(tmp_path):
    run(tmp_path, "epochs=12", "lr=0.1", "width=8", "probe.every=0", "data.augment.cutout=0")
    losses = [line["loss_train"] for line in read_metrics(tmp_path)[1:]]
    assert losses[-1] < 0.9 * losses[0]


# ---- the same numbers again --------------------------------------------------------------------------


def test_one_seed_gives_the_same_run_twice_and_another_seed_another(hybrid, tmp_path):
    _, first = hybrid
    run(tmp_path / "again", base=HYBRID)
    assert_same_state(read_checkpoint(first), read_checkpoint(tmp_path / "again"))
    run(tmp_path / "other", "seed=1", base=HYBRID)
    with pytest.raises(AssertionError):
        assert_same_state(read_checkpoint(first)["model"], read_checkpoint(tmp_path / "other")["model"])


def test_the_probe_does_not_change_the_training(tmp_path):
    run(tmp_path / "probed", "probe.every=1")
    run(tmp_path / "plain", "probe.every=0")
    one, other = read_checkpoint(tmp_path / "probed"), read_checkpoint(tmp_path / "plain")
    assert read_metrics(tmp_path / "probed")[1]["snr_db"] and not read_metrics(tmp_path / "plain")[1]["snr_db"]
    for key in ("model", "optimizer", "rng"):
        assert_same_state(one[key], other[key])


KILLED = """
import os, signal, sys
import revtrain.data
from revtrain.cli.train import main
draw, calls = revtrain.data.draw_augmentation, 0
def draw_then_die(*args):
    global calls
    calls += 1
    if calls == 5:  # the second step of the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
revtrain.data.draw_augmentation = draw_then_die
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_in_the_middle_of_an_epoch_then_resume_is_bit_equal(tmp_path):
    base = (*HYBRID, "epochs=3")
    run(tmp_path / "whole", base=base)
    killed = [sys.executable, "-c", KILLED, *base, f"hydra.run.dir={tmp_path / 'killed'}"]
    done = subprocess.run(killed, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_checkpoint(tmp_path / "killed")["epoch"] == 1
    assert read_result(tmp_path / "killed")["status"] == "running"

    run(tmp_path / "resumed", f"resume={tmp_path / 'killed'}", base=base)
    assert_same_state(read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "resumed"))
    one, other = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "resumed")
    assert_same_state(one, other)
    assert read_result(tmp_path / "resumed")["epochs"] == 3


@pytest.mark.parametrize(("call", "epoch"), [(2, 0), (5, 1)], ids=["first epoch", "second epoch"])
def test_ctrl_c_keeps_a_checkpoint_that_resumes_bit_equal(tmp_path, monkeypatch, call, epoch):
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_call(patch, "draw_augmentation", call, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    result = read_result(tmp_path / "stopped")
    assert (result["status"], result["error"], result["epochs"]) == ("interrupted", None, epoch)
    assert read_checkpoint(tmp_path / "stopped")["epoch"] == epoch
    before = (tmp_path / "stopped/last.pt").read_bytes()
    run(tmp_path / "resumed", f"resume={tmp_path / 'stopped'}")
    assert_same_state(read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "resumed"))
    assert (tmp_path / "stopped/last.pt").read_bytes() == before


def test_resuming_with_another_rate_is_allowed_and_told(hybrid, tmp_path, caplog):
    _, folder = hybrid
    with caplog.at_level(logging.WARNING):
        run(tmp_path, f"resume={folder}", "epochs=3", "lr=0.01", base=HYBRID)
    assert "no longer bit-equal" in caplog.text
    assert "lr: 0.05 in the checkpoint, 0.01 now" in caplog.text
    assert "epochs: 2 in the checkpoint, 3 now" in caplog.text
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["width=16"], "width=8; given now: width=16"),
        (["epochs=2"], "already completed its 2 epochs"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(hybrid, tmp_path, change, text):
    _, folder = hybrid
    with pytest.raises(RevtrainError, match=text):
        run(tmp_path, f"resume={folder}", *change, base=HYBRID)
    assert read_result(tmp_path)["status"] == "failed"
    assert not (tmp_path / "last.pt").exists()


def test_the_best_accuracy_is_kept_also_over_a_resume(tmp_path, monkeypatch):
    hits = iter([10, 5, 6])  # of 20 test images
    monkeypatch.setattr(train, "evaluate", lambda *args: (1.0, torch.tensor(next(hits))))
    run(tmp_path / "one")
    assert read_checkpoint(tmp_path / "one")["best_accuracy"] == 0.5
    result = run(tmp_path / "two", f"resume={tmp_path / 'one'}", "epochs=3")
    assert read_checkpoint(tmp_path / "two")["best_accuracy"] == 0.5
    assert (result["test_accuracy"], result["best_test_accuracy"]) == (0.3, 0.5)


def test_a_folder_that_holds_a_run_is_left_alone(hybrid):
    _, folder = hybrid
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RevtrainError, match="already holds a run; nothing of it was changed"):
        run(folder, base=HYBRID)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_batch_outlives_its_step(tmp_path, monkeypatch):
    """When a step draws its augmentation, the inputs of the step before are gone."""
    kept, alive = [], []
    augment, draw = revtrain.data.augment, revtrain.data.draw_augmentation

    def remember(*args):
        inputs = augment(*args)
        if not isinstance(inputs, FakeTensor):  # of a plan
            kept.append(weakref.ref(inputs))
        return inputs

    def look(*args):
        alive.append(sum(each() is not None for each in kept))
        return draw(*args)

    monkeypatch.setattr(revtrain.data, "augment", remember)
    monkeypatch.setattr(revtrain.data, "draw_augmentation", look)
    run(tmp_path, "epochs=1")
    assert alive == [0, 0, 0] and len(kept) == 3


# ---- how a run stops when it must ------------------------------------------------------------------------


class Breaking(nn.Module):
    """A small network whose output, or whose weights, break at a given training step."""

    def __init__(self, step, how):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 10)
        self.step, self.how, self.calls = step, how, 0

    def forward(self, images):
        logits = self.head(self.network(images))
        if self.training:
            self.calls += 1
            if self.calls == self.step:
                return self.how(self, logits)
        return logits


def breaking(monkeypatch, step, how):
    """Put `Breaking` in place of every architecture; the list of those built."""
    built = []

    def build(network, images):
        built.append(Breaking(step, how))
        return built[-1]

    memory = SimpleNamespace(timeline=None, peak_bytes=1000, parameter_bytes=1, gradient_bytes=1, optimizer_bytes=1,
                             activation_bytes=1, bytes_per_pixel=1.0, macs_per_image=1)  # fmt: skip
    monkeypatch.setattr(revtrain.models, "build", build)
    monkeypatch.setattr(revtrain.planning.predict, "predict_step_memory", lambda *args: memory)
    monkeypatch.setattr(revtrain.numerics.snr, "probe_snr", lambda *args: {})
    monkeypatch.setattr(revtrain.numerics.halves, "probe_halves", lambda *args: {})
    return built


def test_a_loss_that_turns_nan_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    breaking(monkeypatch, 5, lambda model, logits: logits * math.nan)
    with pytest.raises(RevtrainError) as caught:
        run(tmp_path, "epochs=4")
    message = str(caught.value)
    assert "the loss became nan at step 2 of epoch 2" in message
    assert "last.pt holds epoch 1" in message
    assert "lr=0.0125" in message and "backward=store" in message and "epsilon_i" in message
    assert read_result(tmp_path)["status"] == "failed" and read_result(tmp_path)["error"] == message
    state = read_checkpoint(tmp_path)
    assert state["epoch"] == 1 and all(torch.isfinite(each).all() for each in state["model"].values())


def test_a_nan_is_seen_before_a_long_epoch_ends(tmp_path, monkeypatch):
    built = breaking(monkeypatch, 2, lambda model, logits: logits * math.nan)
    with pytest.raises(RevtrainError, match=r"step 2 of epoch 1.\nlast.pt holds the start(.|\n)*precision=fp32"):
        run(tmp_path, "data.train_images=200", "batch=2", "precision=bf16")
    assert built[0].calls == train.CHECK_EVERY < 100


def test_weights_that_break_in_the_last_step_are_not_saved(tmp_path, monkeypatch):
    def break_weights(model, logits):
        with torch.no_grad():
            model.head.bias[0] = math.inf
        return logits.detach() * 0 + sum(p.sum() for p in model.network.parameters()) * 0

    breaking(monkeypatch, 3, break_weights)
    with pytest.raises(RevtrainError, match=r"head.bias was no longer finite at the end of epoch 1"):
        run(tmp_path)
    assert read_checkpoint(tmp_path)["epoch"] == 0


def test_out_of_memory_says_which_batch_would_fit(tmp_path, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def linear(cfg, classes, size, batch):  # 100 MiB of weights and 1 MiB an image
        return SimpleNamespace(peak_bytes=(100 + batch) * devices.MIB)

    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(4096, -1, -1, -1)
    split = revtrain.data.Split(images, torch.zeros(4096, dtype=torch.int64))
    large = revtrain.data.Dataset(split, split, tuple("0123456789"), torch.zeros(3), torch.ones(3))
    monkeypatch.setattr(revtrain.data, "load_data", lambda *args: large)
    monkeypatch.setattr(train, "Run", no_memory)
    monkeypatch.setattr(revtrain.planning.predict, "predict_step_memory", linear)
    monkeypatch.setattr(devices, "available_bytes", lambda device: 1024 * devices.MIB)
    with pytest.raises(RevtrainError) as caught:
        run(tmp_path / "some", "batch=2048", "backward=store")
    message = str(caught.value)
    assert "cpu is out of memory: arch=layerwise width=4 batch=2048 at 32x32" in message
    assert "needs about 2,148 MiB; 1,024 MiB are available" in message
    assert "batch=816." in message  # 0.9 * 1024 - 100 = 821, in steps of 8
    assert "backward=invert" in message
    assert 2 <= len(message.splitlines()) <= 5
    assert read_result(tmp_path / "some")["error"] == message

    with pytest.raises(RevtrainError, match=r"At batch=2048 would fit: arch=\w+ width=32 \(about"):
        run(tmp_path / "baseline", "batch=2048", "arch=resnet18", "depth=18", "pooling=[stride,stride,stride]")

    monkeypatch.setattr(devices, "available_bytes", lambda device: 101 * devices.MIB)
    with pytest.raises(RevtrainError, match="No batch fits"):
        run(tmp_path / "none")


def test_a_failed_allocation_on_the_cpu_is_out_of_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr(revtrain.data, "draw_augmentation", lambda *args: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(RevtrainError, match="cpu is out of memory"):
        run(tmp_path)


def test_a_bug_is_not_dressed_up(tmp_path, monkeypatch):
    breaking(monkeypatch, 2, lambda model, logits: logits[:, :, None] @ logits)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(tmp_path)
    assert read_result(tmp_path)["error"].startswith("RuntimeError: ")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    write, written = files.write_atomic, []

    def fills_up(path, content, **keep):
        written.append(path.name)
        if written.count("last.pt") > 2:  # the start, epoch 1, and no more
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, **keep)

    monkeypatch.setattr("revtrain.runs.checkpoint.write_atomic", fills_up)
    monkeypatch.setattr("revtrain.runs.writer.write_atomic", fills_up)
    with pytest.raises(RevtrainError) as caught:
        run(tmp_path, "epochs=3")
    message = str(caught.value)
    assert "The disk is full" in message and f"revtrain resume={tmp_path}" in message
    assert read_checkpoint(tmp_path)["epoch"] == 1


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RevtrainError, match=r"file/run: Not a directory.*\n.*hydra.run.dir=FOLDER"):
        run(tmp_path / "file/run")


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    with pytest.raises(RevtrainError, match=r"batch=53 was given; the training set has 52 images.\nUse batch=52"):
        run(tmp_path, "batch=53")


def test_an_absent_device_is_refused_with_those_present(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "present_devices", lambda: {"cpu": "a CPU", "cuda:0": "a GPU"})
    with pytest.raises(
        RevtrainError, match=r"device=cuda:1 was given; this machine has: cpu \(a CPU\), cuda:0 \(a GPU\)"
    ):
        run(tmp_path, "device=cuda:1")
    assert devices.choose_device("auto") == devices.choose_device("cuda") == torch.device("cuda:0")


# ---- how long it will take -----------------------------------------------------------------------------


def seconds_said(text):
    """ "3 min 40 s" -> 220."""
    return sum(int(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number, unit in re.findall(r"(\d+) (\w+)", text))


def test_a_run_says_in_its_first_epoch_how_long_it_will_take(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def said(*overrides):
        caplog.clear()
        run(tmp_path / f"{len(overrides)}", *overrides)
        lines = [each.getMessage() for each in caplog.records]
        (forecast,) = [each for each in lines if each.startswith("time ")]
        first_epoch = next(each for each in lines if each.startswith("epoch "))
        assert lines.index(forecast) < lines.index(first_epoch)
        form = r"time       about (.+) for ((?:the rest of )?\d+ epochs), evaluation and probes included"
        duration, what = re.fullmatch(form, forecast).groups()
        assert seconds_said(duration) > 0
        return what

    assert said() == "2 epochs"
    assert said("epochs=4", f"resume={tmp_path / '0'}") == "the rest of 4 epochs"


@pytest.fixture
def forecast(caplog):
    """Of 100 steps, evaluations worth 20, and 3 probes of 2 seconds: 126 seconds, where a step takes one."""
    caplog.set_level(logging.INFO)
    ahead = {"steps": 100, "evaluation_steps": 20.0, "probes": 3, "probe_steps": 4.0, "probe_seconds": 2.0}
    return lambda **other: Forecast(**ahead | {"what": "7 epochs"} | other)


def test_the_first_step_warms_up_and_is_not_counted(forecast, caplog):
    timed = forecast()
    timed.begin(0, 0.0)
    for step in range(1, 8):
        timed.mark(step, 50.0 + step)
        assert len(caplog.messages) == (step >= 5)
    assert caplog.messages == ["time       about 2 min 6 s for 7 epochs, evaluation and probes included"]


def test_on_a_gpu_only_steps_that_were_waited_for_count(forecast, caplog):
    timed = forecast()
    timed.begin(0, 0.0)
    timed.mark(20, 500.0)  # the first look: warming up included
    assert not caplog.messages
    timed.mark(40, 520.0)
    assert [seconds_said(each.partition(" for ")[0]) for each in caplog.messages] == [126]


def test_a_short_epoch_tells_at_its_end_and_one_without_steps_leaves_it_to_the_next(forecast, caplog):
    timed = forecast(probe_seconds=None)  # then a probe takes as long as four steps: 132 seconds
    timed.begin(3, 30.0)
    timed.mark(3, 30.0, last=True)
    assert not caplog.messages
    timed.begin(0, 0.0)
    timed.mark(1, 1.0)
    timed.mark(1, 1.0, last=True)
    assert [seconds_said(each.partition(" for ")[0]) for each in caplog.messages] == [132]


def test_one_process_alone_says_it(forecast, caplog):
    timed = forecast(silent=True)
    timed.begin(0, 0.0)
    timed.mark(9, 9.0, last=True)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (220, "3 min 40 s"), (7504, "2 h 5 min")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


# ---- optimizer and schedules ---------------------------------------------------------------------------


def schedule(name, steps=40, **changes):
    cfg = SimpleNamespace(schedule=name, lr=0.4, warmup=0.25, **changes)
    return [learning_rate(cfg, steps)(step) for step in range(steps)]


def test_triangular_rises_and_falls_in_straight_lines():
    rates = schedule("triangular")
    assert max(rates) == rates[9] == pytest.approx(0.4)
    assert rates[0] == pytest.approx(0.04) and rates[-1] == pytest.approx(0.4 / 31)
    for part in (rates[:10], rates[9:]):
        slopes = [b - a for a, b in pairwise(part)]
        assert slopes == pytest.approx([slopes[0]] * len(slopes))


def test_cosine_rises_straight_and_falls_in_half_a_wave():
    rates = schedule("cosine")
    assert rates[9] == pytest.approx(0.4) and rates[4] == pytest.approx(0.2)
    assert rates[9 + 31 // 2] > 0.2 > rates[10 + 31 // 2]
    assert 0 < rates[-1] < 0.004


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.3])
def test_onecycle_is_that_of_torch(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=37, pct_start=warmup, cycle_momentum=False)
    ours = learning_rate(SimpleNamespace(schedule="onecycle", lr=0.4, warmup=warmup), 37)
    for step in range(37):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < 36:
            theirs.step()


@pytest.mark.parametrize("name", ["triangular", "cosine", "onecycle", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_a_few_steps_stay_within_bounds(name, steps):
    for warmup in (0.0, 0.125, 0.9):
        cfg = SimpleNamespace(schedule=name, lr=0.4, warmup=warmup)
        assert all(0 < learning_rate(cfg, steps)(step) <= 0.4 + 1e-12 for step in range(steps))


@pytest.mark.parametrize("everything", [False, True])
def test_biases_and_norms_decay_only_on_request(everything):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    cfg = SimpleNamespace(lr=0.1, momentum=0.9, weight_decay=0.01, decay_norm_and_bias=everything, max_gain=None)
    decay = {id(p): group["weight_decay"] for group in make_optimizer(model, cfg).param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.01
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert decay[id(parameter)] == (0.01 if everything else 0.0)
    assert all(group["nesterov"] for group in make_optimizer(model, cfg).param_groups)


def test_options_of_the_loss_and_the_gradient_have_an_effect(tmp_path):
    base = (*TINY, "epochs=1", "probe.every=0", "data.train_images=32")
    run(tmp_path / "plain", base=base)
    plain = read_checkpoint(tmp_path / "plain")["model"]
    for option in (
        "clip_grad_norm=0.01",
        "label_smoothing=0.2",
        "schedule=constant",
        "data.augment.flip=false",
    ):
        folder = tmp_path / option
        run(folder, option, base=base)
        with pytest.raises(AssertionError):
            assert_same_state(plain, read_checkpoint(folder)["model"])
