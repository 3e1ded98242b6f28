"""arch=unet: rebuilt as it is stored, in tiles as whole, in the memory that its closed form says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_tiles import SMALL, step, tiny_tiles  # noqa: F401  # a fixture
from torch import nn

from revtrain.conf import compose
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, DenseHead
from revtrain.memory.live import LiveStorages
from revtrain.models import analytic_memory, build_model, traits
from revtrain.planning.predict import StepPredictor

CLASSES = 3
FORMATS = ("plain", "float32", "int32", "int16")
NARROW = ("width=4", "depth=5")  # a block in each place
COUNTED = ("width=8", "chunk_mib=0.25")


def config(*words: str):
    return compose(["task=segment", "arch=unet", *words])


def network(*words: str, size=(16, 24)) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(*words), CLASSES, size).train()


def batch(size=(16, 24), count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and labels in 8 bits of which some rows do not count."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (count, *size), generator=generator, dtype=torch.uint8)
    labels[0, 2:5] = 255
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64).to(dtype), labels


class WithLabels(nn.Module):
    """The losses of a network, as a function of the images alone."""

    def __init__(self, model: nn.Module, labels: torch.Tensor | None):
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images) if self.labels is None else self.model(images, self.labels)


def in_mode(model: nn.Module, backward: str) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.trunk.backward_mode = backward
    return twin


# ---- what it is ----------------------------------------------------------------------------------------


def test_blocks_are_spread_in_the_order_that_data_meet_them():
    model = network()
    channels = [each.channels for each in model.trunk.modules() if isinstance(each, AdditiveCoupling)]
    assert channels == [16, 16, 32, 32, 64, 64, 32, 16]
    assert traits("unet").task == "segment" and isinstance(model.trunk.head, DenseHead)
    assert 0.8 < sum(p.numel() for p in model.parameters()) / 97_683 < 1.2  # scripts/segmentation.py


@pytest.mark.parametrize("backward", ["invert", "store"])
def test_logits_of_all_pixels_or_the_loss_of_each_image(backward):
    model = network(*NARROW, f"backward={backward}").double()
    images, labels = batch()
    logits, losses = model(images), model(images, labels)
    assert logits.shape == (3, CLASSES, 16, 24) and losses.shape == (3,)
    for i in range(3):
        expected = F.cross_entropy(logits[i : i + 1], labels[i : i + 1].long(), ignore_index=255)
        torch.testing.assert_close(losses[i], expected)


def test_every_parameter_receives_a_gradient():
    model = network(*NARROW)
    model(*batch(dtype=torch.float32)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-6, name


def test_blocks_that_start_at_zero_pass_on_what_they_are_given():
    model = network(*NARROW, "zero_last=true", "stream=plain").double()
    images, _ = batch()
    with torch.no_grad():
        before = model.stem(images)
        after, _ = model.trunk.forward_(before.clone())
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("words", "size", "parts"),
    [
        (("width=7",), 32, ("width=7", "width=8")),
        (("slope=-0.2",), 32, ("slope=-0.2", "0 < slope <= 1")),
        (("pooling=[channel,batch]",), 32, ("pooling=[channel,batch]", "pooling=[channel,channel]")),
        (("pooling=[stride]",), 32, ("pooling=[stride]", "pooling=[channel,channel]")),
        ((), (32, 30), ("32x30", "image_size")),
    ],
    ids=["width", "slope", "batch", "stride", "size"],
)
def test_what_cannot_be_built_is_refused(words, size, parts):
    with pytest.raises(RevtrainError) as caught:
        network(*words, size=size)
    message = str(caught.value)
    assert 2 <= len(message.splitlines()) <= 3
    for part in parts:
        assert part in message.replace(" x ", "x"), message


# ---- rebuilt as stored, in tiles as whole ----------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (8, 36)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_invert_trains_as_store_does(name, size):
    """Two steps: the second starts from weights and statistics that the first has changed."""
    inverting = network(*NARROW, f"stream={name}", "residual_scale=0.5", size=size).double()
    storing = in_mode(inverting, "store")
    images, labels = batch(size)
    for model in (inverting, storing):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(images, labels).mean().backward()
            optimizer.step()
    found = [{name: p.grad for name, p in model.named_parameters()} for model in (inverting, storing)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverting.state_dict(), storing.state_dict(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverting.trunk.head.confusion, storing.trunk.head.confusion)
    assert inverting.trunk.head.norm.num_batches_tracked == 2


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_tiles_are_as_good_as_the_whole_image(name, with_labels, tiny_tiles):  # noqa: F811
    images, labels = batch((24, 40), count=2)
    model = network(*NARROW, f"stream={name}", size=(24, 40)).double()
    whole, tiled = (
        step(WithLabels(copy.deepcopy(model), labels if with_labels else None), images, chunk_mib)
        for chunk_mib in (1000, SMALL)
    )
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-9)
    assert max(map(len, tiny_tiles)) > 3


# ---- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
@pytest.mark.parametrize("backward", ["invert", "store"])
def test_labels_of_any_whole_numbers_are_those_of_int64(backward, dtype):
    images, labels = batch()
    found = []
    for kind in (torch.int64, dtype):
        model = network(*NARROW, f"backward={backward}").double()
        losses = model(images, labels.to(kind))
        losses.mean().backward()
        found.append(
            (losses.detach(), {name: p.grad for name, p in model.named_parameters()}, model.trunk.head.confusion)
        )
    assert found[0][2].sum() == (labels != 255).sum()
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backward", ["invert", "store"])
def test_pixels_without_a_label_count_for_nothing(backward):
    """The gradient of a network's logits is that of the mean over the others; an image without labels has no loss."""
    images, labels = batch()
    labels[1] = 255
    model = network(*NARROW, f"backward={backward}").double()
    twin = copy.deepcopy(model)
    losses = model(images, labels)
    assert losses[1] == 0
    losses.sum().backward()
    logits = twin(images)
    sum(F.cross_entropy(logits[i : i + 1], labels[i : i + 1].long(), ignore_index=255) for i in (0, 2)).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12) for p, q in pairs)


