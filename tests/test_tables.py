"""Table 1 and 2: networks of equal size, what they cost, and the report in the paper's layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from cases import compose
from conftest import IN_A_MOMENT
from torch import nn

import revtrain.conf
from revtrain.cli.report import main as report
from revtrain.errors import RevtrainError
from revtrain.memory.macs import CountMacs
from revtrain.models import analytic_memory
from revtrain.planning.predict import predict_step_memory
from revtrain.report.group import Group
from revtrain.report.paper import Row
from revtrain.runs.read import Epoch, Run
from revtrain.training.run import train

CONF = Path(revtrain.conf.__file__).parent
SIZES = sorted(path.stem for path in CONF.glob("size/*.yaml"))
IN_TABLE_1 = compose("experiment=table1", "data.root=.").arch, "revnet", "irevnet", "layerwise", "hybrid", "chunked"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_equal_within_3_per_cent(size):
    parameters = {arch: analytic_memory(compose(f"arch={arch}", f"size={size}")).parameters for arch in IN_TABLE_1}
    assert len(parameters) == 6
    assert max(parameters.values()) / min(parameters.values()) < 1.03, parameters


def test_there_are_two_sizes_for_either_scale():
    assert SIZES == ["11m", "180k", "2500k", "700k"]


def test_a_size_of_an_architecture_without_one_is_refused():
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with pytest.raises((RevtrainError, OmegaConfBaseException, HydraException), match="equal_sizes"):
        revtrain.conf.of_arch("bottleneck", {"hybrid": 1})


def test_figure_13_over_depth_is_at_one_number_of_parameters():
    counts = [
        analytic_memory(compose("experiment=fig13_depth", "data.root=.", f"depth={depth}")).parameters
        for depth in (3, 6, 12)
    ]
    assert max(counts) <= 1.13 * min(counts)


def test_a_depth_without_a_width_is_refused_unless_one_is_given():
    with pytest.raises(RevtrainError, match=r"depth=5 .*\n?.*one of: 3, 6, 12"):
        revtrain.conf.of_depth(5, {3: 24, 6: 16, 12: 12})
    assert compose("experiment=fig13_depth", "data.root=.", "depth=5", "width=8").width == 8


def test_the_size_gives_way_to_the_command_line():
    cfg = compose("arch=hybrid", "size=700k", "width=8", "scale=small")
    assert (cfg.width, cfg.depth, cfg.epochs) == (8, 12, 3)


def test_the_solver_finds_what_the_yamls_hold(capsys):
    path = Path(__file__).parents[1] / "scripts/equal_sizes.py"
    spec = importlib.util.spec_from_file_location("equal_sizes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.read(compose("arch=hybrid")).network
    found = {(each.width, each.depth) for _, each in module.sizes(network, 180_550, 0.001, deepest=4)}
    assert found == {(12, 3)}


# ---- compute -----------------------------------------------------------------------------------------


def test_macs_of_a_convolution_and_a_linear_layer():
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    with CountMacs() as counter:
        conv(torch.randn(2, 3, 6, 6))
    assert counter.macs == 2 * 5 * 36 * 3 * 9
    with CountMacs() as counter:
        conv(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert counter.macs == 3 * 2 * 5 * 36 * 3 * 9, "forward, gradient of the input, gradient of the weights"
    with CountMacs() as counter:
        linear(torch.randn(4, 7))
    assert counter.macs == 4 * 7 * 11


def test_rebuilding_costs_the_passes_that_it_is_said_to_cost():
    """Forward and backward are three passes; RevNet, layer-wise and chunked make one more, hybrid one and a half."""
    passes = {}
    for arch in ("resnet18", "layerwise", "chunked", "hybrid"):
        macs = [
            predict_step_memory(compose(f"arch={arch}", "width=8", f"backward={mode}"), 10, 32, 8).macs_per_image
            for mode in ("invert", "store")
        ]
        passes[arch] = 3 * macs[0] / macs[1]
    assert passes["resnet18"] == 3
    assert passes["layerwise"] == pytest.approx(4, abs=0.1) == passes["chunked"]
    assert passes["hybrid"] == pytest.approx(4.5, abs=0.1)


def test_resnet18_has_the_macs_of_the_literature():
    """0.56 GMAC forward at 32x32; backward twice that, but for the gradient of the images."""
    macs = predict_step_memory(compose("arch=resnet18"), 10, 32, 2).macs_per_image
    assert macs == pytest.approx(3 * 0.5565e9, rel=0.005)


# ---- the report --------------------------------------------------------------------------------------


def test_the_report_has_the_papers_layout(tmp_path, capsys):
    for arch, mode, seed in (
        ("resnet18", "invert", 0), ("hybrid", "invert", 0), ("hybrid", "invert", 1), ("hybrid", "store", 0),
    ):  # fmt: skip
        keys = ("arch=" + arch, "size=180k", f"backward={mode}", f"seed={seed}", *IN_A_MOMENT)
        train(compose(*keys), tmp_path / f"{arch}-{mode}-{seed}")
    assert report([str(tmp_path), "--paper"]) == 0
    out = capsys.readouterr().out
    assert "About 178,476 parameters" in out
    head, _, *rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    columns = [name.strip() for name in head]
    cells = [dict(zip(columns, (cell.strip() for cell in row), strict=True)) for row in rows]
    assert [row["architecture"] for row in cells] == ["resnet18", "hybrid"], "the hungriest first, twins in its row"
    assert cells[0]["time"] == "1.00x" and cells[1]["time"].endswith("x")
    assert cells[1]["n"] == "2" and "±" in cells[1]["accuracy, %"] and cells[1]["stored, %"] != "-"
    assert cells[0]["stored, %"] == "-"
    assert float(cells[0]["bytes/px"]) > 2 * float(cells[1]["bytes/px"])
    large = analytic_memory(compose("arch=hybrid", "size=180k")).bytes_per_pixel
    assert float(cells[1]["bytes/px"]) == pytest.approx(large, abs=0.5), "not that of the run's 16 images"
    assert float(cells[0]["MiB at 512"]) == pytest.approx(512 * 1024 * 588 / 2**20, rel=0.1)


def test_time_is_that_of_the_fastest_epoch_of_all_runs():
    def run(epoch: Epoch) -> Run:
        return Run(Path(), "completed", None, {}, [epoch], 1, 0.0, images_per_second=10.0)

    def group(*epochs: Epoch) -> Group:
        return Group(1, "chunked", {}, "", [], [run(each) for each in epochs])

    def epoch(images: float | None, seconds: float | None) -> Epoch:
        return Epoch(1, train_images=images, train_seconds=seconds)

    slow, fast = group(epoch(100, 50), epoch(100, 2), epoch(None, None)), group(epoch(100, 1), epoch(100, 400))
    assert Row(slow, None, fast).relative_time == 2
    assert Row(group(epoch(None, None)), None, fast).relative_time == 10  # only the whole run's rate is known
