"""What somebody adds beside the package, touching nothing in it: an architecture, a data set, a layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LayerCase
from test_layers import (
    test_gradcheck_through_the_chain as check_gradients,
)
from test_layers import (
    test_lean_backward_equals_autograd as check_lean_backward,
)
from test_layers import (
    test_lean_forward_equals_the_plain_one as check_lean_forward,
)
from test_layers import (
    test_round_trip as check_round_trip,
)
from torch import Tensor

from revtrain import InvertibleLayer

TOY_MODEL = '''
"""Toy: one stage of coupling blocks with a single convolution each."""

from dataclasses import dataclass

from revtrain.config import CouplingSettings, key
from revtrain.models import Traits

TRAITS = Traits()


@dataclass
class Settings(CouplingSettings):
    kernel: int = key(3, "side of the kernels, in pixels", at_least=1)


def build(network, images):
    from torch import nn

    from revtrain.layers import AdditiveCoupling
    from revtrain.models.common import build_reversible, state_format

    own, stream = network.own, state_format(network)

    def block(channels, stage):
        half, padding = channels // 2, own.kernel // 2
        f, g = (nn.Conv2d(half, half, own.kernel, padding=padding, bias=False) for _ in range(2))
        return [AdditiveCoupling(channels, f, g, per_sample=True, scale=own.residual_scale, stream=stream)]

    return build_reversible(network, images, block, stream)
'''
TOY_ARCH_YAML = """
# @package _global_
arch: toy
depth: 2
width: 8
pooling: [channel]
residual_scale: 0.5
"""
TOY_DATA = '''
"""Stripes: an image is bright in every other row, or in every other column."""

from dataclasses import dataclass

from revtrain.config import key
from revtrain.data import Facts


@dataclass
class Settings:
    images: int = key(40, "how many images a split has", at_least=2)


def facts(cfg):
    return Facts(2, cfg.image_size or 8, cfg.own.images)


def load(cfg):
    import torch

    from revtrain.data import Split

    side = cfg.image_size or 8
    labels = torch.arange(cfg.own.images) % 2
    rows = (torch.arange(side) % 2 * 128).view(1, 1, side, 1).expand(cfg.own.images, 3, side, side)
    noise = torch.randint(128, rows.shape, generator=torch.Generator().manual_seed(0))
    images = (torch.where(labels.bool().view(-1, 1, 1, 1), rows, rows.transpose(2, 3)) + noise).to(torch.uint8)
    return Split(images, labels), Split(images, labels), ["rows", "columns"]
'''
TOY_DATA_YAML = "name: stripes\n"


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """A folder of somebody else's, with one .py and one .yaml for each of the two."""
    folder = tmp_path_factory.mktemp("somebody's own")
    for name, content in {
        "models/toy.py": TOY_MODEL,
        "conf/arch/toy.yaml": TOY_ARCH_YAML,
        "data/stripes.py": TOY_DATA,
        "conf/data/stripes.yaml": TOY_DATA_YAML,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.lstrip())
    return folder


REPORT = "import sys; from revtrain.cli.report import main; sys.exit(main(sys.argv[1:]))"


def run(beside: Path, cwd: Path, command: str, *words: str) -> str:
    environment = {**os.environ, "REVTRAIN_PATH": str(beside)}
    started = ["-c", REPORT] if command == "revtrain-report" else ["-m", command]
    done = subprocess.run(
        [sys.executable, *started, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SHORT = ("data=stripes", "batch=10", "epochs=2", "lr=0.02", "device=cpu", "probe.batch=8", "data.augment.pad=0",
         "data.augment.cutout=0")  # fmt: skip


def test_an_architecture_and_a_data_set_beside_the_package_train_are_planned_probed_swept_and_reported(
    beside, tmp_path
):
    help_text = run(beside, tmp_path, "revtrain", "--help")
    assert "toy" in help_text and "stripes" in help_text and "side of the kernels" in help_text

    run(beside, tmp_path, "revtrain", "arch=toy", "kernel=5", *SHORT, "hydra.run.dir=one")
    result = json.loads((tmp_path / "one/result.json").read_text())
    assert result["status"] == "completed" and result["arch"] == "toy" and result["config"]["kernel"] == 5
    assert "max_gain" not in result["config"], "a key that the architecture does not have"
    assert result["snr_db"]["minimum"] > 100, "it was probed"
    assert result["gradients"]["minimum_cosine"] > 0.99
    assert result["test_accuracy"] >= 0.5

    planned = run(beside, tmp_path, "revtrain", "arch=toy", *SHORT, "plan=true", "memory_limit=1MiB", "batch=auto")
    assert "plan: toy, width 8, depth 2" in planned and "largest batch" in planned
    small = run(beside, tmp_path, "revtrain", "arch=toy", *SHORT, "memory_limit=50MiB", "hydra.run.dir=limited")
    assert "plan" in small and json.loads((tmp_path / "limited/result.json").read_text())["plan"]["fits"]

    swept = run(beside, tmp_path, "revtrain", "-m", "arch=toy", "depth=1,2", *SHORT, "hydra.sweep.dir=sweep")
    assert "2 jobs in sweep" in swept
    report = run(beside, tmp_path, "revtrain-report", ".", "--markdown", "report.md")
    assert "toy" in report
    assert (tmp_path / "report.md").read_text().count("| toy |") >= 3


def test_what_lies_beside_the_package_is_refused_like_what_lies_within(beside, tmp_path):
    environment = {**os.environ, "REVTRAIN_PATH": str(beside)}
    for words, fragments in (
        (["arch=toy", "norm_sign=mixed"], ("norm_sign=mixed", "arch=toy", "kernel")),
        (["arch=toy", "kernel=0"], ("kernel=0", "at least 1")),
        (["arch=toy", "data=synthetic", "data.images=3"], ("data.images=3", "data=synthetic")),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "revtrain", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert all(fragment in done.stderr for fragment in fragments), done.stderr
        assert len(done.stderr.strip().splitlines()) <= 5


class Doubling(InvertibleLayer):
    """y = 2 x + b, b one number a channel; a layer needs no more than these two functions."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.bias

    def inverse(self, y: Tensor, saved=None) -> Tensor:
        return (y - self.bias) / 2


TOY_LAYER = LayerCase("doubling", lambda: Doubling(4))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_is_one_row_of_the_cases(training):
    torch.manual_seed(0)
    check_round_trip(TOY_LAYER, training, torch.float64)
    check_lean_forward(TOY_LAYER, training)
    check_lean_backward(TOY_LAYER, training, 2**21)
    check_gradients(TOY_LAYER)
