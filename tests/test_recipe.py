"""The recipe of training: flips that alternate, an average of the weights, flip averaging, convolutions from zero."""

from __future__ import annotations

import pytest
import torch
from cases import compose
from conftest import TINY, assert_same_state, read_checkpoint, read_metrics, read_result
from torch import nn

import revtrain.data
import revtrain.training.run
from revtrain.cli.report import main as report
from revtrain.config import own_keys, read
from revtrain.layers import AdditiveCoupling, CouplingConv2d
from revtrain.layers.bounded import BoundedConv2d
from revtrain.models import Images, analytic_memory, build, build_model
from revtrain.planning.plan import plan
from revtrain.training.evaluate import MirrorAveraged
from revtrain.training.run import train
from revtrain.training.step import Step

CPU = torch.device("cpu")
KEYS = ("ema_decay=0.6", "test_flip=true", "data.augment.alternate_flip=true", "probe.every=0")


def run(folder, *overrides):
    return train(compose(*TINY, *overrides), folder)


def step_of(*words):
    config = read(compose(*TINY, *words))
    dataset = revtrain.data.load_data(config.data)
    torch.manual_seed(0)
    model = build(config.network, Images(len(dataset.classes), dataset.image_size))
    return Step(model.train(), config, 16, dataset, CPU)


# ---- flips -------------------------------------------------------------------------------------------


def test_every_second_epoch_mirrors_the_other_half_of_the_images():
    step, plain, flips = step_of("data.augment.alternate_flip=true"), step_of(), []
    picked = torch.arange(16)
    for epoch in (1, 2, 3):
        step.epoch = epoch
        step(picked, 0.01)
        plain(picked, 0.01)
        flips.append(step.choices[:, 3].bool().clone())
        others = [0, 1, 2, 4, 5]
        assert torch.equal(step.choices[:, others], plain.choices[:, others]), "what else is drawn stays as it was"
    assert torch.equal(flips[0], ~flips[1]) and torch.equal(flips[0], flips[2])
    assert 0 < flips[0].sum() < 16
    again = step_of("data.augment.alternate_flip=true")
    again(picked.flip(0), 0.01)
    assert torch.equal(again.choices[:, 3].bool(), flips[0].flip(0)), "it is the image that counts, not its place"
    never = step_of("data.augment.alternate_flip=true", "data.augment.flip=false")
    never(picked, 0.01)
    assert not never.choices[:, 3].any()


def test_the_epoch_of_a_run_decides_on_the_flips(tmp_path, monkeypatch):
    seen, call = [], Step.__call__

    def noted(self, picked, *args):
        found = call(self, picked, *args)
        seen.append((self.epoch, dict(zip(picked.tolist(), self.choices[:, 3].tolist(), strict=True))))
        return found

    monkeypatch.setattr(Step, "__call__", noted)
    run(tmp_path, *KEYS)
    first, second = ({k: v for epoch, flips in seen if epoch == number for k, v in flips.items()} for number in (1, 2))
    both = first.keys() & second.keys()
    assert len(both) > 40 and all(first[image] != second[image] for image in both)


def test_flip_averaging_takes_the_mean_of_both_logits():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)), torch.randn(2, 3, 4, 4)
    mirrored = torch.stack([images[..., 3 - column] for column in range(4)], dim=3)
    torch.testing.assert_close(MirrorAveraged(model)(images), (model(images) + model(mirrored)) / 2)


# ---- the average of the weights ----------------------------------------------------------------------


def test_the_average_is_even_at_first_and_then_exponential():
    step, decay, history = step_of("ema_decay=0.7", "arch=hybrid", "width=8"), 0.7, []
    for number in range(6):
        step(torch.arange(16) + number, 0.05)
        history.append({name: each.clone() for name, each in step.model.state_dict().items()})
    for name, mean in step.average.means.items():
        expected = history[0][name]
        for number, state in enumerate(history[1:], start=2):
            share = max(1 - decay, 1 / number)
            expected = (1 - share) * expected + share * state[name]
        torch.testing.assert_close(mean, expected, msg=name)
    averaged = step.average.means.keys()
    assert any("running_var" in name for name in averaged), "statistics of BNs go with the weights that made them"
    assert not any("num_batches" in name for name in averaged) and any("weight" in name for name in averaged)


def test_the_network_gets_its_own_weights_back_to_the_bit():
    step = step_of("ema_decay=0.5")
    for number in range(3):
        step(torch.arange(16) + number, 0.05)
    before, means = ({k: v.clone() for k, v in each.items()} for each in (step.model.state_dict(), step.average.means))
    with pytest.raises(KeyboardInterrupt), step.average.in_place():
        inside = step.model.state_dict()
        assert all(torch.equal(inside[name], mean) for name, mean in means.items())
        assert any(not torch.equal(inside[name], before[name]) for name in means)
        raise KeyboardInterrupt
    assert_same_state(step.model.state_dict(), before)
    assert_same_state(dict(step.average.means), means)


def test_what_is_tested_apart_changes_nothing_else(tmp_path):
    run(tmp_path / "plain", "probe.every=0")
    run(tmp_path / "apart", "ema_decay=0.6", "test_flip=true", "probe.every=0")
    plain, apart = (read_checkpoint(tmp_path / name) for name in ("plain", "apart"))
    assert_same_state(plain["model"], apart["model"])
    assert plain["average"] is None and apart["average"]["steps"] == 6
    lines = [read_metrics(tmp_path / name) for name in ("plain", "apart")]
    assert [line["accuracy_test"] for line in lines[0]] == [line["accuracy_test"] for line in lines[1]]
    result, last = read_result(tmp_path / "apart"), lines[1][-1]
    for name in ("flip", "ema"):
        assert 0 <= result[f"test_accuracy_{name}"] == last[f"accuracy_test_{name}"] <= 1
        assert read_result(tmp_path / "plain")[f"test_accuracy_{name}"] is None


