"""The figures of a run: what they show, and that TensorBoard gets them."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from conftest import TINY
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from revtrain import figures
from revtrain.conf import compose
from revtrain.errors import RevtrainError
from revtrain.models import build_model
from revtrain.numerics.snr import probe_snr
from revtrain.planning.predict import StepPredictor, predict_step_memory
from revtrain.runs.dashboard import FIGURES
from revtrain.runs.writer import LINE_KEYS, RunWriter

needs_matplotlib = pytest.mark.skipif(not figures.available(), reason="the extra figures is not installed")
SNR = {"trunk/00_CouplingConv2d": 80.0, "trunk/01_InvertibleBatchNorm2d": 95.5, "trunk/02_InvertibleLeakyReLU": 101.0}


def texts(axes) -> str:
    return "\n".join(each.get_text() for each in [*axes.texts, *axes.get_xticklabels(), axes.title, axes.yaxis.label])


def heights(axes) -> dict[int, float]:
    """What stands above each place of the x axis."""
    found = [point for each in axes.collections for point in each.get_offsets().tolist()]
    return {int(x): y for x, y in found}


@needs_matplotlib
def test_the_snr_profile_has_a_point_for_each_layer_in_the_order_given():
    axes = figures.snr_profile_figure(SNR, "after epoch 2").axes[0]
    assert heights(axes) == {0: 80.0, 1: 95.5, 2: 101.0}
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "00 CouplingConv2d",
        "01 BatchNorm2d",
        "02 LeakyReLU",
    ]
    assert "80.0 dB" in texts(axes) and "(dB)" in axes.get_ylabel() and "exact" not in texts(axes)


@needs_matplotlib
def test_exact_and_lost_layers_stand_apart():
    axes = figures.snr_profile_figure(
        {**SNR, "trunk/03_ChannelPooling": 320.0, "trunk/04_CouplingConv2d": -320.0}
    ).axes[0]
    shown = heights(axes)
    assert 101 < shown[3] < 130 and -30 < shown[4] < 0
    low, high = axes.get_ylim()
    assert low < shown[4] and shown[3] < high
    assert "exact" in texts(axes) and "nothing left" in texts(axes)
    assert figures.pixels(figures.snr_profile_figure({})).ndim == 3  # nothing was measured


@needs_matplotlib
@pytest.mark.parametrize("arch", ["hybrid", "revnet"])
def test_the_profile_of_a_real_probe_rises_towards_the_output(arch):
    cfg = compose(["data=synthetic", f"arch={arch}", "width=8", "depth=4", "stream=plain"])
    torch.manual_seed(0)
    layers = probe_snr(build_model(cfg), torch.randn(4, 3, 32, 32), torch.arange(4))
    axes = figures.snr_profile_figure(dict(reversed(layers.items()))).axes[0]
    shown = heights(axes)
    assert len(shown) == len(layers)
    (line,) = (each for each in axes.lines if len(each.get_xdata()) > 2)  # the layers of the network itself
    assert len(line.get_xdata()) < len(layers) or arch == "revnet"
    assert line.get_ydata()[0] < line.get_ydata()[-1]


@needs_matplotlib
def test_the_timeline_shows_the_peak_that_was_measured():
    step = StepPredictor(compose([*TINY]), 10, 32, quick=False)(16)
    timeline = step.timeline
    assert max(timeline.live_bytes) == step.peak
    assert list(timeline.ends) == ["forward", "backward", "optimizer"]
    assert (
        0
        < timeline.ends["forward"]
        < timeline.ends["backward"]
        < timeline.ends["optimizer"]
        == len(timeline.live_bytes)
    )
    assert timeline.always_bytes == step.parameters + step.optimizer + step.buffers
    axes = figures.memory_timeline_figure(timeline.live_bytes, timeline.ends, timeline.always_bytes).axes[0]
    assert max(axes.lines[0].get_ydata()) == pytest.approx(step.peak / 2**20)
    assert "in the backward pass" in texts(axes) and "MiB" in axes.get_ylabel()


@needs_matplotlib
def test_a_long_timeline_is_thinned_but_keeps_its_peak():
    live = [1000 + (i % 7) for i in range(100_000)]
    live[54_321] = 9000
    axes = figures.memory_timeline_figure(live, {"forward": 50_000, "backward": 100_000}, 500).axes[0]
    x, y = axes.lines[0].get_data()
    assert len(x) <= 2 * figures.SHOWN and max(y) == pytest.approx(9000 / 2**20) and x[list(y).index(max(y))] == 54_321


@needs_matplotlib
def test_the_confusion_matrix_counts():
    axes = figures.confusion_figure([[5, 1], [0, 4]], ["cat", "dog"], "90.00 %").axes[0]
    counts = {each.get_position(): each.get_text() for each in axes.texts}
    assert counts == {(0, 0): "5", (1, 0): "1", (1, 1): "4"}
    assert axes.get_ylabel() == "true" and axes.images[0].get_array().tolist() == [[5 / 6, 1 / 6], [0, 1]]


@needs_matplotlib
def test_the_event_file_of_a_long_run_holds_few_figures(tmp_path):
    config = OmegaConf.to_container(compose([*TINY, "epochs=300"]), resolve=True)
    writer = RunWriter(tmp_path, config, [])
    writer.result["bytes_per_pixel"] = 100.0
    memory = predict_step_memory(compose([*TINY]), 10, 32, 16)
    writer.start([], memory.timeline)
    snr = {"minimum": 80.0, "minimum_layer": "a", "layers": dict(reversed(SNR.items()))}
    for epoch in range(301):
        writer.epoch({**dict.fromkeys(LINE_KEYS), "epoch": epoch, "snr_db": snr})
    writer.finish("completed")
    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"snr_db/profile", "memory/timeline"}
    steps = [each.step for each in events.Images("snr_db/profile")]
    assert steps[0] == 0 and steps[-1] == 300 and 5 <= len(steps) <= FIGURES
    assert len(events.Images("memory/timeline")) == 1


@needs_matplotlib
def test_a_figure_is_gone_with_its_epoch_and_the_collector_looks_at_nothing_older(tmp_path, monkeypatch):
    class Cycle:
        pass

    old = Cycle()
    old.itself = old
    older, drawn, pixels = weakref.ref(old), [], figures.pixels
    monkeypatch.setattr(figures, "pixels", lambda figure: drawn.append(weakref.ref(figure)) or pixels(figure))
    writer = RunWriter(tmp_path, OmegaConf.to_container(compose([*TINY, "epochs=1"]), resolve=True), [])
    writer.result["bytes_per_pixel"] = 100.0
    writer.start([], None)
    gc.disable()
    try:
        del old
        snr = {"minimum": 80.0, "minimum_layer": "a", "layers": SNR}
        writer.epoch({**dict.fromkeys(LINE_KEYS), "epoch": 1, "snr_db": snr})
        assert [figure() for figure in drawn] == [None] and older() is not None
    finally:
        gc.enable()
    writer.finish("completed")


def test_without_matplotlib_a_run_goes_on_without_figures(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    ran = command(*TINY, "epochs=1")
    assert ran.result["status"] == "completed"
    assert EventAccumulator(str(ran.dir)).Reload().Tags()["images"] == []
    with pytest.raises(RevtrainError, match="pip install matplotlib"):
        figures.snr_profile_figure(SNR)
