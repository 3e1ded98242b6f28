"""Plan equals allocation: live bytes of real steps, evaluations and probes on the CPU, and what lies beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ARCHS, compose, ids

import revtrain.models
from revtrain.config import ProbeConfig, read
from revtrain.data import Dataset, Split, normalise
from revtrain.machine import device as devices
from revtrain.memory.live import LiveStorages
from revtrain.models import Images
from revtrain.planning.plan import make_plan
from revtrain.planning.predict import StepPredictor
from revtrain.training.evaluate import evaluate
from revtrain.training.probe import Probe, probe_within
from revtrain.training.progress import Progress
from revtrain.training.step import Step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20
SMALL = {
    "chunked": ("width=8", "depth=3", "chunk_mib=0.25", "memory_limit=12MiB"),
    "hybrid": ("width=8", "depth=3", "chunk_mib=0.25", "memory_limit=12MiB"),
    "resnet18": ("width=8", "memory_limit=24MiB"),
}


def dataset_of(images: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(pixels, torch.arange(images) % 10)
    return Dataset(split, split, tuple("0123456789"), torch.full((3,), 0.5), torch.full((3,), 0.3))


def peaks_of_a_run(*words, images: int) -> dict[str, int]:
    """Most live bytes of a run's steps, its evaluation and its probe; "planned" and "limit" beside them."""
    plan = make_plan(compose(*words, "batch=auto"), CPU, 10, 32, images)
    batch, dataset, live = plan.batch, dataset_of(images), LiveStorages()
    config = read(compose(*words, f"batch={batch}"))
    predictor = StepPredictor(config, 10, 32)
    probed = probe_within(config.probe, predictor.probe, plan.limit_bytes - plan.loop_bytes)
    assert probed == config.probe
    found = {"planned": plan.peak_bytes + plan.loop_bytes, "limit": plan.limit_bytes}
    with live:
        torch.manual_seed(0)
        model = revtrain.models.build(config.network, Images(10, 32)).train()
        step = Step(model, config, batch, dataset, CPU)
        probe = Probe(probed, dataset.train)
        progress = Progress.begin(images, images // batch, step.generator, torch.zeros_like(step.hits))
        live.reset_peak()
        for index in range(2):
            if index == 1:  # the first one makes the momentum
                live.reset_peak()
            loss, correct = step(progress.order[index * batch : (index + 1) * batch], 0.01)
            progress.losses[index], progress.correct = loss, progress.correct.add_(correct)
        found["step"] = live.peak_bytes
        live.reset_peak()
        prepare = lambda images: normalise(images, step.mean, step.std)  # noqa: E731
        evaluate(model, Split(dataset.test.images[:batch], dataset.test.labels[:batch]), batch, prepare, "fp32", CPU)
        found["evaluation"] = live.peak_bytes
        live.reset_peak()
        probe.measure(model, prepare(probe.images), CPU, "fp32")
        found["probe"] = live.peak_bytes
    return found


def check(found: dict[str, int]) -> None:
    assert found["step"] == found["planned"] <= found["limit"]
    assert found["planned"] > 0.9 * found["limit"]
    assert found["evaluation"] <= found["planned"] and found["probe"] <= found["limit"]


@pytest.mark.parametrize("arch", SMALL)
def test_a_run_takes_what_was_planned_to_the_byte(arch):
    check(peaks_of_a_run(f"arch={arch}", *SMALL[arch], "probe.batch=8", images=300))


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALL)
def test_a_run_in_500_mib_takes_what_was_planned_to_the_byte(arch):
    check(peaks_of_a_run(f"arch={arch}", "memory_limit=500MiB", images=5000))


# ---- what a run does between its steps ---------------------------------------------------------------


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_an_evaluation_needs_no_more_than_a_step(case):
    predict = StepPredictor(compose(f"arch={case.arch}", *case.small), 10, 16)
    assert predict.evaluation(16) <= predict(16).peak


@pytest.mark.parametrize("words", [("arch=chunked",), ("arch=hybrid", "precision=bf16"), ("arch=resnet18",)])
def test_the_memory_of_a_probe_is_known(words):
    config = read(compose(*words, "width=8", "depth=3" if "resnet18" not in words[0] else "depth=18", "probe.batch=12"))
    predicted, live, dataset = StepPredictor(config, 10, 32).probe(12, True), LiveStorages(), dataset_of(12)
    with live:
        model = revtrain.models.build(config.network, Images(10, 32)).train()
        momentum = [torch.zeros_like(each) for each in model.parameters()]
        probe = Probe(config.probe, dataset.train)
        images = normalise(probe.images, dataset.mean, dataset.std)
        held = live.live_bytes
        probe.measure(model, images, CPU, config.network.precision)
    held -= sum(each.nbytes for each in (*model.parameters(), *momentum, images))
    assert predicted == pytest.approx(live.peak_bytes, rel=0.03) and held < 0.1 * predicted


def test_a_probe_that_does_not_fit_takes_fewer_images_or_does_without(caplog):
    probe = ProbeConfig()

    def need(images: int, gradients: bool) -> int:
        return images * (10 if gradients else 1) + 100 * gradients

    assert probe_within(probe, need, 740) is probe and not caplog.records
    assert probe_within(probe, need, 739) == replace(probe, batch=63)
    assert probe_within(probe, need, 119) == replace(probe, batch=64, gradients=False)
    assert probe_within(probe, need, 63) == replace(probe, batch=63, gradients=False)
    assert probe_within(probe, need, 1).every == 0
    assert probe_within(replace(probe, every=0), need, 1) == replace(probe, every=0)


# ---- what lies beside a step on a GPU ----------------------------------------------------------------


def test_on_a_gpu_the_images_are_in_the_plan(monkeypatch):
    """All of them where they fit, or else two batches."""
    monkeypatch.setattr(devices, "available_bytes", lambda device: 4 * 2**30)
    words, image = ("arch=resnet18", "width=8", "batch=64"), 3 * 32 * 32 + 8
    few, many = (make_plan(compose(*words, "memory_limit=256MiB"), CUDA, 10, 32, count) for count in (6400, 10**6))
    assert few.holds_images and few.loop_bytes == 6400 * image + 4 * 100 + 8
    assert not many.holds_images and many.loop_bytes == 2 * 64 * image + 4 * (10**6 // 64) + 8
    for plan in (few, many):
        assert plan.needed_bytes == plan.peak_bytes + plan.loop_bytes + plan.margin_bytes <= plan.limit_bytes
    assert "the training images" in few.table() and "two batches of images" in many.table()


def test_the_largest_batch_leaves_room_for_its_images(monkeypatch):
    monkeypatch.setattr(devices, "available_bytes", lambda device: 4 * 2**30)
    plan = make_plan(compose("arch=resnet18", "width=8", "batch=auto", "memory_limit=256MiB"), CUDA, 10, 32, 10**6)
    assert plan.fits and not plan.holds_images
    assert 0 <= plan.limit_bytes - plan.needed_bytes < plan.peak_bytes / plan.batch * 1.1
