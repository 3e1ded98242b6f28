"""Gradient accumulation (`accumulate=K`) and runs that end at an accuracy (`target_accuracy`)."""

from __future__ import annotations

import pytest
import torch
from cases import compose
from conftest import TINY, assert_same_state, read_checkpoint, read_metrics, read_result

import revtrain.training.run
from revtrain.errors import RevtrainError
from revtrain.planning.plan import plan
from revtrain.planning.predict import predict_step_memory
from revtrain.training.run import train


def run(folder, *overrides):
    return train(compose(*TINY, *overrides), folder)


# without batch norm micro-batches give what the whole batch does
WITHOUT_NORM = ("arch=resnet18", "width=4", "depth=18", "pooling=[stride,stride,stride]", "probe.every=0")
IN_RESNET = [each for each in TINY if not each.startswith(("arch", "depth", "width", "pooling"))]


def test_micro_batches_average_to_the_gradient_of_the_batch(tmp_path, monkeypatch):
    """In a network whose norms do nothing; the schedule, the order and the augmentation are those of accumulate=1."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x * 0.5)
    found = []
    for count in (1, 4):
        folder = tmp_path / str(count)
        train(compose(*IN_RESNET, *WITHOUT_NORM, f"accumulate={count}", "epochs=1"), folder)
        found.append((read_checkpoint(folder), read_metrics(folder)[-1], read_result(folder)))
    (whole, line, result), (parts, line_of_parts, result_of_parts) = found
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert line_of_parts["loss_train"] == pytest.approx(line["loss_train"], rel=1e-4)
    assert line_of_parts["accuracy_train"] == line["accuracy_train"]
    assert (line_of_parts["step"], line_of_parts["lr"]) == (line["step"], line["lr"]) == (3, line["lr"])
    assert result_of_parts["bytes_per_pixel"] < 0.3 * result["bytes_per_pixel"]


def test_batch_norms_see_micro_batches_one_by_one(tmp_path, monkeypatch):
    seen, forward = [], torch.nn.BatchNorm2d.forward

    def count(self, x):
        if type(x) is torch.Tensor and self.training:  # those of the prediction are fake
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", count)
    train(compose(*IN_RESNET, *WITHOUT_NORM, "accumulate=2", "epochs=1", "data.test_images=20"), tmp_path)
    assert seen == [8] * (3 * 2 * 20), "three steps of two micro-batches through twenty norms"


def test_a_resumed_run_with_micro_batches_is_the_same(tmp_path, monkeypatch):
    keys = ("accumulate=2", "probe.every=0")
    run(tmp_path / "whole", *keys)
    stopped = tmp_path / "stopped"
    step = revtrain.training.run.Run.step

    def interrupted(self, progress, index):
        if self.epoch == 2:
            raise KeyboardInterrupt
        step(self, progress, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(revtrain.training.run.Run, "step", interrupted)
        run(stopped, *keys)
    run(tmp_path / "resumed", *keys, f"resume={stopped}")
    assert_same_state(read_checkpoint(tmp_path / "whole")["model"], read_checkpoint(tmp_path / "resumed")["model"])


def test_the_plan_counts_one_micro_batch_and_the_gradients_of_those_before():
    keys = ("arch=resnet18", "width=16", "batch=64")
    whole, parts, small = (
        predict_step_memory(compose(*keys, *more), 10, 32, batch)
        for more, batch in (((), 64), (("accumulate=4",), 64), ((), 16))
    )
    assert parts.bytes_per_pixel == pytest.approx(whole.bytes_per_pixel / 4, rel=0.02)
    grown = parts.peak_bytes - small.peak_bytes - 48 * (64 - 16)  # the choices of all micro-batches are there
    assert 0.5 * small.gradient_bytes < grown <= small.gradient_bytes, "gradients are there from the start"
    assert parts.parameter_bytes == whole.parameter_bytes and parts.optimizer_bytes == whole.optimizer_bytes


def test_the_largest_batch_grows_with_the_micro_batches():
    keys = ("arch=resnet18", "width=16", "batch=auto", "memory_limit=64MiB", "data=synthetic", "device=cpu")
    one, four = (plan(compose(*keys, f"accumulate={count}")) for count in (1, 4))
    assert four.batch % 4 == 0
    assert 3.5 * one.batch < four.batch <= 4 * one.batch
    assert four.fits and "in 4 micro-batches" in four.table()


@pytest.mark.parametrize(("batch", "count", "remedy"), [(16, 3, "batch=15"), (3, 4, "batch=4"), (10, 4, "batch=8")])
def test_a_batch_that_cannot_be_cut_is_refused(batch, count, remedy, tmp_path):
    with pytest.raises(RevtrainError) as caught:
        run(tmp_path, f"batch={batch}", f"accumulate={count}")
    assert f"accumulate={count} was given with batch={batch}" in str(caught.value)
    assert remedy in str(caught.value)


# ---- target_accuracy ---------------------------------------------------------------------------------


def test_a_run_ends_when_it_has_reached_its_target(tmp_path, monkeypatch):
    hits = iter([4, 12, 18, 19])  # of 20 test images
    monkeypatch.setattr(revtrain.training.run, "evaluate", lambda *args: (1.0, torch.tensor(next(hits))))
    run(tmp_path / "run", "epochs=4", "target_accuracy=0.9", "probe.every=0")
    result, lines = read_result(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert result["status"] == "completed" and result["epochs"] == 3 == len(lines) - 1
    reached = result["target_reached"]
    assert (reached["accuracy"], reached["epoch"], reached["train_images"]) == (0.9, 3, 3 * 48)
    assert reached["train_seconds"] == pytest.approx(sum(line["train_seconds"] for line in lines[1:]))
    monkeypatch.setattr(revtrain.training.run, "evaluate", lambda *args: (1.0, torch.tensor(2)))
    run(tmp_path / "again", "epochs=4", "target_accuracy=0.9", "probe.every=0", f"resume={tmp_path / 'run'}")
    assert read_result(tmp_path / "again")["target_reached"] == reached, "resumed, it has nothing left to do"


def test_a_target_that_is_not_reached_is_null(tmp_path):
    run(tmp_path, "epochs=1", "target_accuracy=0.999", "probe.every=0")
    result = read_result(tmp_path)
    assert result["status"] == "completed" and result["target_reached"] is None
    assert result["config"]["target_accuracy"] == 0.999
