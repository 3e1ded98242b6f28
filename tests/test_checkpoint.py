"""last.pt: whole or not there, plain containers only, refused where it does not fit."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch
from torch import nn

from revtrain.conf import compose
from revtrain.config import Training, flat, read
from revtrain.errors import RevtrainError
from revtrain.machine.device import make_scaler
from revtrain.machine.files import write_atomic
from revtrain.optim import make_optimizer
from revtrain.runs import checkpoint

CPU = torch.device("cpu")


def parts(seed=0):
    """A network that has taken one step, with its optimizer, scaler and data generator."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
    optimizer = make_optimizer(model, Training(lr=0.1))
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer, make_scaler(CPU, "fp32"), torch.Generator().manual_seed(seed)


def state(epoch=1, classes=10, overrides=("batch=64",), **changes):
    config = flat(read(compose(["data=synthetic"]))) | changes
    return {
        "config": config,
        "overrides": list(overrides),
        "classes": classes,
        "data": {"classes": list(map(str, range(classes))), "image_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3},
        "images": 50,
        "processes": 1,
        "epoch": epoch,
        "partial": None,
        "best_accuracy": 0.5,
        "lines": 1,
        **checkpoint.capture(*parts(), CPU),
    }


def config(**changes):
    return state(**changes)["config"] | {"resume": "old/run"}


def test_what_is_saved_is_loaded_and_restored(tmp_path):
    saved = state()
    checkpoint.save(tmp_path / "last.pt", saved)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    for path in (tmp_path, tmp_path / "last.pt", str(tmp_path)):
        loaded = checkpoint.load(path)
        assert loaded["config"] == saved["config"] and loaded["history"] == [{"epoch": 1}]
    model, optimizer, scaler, generator = parts(seed=1)
    drawn = parts()[3]
    checkpoint.restore(loaded, model, optimizer, scaler, generator, CPU)
    for name, tensor in saved["model"].items():
        assert torch.equal(model.state_dict()[name], tensor)
    momentum = [each["momentum_buffer"] for each in optimizer.state_dict()["state"].values()]
    assert len(momentum) == 6
    for each, before in zip(momentum, saved["optimizer"]["state"].values(), strict=True):
        assert torch.equal(each, before["momentum_buffer"])
    assert torch.equal(torch.get_rng_state(), saved["rng"]["cpu"])
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=drawn))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    write_atomic(tmp_path / "last.pt", b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "last.pt", b"new")
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RevtrainError, match=r"last.pt was given; there is no such file.\n.*earlier run"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    checkpoint.save(tmp_path / "last.pt", state())
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RevtrainError, match="truncated, or no checkpoint at all"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_a_foreign_torch_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(RevtrainError, match="no checkpoint of this revtrain"):
        checkpoint.load(tmp_path / "other.pt")


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_checkpoint_of_another_version_is_refused_by_one_clear_message(tmp_path, version):
    torch.save({**state(), "format": f"revtrain checkpoint {version}"}, tmp_path / "last.pt")
    with pytest.raises(RevtrainError) as caught:
        checkpoint.load(tmp_path)
    message = str(caught.value)
    assert f"it is a 'revtrain checkpoint {version}'" in message and "expected 'revtrain checkpoint 3'" in message
    assert "Use the version that wrote it" in message and "train anew" in message
    assert 2 <= len(message.splitlines()) <= 5


@pytest.mark.parametrize("key", sorted(checkpoint.TYPES.keys() - checkpoint.LATER))
def test_a_checkpoint_without_one_of_its_parts_is_refused(tmp_path, key):
    saved = state()
    del saved[key]
    checkpoint.save(tmp_path / "last.pt", saved)
    with pytest.raises(RevtrainError, match=f"incomplete: {key} missing"):
        checkpoint.load(tmp_path)


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint\n" * 20)
    with pytest.raises(RevtrainError, match="no checkpoint at all"):
        checkpoint.load(tmp_path / "notes.txt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_file_is_never_run(tmp_path, save):
    save({"format": checkpoint.FORMAT, "model": Malicious(str(tmp_path / "proof"))}, tmp_path / "last.pt")
    with pytest.raises(RevtrainError):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"arch": "revnet"}, ("arch=hybrid", "arch=revnet")),
        ({"depth": 9}, ("depth=6", "depth=9")),
        ({"width": 48}, ("width=32", "width=48")),
        ({"pooling": ["batch"]}, ("pooling=[channel,channel]", "pooling=[batch]")),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(change, both):
    with pytest.raises(RevtrainError) as caught:
        checkpoint.check_compatible(state(), config(**change), classes=10)
    message = str(caught.value)
    assert all(each in message for each in both)
    assert "revtrain resume=old/run" in message
    assert len(message.splitlines()) <= 5


def test_another_number_of_classes_is_refused():
    with pytest.raises(RevtrainError, match=r"data classes=10; given now: data classes=100"):
        checkpoint.check_compatible(state(), config(), classes=100)


def test_a_completed_run_is_not_resumed():
    with pytest.raises(RevtrainError, match=r"completed its 40 epochs; epochs=40 was given.\n.*epochs=80"):
        checkpoint.check_compatible(state(epoch=40), config(), classes=10)


def test_other_differences_are_told_and_free_ones_are_not():
    now = config(lr=0.1, experiment="something")
    now["data"] = now["data"] | {"cache": "/elsewhere", "seed": 3}
    differences = checkpoint.check_compatible(state(), now, classes=10)
    assert sorted(differences) == [
        "data.seed: 0 in the checkpoint, 3 now",
        "lr: 0.4 in the checkpoint, 0.1 now",
    ]


def test_weights_that_do_not_fit_are_refused():
    saved = state()
    del saved["model"]["0.weight"]
    model, *others = parts()
    with pytest.raises(RevtrainError, match="do not fit this network"):
        checkpoint.restore(saved, model, *others, CPU)


def test_the_command_that_continues_quotes_what_hydra_and_a_shell_would_split():
    assert checkpoint.command("a/new") == "revtrain resume=a/new"
    assert checkpoint.command("/a b") == """revtrain 'resume='"'"'/a b'"'"''"""