def test_complex_labels_are_refused():
    images, labels = batch()
    with pytest.raises(RevtrainError, match="a class for each pixel"):
        network(*NARROW).double()(images, labels.to(torch.complex64))


# ---- memory ----------------------------------------------------------------------------------------------


def live_peaks(model: nn.Module, size: int, dtype: torch.dtype) -> list[int]:
    """Most bytes alive in forward and in backward pass of one image, its labels among them, beside the weights."""
    model.zero_grad()
    images = torch.randn(1, 3, size, size)
    with LiveStorages() as live:
        labels = torch.zeros(1, size, size, dtype=dtype)
        loss = model(images, labels).mean()
        forward = live.peak_bytes
        live.reset_peak()
        loss.backward()
    return [forward, live.peak_bytes]


def test_labels_in_8_bits_take_7_bytes_a_pixel_less():
    """Neither pass makes a tensor in int64 of all labels."""
    model = network(*NARROW, "chunk_mib=0.01")
    wide, narrow = (live_peaks(model, 128, dtype) for dtype in (torch.int64, torch.uint8))
    for each, less in zip(wide, narrow, strict=True):
        assert each - less == pytest.approx(7 * 128**2, rel=0.05)


def bytes_a_pixel(*words: str) -> float:
    """What larger images add to the peak of a step, the images' 12 bytes and the labels' 1 among it."""
    peaks = []
    for size in (512, 1024):
        predicted = StepPredictor(config(*COUNTED, *words), CLASSES, size)(1)
        peaks.append(predicted.forward_backward - predicted.buffers)
    return (peaks[1] - peaks[0]) / (1024**2 - 512**2)


@pytest.mark.parametrize("words", [("depth=2", "pooling=[channel]"), ("depth=10",), ("pooling=[]",),
                                   ("depth=14", "pooling=[channel,channel,channel]")], ids="-".join)  # fmt: skip
def test_two_states_whatever_the_depth_and_the_number_of_levels(words):
    assert bytes_a_pixel(*words) == pytest.approx(2 * 8 * 4 + 12 + 1, rel=0.003)


CASES = [
    ("backward=invert",),
    ("backward=invert", "precision=bf16"),
    ("backward=store",),
    ("backward=store", "precision=bf16"),
    ("stream=plain", "residual_scale=0.5"),
    ("stream=int16", "depth=3"),
    ("precision=bf16", "stream=float32"),
    ("backward=store", "width=32"),
    ("backward=store", "stream=plain", "depth=2", "pooling=[]"),
    ("backward=store", "precision=bf16", "pooling=[channel,channel,channel]", "residual_scale=0.5"),
]


@pytest.mark.parametrize(("words", "classes"), [(words, (2, 20)[i % 2]) for i, words in enumerate(CASES)], ids=str)
def test_closed_form_agrees_with_the_count_of_live_storages(words, classes):
    """Of large images, beside which weights and pieces weigh next to nothing, and of small ones."""
    cfg, (large, small) = config(*COUNTED, *words), ((8, 1024), (48, 32))
    model = analytic_memory(cfg, classes, 1024)
    predicted = [StepPredictor(cfg, classes, size)(count) for count, size in (large, small)]
    assert model.bytes_per_pixel == pytest.approx(predicted[0].peak / (8 * 1024**2), rel=0.01)
    assert model.peak_bytes(*large) == pytest.approx(predicted[0].peak, rel=0.003)
    assert analytic_memory(cfg, classes, 32).peak_bytes(*small) == pytest.approx(predicted[1].peak, rel=0.05)
    assert model.parameters * 4 == predicted[0].gradients == predicted[0].optimizer
    assert model.fixed_of("theta") == predicted[0].parameters


@pytest.mark.parametrize("backward", ["invert", "store"])
def test_terms_add_up_and_name_their_equation(backward):
    model = analytic_memory(config(f"backward={backward}"), CLASSES, 64)
    assert len({term.name for term in model.terms}) == len(model.terms), "a buffer is counted once"
    by_kind = sum(model.of(kind=kind) for kind in ("theta", "activation", "gradient", "optimizer"))
    assert by_kind == pytest.approx(model.bytes_per_pixel)
    for term in model.terms:
        assert term.formula and ("Eq" in term.equation or "paper" in term.equation)
