"""Images that are no squares: planned, trained on, evaluated and exported as squares are."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import compose
from conftest import IN_A_MOMENT

from revtrain.cli.inference import evaluate_main, export_main
from revtrain.config import AugmentConfig, ImageSize, read
from revtrain.data import draw_augmentation
from revtrain.errors import RevtrainError
from revtrain.models import analytic_memory, build_model, for_task
from revtrain.planning.plan import make_plan
from revtrain.planning.predict import StepPredictor
from revtrain.runs import checkpoint
from revtrain.training.run import train

SMALL = ("width=8", "chunk_mib=0.25")
CPU = torch.device("cpu")


def test_a_size_is_a_side_or_height_and_width():
    assert ImageSize.of(32) == (32, 32) == ImageSize.of([32, 32]) and ImageSize.of(32).plain == 32
    assert str(ImageSize.of([16, 64])) == "16x64" and ImageSize.of((16, 64)).plain == [16, 64]
    assert ImageSize.of([16, 64]).pixels == ImageSize.of(32).pixels == 1024


@pytest.mark.parametrize("arch", for_task("classify"))
def test_the_closed_form_counts_pixels_whatever_their_form(arch):
    cfg = compose(f"arch={arch}", *SMALL, "depth=18" if arch == "resnet18" else "depth=3")
    assert analytic_memory(cfg, 10, [16, 64]).peak_bytes(512, [16, 64]) == analytic_memory(cfg).peak_bytes(512, 32)
    counted = StepPredictor(cfg, 10, [16, 64])(512)
    assert analytic_memory(cfg).peak_bytes(512, 32) == pytest.approx(counted.peak, rel=0.01)


@pytest.mark.parametrize("arch", ["chunked", "hybrid", "resnet18", "revnet"])
@pytest.mark.parametrize("size", [[16, 48], [48, 16]])
def test_rebuilt_gradients_are_the_stored_ones(arch, size):
    results = []
    for mode in ("invert", "store"):
        torch.manual_seed(0)
        cfg = compose(f"arch={arch}", *SMALL, f"backward={mode}", "depth=18" if arch == "resnet18" else "depth=3")
        model = build_model(cfg, 10, size).double().train()
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        results.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_a_plan_is_that_of_a_square_of_as_many_pixels():
    cfg = read(compose("arch=chunked", *SMALL, "batch=64", "data=synthetic", "data.image_size=[16,64]"))
    square = read(compose("arch=chunked", *SMALL, "batch=64", "data=synthetic"))
    plan, other = make_plan(cfg, CPU), make_plan(square, CPU)
    assert plan.image_size == (16, 64) and plan.peak_bytes == pytest.approx(other.peak_bytes, rel=0.01)
    assert "batch 64 of 16x64" in plan.table() and "batch 64 of 32x32" in other.table()
    assert json.loads(json.dumps(plan.as_dict()))["image_size"] == [16, 64]
    assert other.as_dict()["image_size"] == 32


@pytest.mark.parametrize(
    "word",
    ["[32]", "[32,32,32]", "[32,0]", "[-4,8]", "[a,b]", "[32.5,32]", "[true,true]", "{a:1}", "wide", "[32,null]"],
)
def test_what_is_no_size_is_refused(word):
    with pytest.raises(RevtrainError, match=r"data\.image_size=.* was given; expected a whole number"):
        read(compose("data=synthetic", f"data.image_size={word}"))


@pytest.mark.parametrize(("size", "remedy"), [([16, 42], r"\[16,40\]"), ([42, 42], "40"), ([2, 16], r"\[4,16\]")])
def test_sides_that_pooling_cannot_halve_are_refused_with_some_that_it_can(size, remedy):
    with pytest.raises(RevtrainError, match=f"Images of {size[0]}x{size[1]} pixels.*\n.*data.image_size={remedy} "):
        build_model(compose("arch=chunked", "width=8"), 10, size)


def test_cutouts_are_centred_in_the_image_and_those_of_squares_are_as_ever():
    cfg = AugmentConfig()
    square, same, wide = (
        draw_augmentation(2000, size, cfg, torch.Generator().manual_seed(0)) for size in (32, [32, 32], [16, 64])
    )
    assert torch.equal(square.centres, same.centres) and torch.equal(square.offsets, wide.offsets)
    assert wide.centres.amin(0).tolist() == [0, 0] and wide.centres.amax(0).tolist() == [15, 63]
    with pytest.raises(RevtrainError, match="pad=16 does not fit images of 16x64"):
        draw_augmentation(2, [16, 64], AugmentConfig(pad=16), torch.Generator())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["arch=chunked", "width=8", "depth=3", *IN_A_MOMENT, "probe.every=1", "probe.batch=8"]
    return folder, train(compose(*words, "data.image_size=[16,24]"), folder, []), words


def test_a_run_trains_on_them_and_records_their_size(run):
    folder, result, _ = run
    assert result["status"] == "completed" and math.isfinite(result["test_accuracy"])
    assert result["config"]["data"]["image_size"] == [16, 24]
    assert checkpoint.load(folder)["data"]["image_size"] == [16, 24]


def test_a_run_goes_on_with_them_and_with_no_others(run, tmp_path):
    folder, _, words = run
    more = [word for word in words if not word.startswith("epochs=")]
    result = train(compose(*more, "epochs=2", "data.image_size=[16,24]", f"resume={folder}"), tmp_path, [])
    assert result["status"] == "completed"


def test_such_a_network_is_evaluated_predicts_and_is_exported(run, tmp_path, capsys):
    from PIL import Image

    folder, result, _ = run
    assert evaluate_main([str(folder)]) == 0
    assert f"{100 * result['test_accuracy']:.2f} %" in capsys.readouterr().out
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "red.png")
    assert evaluate_main([str(folder), "--images", str(tmp_path)]) == 0
    assert "red.png" in capsys.readouterr().out
    assert export_main([str(folder), "--to", str(tmp_path / "model.pt2")]) == 0
    extra = {"revtrain.json": ""}
    exported = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert exported(torch.zeros(3, 3, 16, 24)).shape == (3, 10)
    assert json.loads(json.loads(extra["revtrain.json"])["image_size"]) == [16, 24]