def test_the_accuracy_of_the_average_is_that_of_its_weights(tmp_path, monkeypatch):
    tested, evaluate = [], revtrain.training.run.evaluate

    def noted(model, *args):
        tested.append({name: each.clone() for name, each in model.state_dict().items()})
        return evaluate(model, *args)

    monkeypatch.setattr(revtrain.training.run, "evaluate", noted)
    run(tmp_path, "epochs=1", "ema_decay=0.6", "probe.every=0")
    raw, averaged = tested
    saved = read_checkpoint(tmp_path)
    assert_same_state(raw, saved["model"])
    assert_same_state({name: averaged[name] for name in saved["average"]["means"]}, saved["average"]["means"])


@pytest.mark.parametrize("where", ["within the second epoch", "while the average is tested"])
def test_a_resumed_run_is_the_same(tmp_path, monkeypatch, where):
    run(tmp_path / "whole", *KEYS)
    stopped, owner = tmp_path / "stopped", revtrain.training.run.Run
    step, tested = owner.step, owner.tested

    def interrupted_step(self, progress, index):
        if self.epoch == 2 and index == 1:
            raise KeyboardInterrupt
        step(self, progress, index)

    def interrupted_test(self, *args):
        if self.epoch == 2 and torch.equal(
            next(self.model.parameters()), next(iter(self.trainer.average.own.values()))
        ):
            raise KeyboardInterrupt
        return tested(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where.startswith("within"):
            patched.setattr(owner, "step", interrupted_step)
        else:
            patched.setattr(owner, "tested", interrupted_test)
        run(stopped, *KEYS)
    run(tmp_path / "resumed", f"resume={stopped}", *KEYS)
    whole, resumed = (read_checkpoint(tmp_path / name) for name in ("whole", "resumed"))
    for part in ("model", "optimizer", "average", "rng"):
        assert_same_state(whole[part], resumed[part])


def test_a_run_of_before_goes_on_with_an_average_that_begins_anew(tmp_path):
    run(tmp_path / "before", "epochs=1", "probe.every=0")
    run(tmp_path / "after", f"resume={tmp_path / 'before'}", "ema_decay=0.6", "probe.every=0")
    assert read_checkpoint(tmp_path / "after")["average"]["steps"] == 3


def test_the_plan_counts_the_average():
    words = ("arch=hybrid", "width=16", "batch=32", "device=cpu")
    without, with_average = plan(compose(*words)), plan(compose(*words, "ema_decay=0.9"))
    assert without.optimizer_bytes == 4 * without.parameters
    floats = sum(
        4 * each.numel() for each in build_model(compose(*words)).state_dict().values() if each.is_floating_point()
    )
    assert with_average.optimizer_bytes == without.optimizer_bytes + floats + 4, "and its share, a number"
    assert with_average.peak_bytes == without.peak_bytes + floats + 4
    closed = (analytic_memory(compose(*words, *more)).fixed_of("optimizer") for more in ((), ("ema_decay=0.9",)))
    assert -next(closed) + next(closed) == pytest.approx(floats, rel=0.01)


# ---- the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(own_keys("models")["zero_last"]))
def test_blocks_of_ordinary_functions_start_as_the_identity(arch):
    shape = (
        () if arch == "hybrid" else ("depth=4", "pooling=[]") if arch != "revnet" else ("depth=4", "pooling=[stride]")
    )
    words = (f"arch={arch}", "width=8", "stream=plain", *shape)
    torch.manual_seed(0)
    zero, usual = (build_model(compose(*words, f"zero_last={value}")) for value in ("true", "false"))
    kind = CouplingConv2d if arch == "hybrid" else AdditiveCoupling
    for model, starts_as_identity in ((zero, True), (usual, False)):
        blocks = [each for each in model.modules() if type(each) is kind]
        if arch == "hybrid":  # F hands on what it is given: its last coupling convolution alone is the identity
            blocks = blocks[1::2]
        for block in blocks:
            x = torch.randn(4, block.channels, 4, 4)
            assert torch.equal(block(x), x) == starts_as_identity


def test_a_bound_on_weights_that_start_at_zero_holds_later():
    torch.manual_seed(0)
    conv = BoundedConv2d(3, max_gain=0.5)
    with torch.no_grad():
        conv.weight.zero_()
        conv.constrain_()
        conv.weight.normal_()
    conv.constrain_(20)
    assert (conv(conv.direction).norm() / conv.direction.norm()).item() == pytest.approx(0.5, rel=0.01)


# ---- the report --------------------------------------------------------------------------------------


def test_the_report_shows_what_was_tested_apart_where_it_was(tmp_path, capsys):
    run(tmp_path / "plain", "epochs=1", "probe.every=0")
    assert report([str(tmp_path)]) == 0 and "averaged, %" not in capsys.readouterr().out
    run(tmp_path / "apart", "epochs=1", *KEYS)
    assert report([str(tmp_path), "--csv", str(tmp_path / "a.csv")]) == 0
    out = capsys.readouterr().out
    assert "averaged, %" in out and "with flips, %" in out
    assert "test_accuracy_flip,test_accuracy_ema" in (tmp_path / "a.csv").read_text().splitlines()[0]
