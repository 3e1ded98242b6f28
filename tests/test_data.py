"""Data sets, subsets, statistics and augmentation."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import logging
import os
import pickle
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from revtrain.config import AugmentConfig, DataConfig, typed
from revtrain.data import (
    Split,
    augment,
    channel_statistics,
    cifar10,
    draw_augmentation,
    far_apart,
    load_data,
    normalise,
    synthetic,
)
from revtrain.errors import RevtrainError

REAL_IMAGES = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-jpeg.zip"


def refused(cfg: DataConfig, *parts: str) -> str:
    """The message of the error that `cfg` must meet: two to five lines that hold all `parts`."""
    with pytest.raises(RevtrainError) as caught:
        load_data(cfg)
    message = str(caught.value)
    assert 2 <= len(message.splitlines()) <= 5, message
    for part in parts:
        assert part in message
    return message


def assert_sound(split: Split, count: int, size: int, classes: int) -> None:
    assert split.images.dtype == torch.uint8 and split.images.shape == (count, 3, size, size)
    assert split.images.is_contiguous() and split.images.device.type == "cpu"
    assert split.labels.dtype == torch.int64 and split.labels.shape == (count,)
    assert set(split.labels.tolist()) == set(range(classes))


# ---- load_data -------------------------------------------------------------------------------------------

SMALL = DataConfig(own=synthetic.Settings(train_images=203, test_images=100))


def changed(cfg: DataConfig, **changes) -> DataConfig:
    """`cfg` with other values, also of the keys that its data set alone has."""
    own = {key: changes.pop(key) for key in list(changes) if hasattr(cfg.own, key)}
    return replace(cfg, **changes, own=replace(cfg.own, **own))


def test_unknown_name_lists_those_that_exist():
    refused(
        DataConfig(name="mnist"), "mnist", "cifar10, far_apart, imagefolder, maskfolder, synthetic, synthetic_masks"
    )


def test_class_count_must_match():
    refused(replace(SMALL, classes=7), "data.classes=7", "10 classes")
    assert len(load_data(replace(SMALL, classes=10)).classes) == 10


def test_subset_is_fixed_balanced_and_nested():
    whole = load_data(SMALL)
    small, large = (load_data(replace(SMALL, train_limit=n, test_limit=20)) for n in (50, 105))
    assert torch.bincount(small.train.labels).tolist() == [5] * 10
    assert sorted(torch.bincount(large.train.labels).tolist()) == [10] * 5 + [11] * 5
    assert torch.bincount(small.test.labels).tolist() == [2] * 10

    def rows(split):
        return {(image.numpy().tobytes(), int(label)) for image, label in zip(*vars(split).values(), strict=True)}

    assert rows(small.train) < rows(large.train) < rows(whole.train)

    torch.manual_seed(99)  # the run's seed has no say
    again = load_data(replace(SMALL, train_limit=50))
    assert torch.equal(again.train.images, small.train.images)


@pytest.mark.parametrize("key", ["train_limit", "test_limit"])
@pytest.mark.parametrize("limit", [0, -3, 204])
def test_limit_outside_the_set_is_refused(key, limit):
    refused(replace(SMALL, **{key: limit}), f"data.{key}={limit}", "null")


def test_statistics_are_those_of_the_training_images_alone():
    data = load_data(replace(SMALL, train_limit=40))
    pixels = data.train.images.double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0).float())
    assert data.mean.dtype == data.std.dtype == torch.float32


def test_statistics_over_several_chunks_and_of_a_constant_channel():
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean, (images.double() / 255).mean((0, 2, 3)).float())
    torch.testing.assert_close(std[:2], (images.double() / 255).std((0, 2, 3), correction=0).float()[:2])
    assert normalise(images, mean, std).isfinite().all()


def test_normalise():
    data = load_data(SMALL)
    images = normalise(data.train.images, data.mean, data.std)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double().mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.double().std((0, 2, 3)), torch.ones(3).double(), atol=1e-3, rtol=0)


# ---- augmentation ----------------------------------------------------------------------------------------


def reference(image, top, left, flip, row, column, cfg):
    """One image (3, H, W) the slow way; NaN where the cutout lies."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (cfg.pad, cfg.pad), (cfg.pad, cfg.pad)), mode="reflect")
    image = padded[:, top : top + size, left : left + size].astype(np.float64)
    if flip:
        image = image[:, :, ::-1].copy()
    if cfg.cutout:
        top, left = row - cfg.cutout // 2, column - cfg.cutout // 2
        image[:, max(top, 0) : max(top + cfg.cutout, 0), max(left, 0) : max(left + cfg.cutout, 0)] = np.nan
    return image


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize(
    "cfg",
    [
        AugmentConfig(pad=4, flip=True, cutout=8),
        AugmentConfig(pad=7, flip=False, cutout=0),
        AugmentConfig(pad=0, flip=True, cutout=5),
        AugmentConfig(pad=0, flip=False, cutout=3),
        AugmentConfig(pad=2, flip=True, cutout=1),
    ],
    ids=str,
)
def test_augment_equals_the_slow_reference(size, cfg):
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    before = images.clone()
    draws = draw_augmentation(64, size, cfg, generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    output = augment(images, draws, mean, std, cfg)

    expected = np.stack(
        [
            reference(image, *offset, flip, *centre, cfg)
            for image, offset, flip, centre in zip(images.numpy(), *(draw.tolist() for draw in draws[:3]), strict=True)
        ]
    )
    expected = (expected / 255 - mean.double().view(3, 1, 1).numpy()) / std.double().view(3, 1, 1).numpy()
    expected = np.nan_to_num(expected, nan=0.0)  # the cutout is the mean of the training set
    torch.testing.assert_close(output, torch.from_numpy(expected).float())
    assert torch.equal(images, before)  # the data set is not written to


def test_everything_off_is_plain_normalisation():
    cfg = AugmentConfig(pad=0, flip=False, cutout=0)
    images = load_data(SMALL).test.images
    draws = draw_augmentation(len(images), 32, cfg, torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    assert torch.equal(augment(images, draws, mean, std, cfg), normalise(images, mean, std))


def test_draws_reach_their_whole_range_and_differ_per_sample():
    cfg = AugmentConfig(pad=4, flip=True, cutout=8)
    draws = draw_augmentation(4000, 32, cfg, torch.Generator().manual_seed(0))
    for axis in (0, 1):
        assert draws.offsets[:, axis].unique().tolist() == list(range(9))
        assert draws.centres[:, axis].unique().tolist() == list(range(32))
    assert (draws.offsets[:, 0] != draws.offsets[:, 1]).any()
    assert 1800 < draws.flips.sum() < 2200


def test_draws_are_small_cpu_tensors_that_the_generator_alone_decides():
    cfg = AugmentConfig()
    first, second = (draw_augmentation(16, 32, cfg, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert all(draw.device.type == "cpu" and draw.numel() <= 32 for draw in first[:3])
    # one kind of augmentation off, the others stay
    unflipped = draw_augmentation(16, 32, replace(cfg, flip=False), torch.Generator().manual_seed(5))
    assert not unflipped.flips.any() and first.flips.any()
    assert torch.equal(unflipped.centres, first.centres) and torch.equal(unflipped.offsets, first.offsets)


@pytest.mark.parametrize("change", [{"pad": -1}, {"pad": 8}, {"cutout": -2}])
def test_augmentation_that_cannot_be_drawn_is_refused(change):
    key, value = next(iter(change.items()))
    with pytest.raises(RevtrainError, match=f"data.augment.{key}={value}"):
        draw_augmentation(4, 8, replace(AugmentConfig(), **change), torch.Generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_augment_on_the_gpu_equals_the_cpu():
    cfg = AugmentConfig()
    data = load_data(SMALL)
    draws = draw_augmentation(203, 32, cfg, torch.Generator().manual_seed(0))
    here = augment(data.train.images, draws, data.mean, data.std, cfg)
    there = augment(data.train.images.cuda(), draws, data.mean, data.std, cfg)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here)


# ---- synthetic -------------------------------------------------------------------------------------------


def test_synthetic_is_balanced_and_deterministic_from_its_seed():
    first, again, other = (load_data(changed(SMALL, seed=seed)) for seed in (3, 3, 4))
    assert_sound(first.train, 203, 32, 10)
    assert_sound(first.test, 100, 32, 10)
    assert first.image_size == (32, 32) and len(set(first.classes)) == 10
    assert torch.bincount(first.test.labels).tolist() == [10] * 10
    for split in ("train", "test"):
        a, b, c = (getattr(data, split) for data in (first, again, other))
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, c.images)
    # the streams are disjoint: neither split depends on the length of the other
    longer = load_data(changed(SMALL, seed=3, train_images=400))
    assert torch.equal(longer.test.images, first.test.images)
    assert not torch.equal(first.train.images[:100], first.test.images)


def test_synthetic_images_have_the_size_asked_for():
    assert load_data(replace(SMALL, image_size=48)).image_size == (48, 48)
    wide = load_data(replace(SMALL, image_size=[24, 40]))
    assert wide.image_size == (24, 40) and wide.train.images.shape[-2:] == (24, 40)
    tall = load_data(replace(SMALL, image_size=[40, 24])).train
    assert not torch.equal(wide.train.images.transpose(2, 3), tall.images)


def test_the_smaller_side_of_a_synthetic_image_holds_the_shape():
    """Shapes keep their form: a disc is as tall as it is wide."""
    square, wide = (load_data(replace(SMALL, image_size=size)) for size in (32, [32, 64]))
    assert torch.equal(square.train.labels, wide.train.labels)
    # whatever lies beyond the square in the middle is ground, stroke and specks: less of it is the shape's colour
    outside = torch.cat([wide.train.images[..., :8], wide.train.images[..., 56:]], -1).float()
    inside = wide.train.images[..., 24:40].float()
    assert inside.std((1, 2, 3)).mean() > outside.std((1, 2, 3)).mean()


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 8},
        {"image_size": 0},
        {"image_size": [32, 8]},
        {"image_size": [0, 32]},
        {"seed": -1},
        {"train_images": 9},
        {"test_images": 0},
    ],
)
def test_synthetic_refuses(change):
    key, value = next(iter(change.items()))
    refused(changed(SMALL, **change), f"data.{key}={typed(value)}")


@pytest.fixture(scope="module")
def shapes():
    return load_data(DataConfig(own=synthetic.Settings(train_images=5000, test_images=1000)))


def fit(model, data, epochs, lr, cfg, batch=100):
    """Train with SGD and a OneCycle schedule; accuracy (0..1) on the training and the test images."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(data.train) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train), generator=generator).split(batch):
            draws = draw_augmentation(len(chosen), 32, cfg, generator)
            images = augment(data.train.images[chosen], draws, data.mean, data.std, cfg)
            loss = F.cross_entropy(model(images), data.train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return tuple(
            (model(normalise(split.images, data.mean, data.std)).argmax(1) == split.labels).double().mean()
            for split in (data.train, data.test)
        )


def test_synthetic_defeats_a_linear_model(shapes):
    torch.manual_seed(0)
    off = AugmentConfig(pad=0, flip=False, cutout=0)
    train, test = fit(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), shapes, 8, 0.003, off)
    assert train > 0.3  # it was trained
    assert test < 0.5


def test_synthetic_is_learned_by_a_small_cnn(shapes):
    torch.manual_seed(0)
    layers, channels = [], 3
    for _ in range(4):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = 32
    _, test = fit(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)), shapes, 4, 0.1, AugmentConfig())
    assert test > 0.9


# ---- far_apart -------------------------------------------------------------------------------------------

APART = DataConfig(name="far_apart", image_size=64, own=far_apart.Settings(train_images=40, test_images=20))


def marks_of(split: Split, part: slice) -> torch.Tensor:
    """1 where the mark in these columns is light, 0 where it is dark: (N,)."""
    grey = split.images[..., part].float().mean((1, 2, 3))
    assert ((grey - far_apart.GREY).abs() > 10).all(), "there is a mark in each image"
    return (grey > far_apart.GREY).long()


def test_far_apart_is_balanced_and_deterministic_from_its_seed():
    first, again, other = (load_data(changed(APART, seed=seed)) for seed in (3, 3, 4))
    assert_sound(first.train, 40, 64, 2)
    assert_sound(first.test, 20, 64, 2)
    assert first.image_size == (64, 64) and first.classes == ("different", "same")
    for split in ("train", "test"):
        a, b, c = (getattr(data, split) for data in (first, again, other))
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, c.images)
    # the streams are disjoint: neither split depends on the length of the other
    longer = load_data(changed(APART, seed=3, train_images=80))
    assert torch.equal(longer.test.images, first.test.images)
    assert not torch.equal(first.train.images[:20], first.test.images)


def test_far_apart_has_its_class_in_both_marks_and_in_neither_alone():
    split = load_data(APART).train
    left, right = marks_of(split, slice(0, 16)), marks_of(split, slice(48, 64))
    assert torch.equal((left == right).long(), split.labels)
    # all three counts of two by two are alike: the label, given one mark, is as likely 0 as 1
    for first, second in ((left, right), (left, split.labels), (right, split.labels)):
        assert torch.bincount(2 * first + second).tolist() == [10] * 4


def test_far_apart_keeps_its_marks_apart_in_a_rectangle():
    split = load_data(replace(APART, image_size=[32, 128])).train
    left, right = marks_of(split, slice(0, 32)), marks_of(split, slice(96, 128))
    assert split.images.shape[-2:] == (32, 128) and torch.equal((left == right).long(), split.labels)
    middle = split.images[..., 32:96].int() - far_apart.GREY
    assert middle.abs().max() <= far_apart.NOISE
    refused(replace(APART, image_size=[32, 100]), "data.image_size=[32,96]")


def test_far_apart_shows_a_patch_of_half_the_side_one_mark_at_most():
    for image in load_data(APART).train.images[:, 0].int():
        marked = ((image - far_apart.GREY).abs() > far_apart.NOISE).any(0)  # (W,) columns
        assert marked[:16].sum() == marked[48:].sum() == 12 and not marked[16:48].any()
        for start in range(64 - 32 + 1):
            seen = marked[start : start + 32]
            assert not (seen[: max(0, 16 - start)].any() and seen[48 - start :].any())


def test_far_apart_puts_its_marks_in_many_places():
    rows = ((load_data(APART).train.images[:, 0].int() - far_apart.GREY).abs() > far_apart.NOISE).int()
    for part in (slice(0, 16), slice(48, 64)):
        tops = rows[..., part].any(2).int().argmax(1)
        assert len(tops.unique()) > 10 and tops.max() <= 32


@pytest.mark.parametrize("change", [{"image_size": 40}, {"seed": -1}, {"train_images": 3}, {"test_images": 0}])
def test_far_apart_refuses(change):
    key, value = next(iter(change.items()))
    refused(changed(APART, **change), f"data.{key}={value}", "Give ")


def test_far_apart_trains_from_the_command_line(command):
    words = ("arch=chunked", "width=2", "depth=1", "pooling=[]", "batch=8", "epochs=1", "probe.every=0", "device=cpu")
    images = ("data.image_size=16", "data.train_images=16", "data.test_images=8")
    ran = command("data=far_apart", *images, *words, "lr=0.01")
    assert ran.code == 0, ran.err
    assert ran.result["status"] == "completed" and ran.result["config"]["data"]["name"] == "far_apart"


# ---- imagefolder -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A small tree of images: two classes, 6 + 4 images of 12x12 pixels."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def cfg(folder, tmp_path):
    return DataConfig(name="imagefolder", root=str(folder), cache=str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """Paths in the order in which they are decoded."""
    from revtrain.data import imagefiles

    paths = []
    original = imagefiles.pixels
    monkeypatch.setattr(imagefiles, "pixels", lambda path, *rest: paths.append(path) or original(path, *rest))
    return paths


def test_folder_gives_pixels_labels_and_classes(cfg, folder):
    data = load_data(cfg)
    assert_sound(data.train, 6, 12, 2)
    assert_sound(data.test, 4, 12, 2)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(folder / "train" / "dog" / "1.png"))
    assert np.array_equal(data.train.images[4].numpy(), pixels.transpose(2, 0, 1))


def test_grey_palette_and_transparent_images_become_rgb(cfg, folder):
    for index, mode in enumerate(("L", "P", "RGBA")):
        path = folder / "train" / "cat" / f"{index}.png"
        Image.open(path).convert(mode).save(path)
    images = load_data(cfg).train.images
    assert torch.equal(images[0, 0], images[0, 1]) and not torch.equal(images[2, 0], images[2, 1])


def test_image_size_resizes_the_shorter_side_and_crops_the_centre(cfg, folder):
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, :12] = (255, 0, 0)  # only what lies outside of the central 16x16 is coloured
    wide[:, 28:] = (0, 0, 255)
    Image.fromarray(wide).save(folder / "train" / "cat" / "0.png")
    data = load_data(replace(cfg, image_size=8))
    assert data.image_size == (8, 8)
    assert data.train.images[0, :, :, 1:-1].max() == 0  # smoothing lets the outermost columns see a pixel beyond
    assert data.train.images[1].float().std() > 0


def test_second_load_reads_the_cache(cfg, decoded):
    first = load_data(cfg)
    assert len(decoded) == 10
    second = load_data(cfg)
    assert len(decoded) == 10
    for split in ("train", "test"):
        assert torch.equal(getattr(first, split).images, getattr(second, split).images)
    assert [path.suffix for path in Path(cfg.cache).iterdir()] == [".npz"]  # nothing half-written is left


def test_a_changed_folder_or_size_is_decoded_anew(cfg, folder, decoded):
    load_data(cfg)
    path = folder / "test" / "dog" / "1.png"
    Image.new("RGB", (12, 12), (1, 2, 3)).save(path)
    assert load_data(cfg).test.images[3, :, 0, 0].tolist() == [1, 2, 3]
    assert len(decoded) == 20
    load_data(replace(cfg, image_size=12))
    assert len(decoded) == 30
    path.rename(path.with_name("9.png"))
    load_data(cfg)
    assert len(decoded) == 40


def truncate(content):
    return content[: len(content) // 2]


def flip_a_pixel(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_pixel, lambda content: b"", lambda content: b"not a zip"])
def test_a_damaged_cache_is_decoded_anew(cfg, decoded, caplog, damage):
    first = load_data(cfg)
    (cache,) = Path(cfg.cache).iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    second = load_data(cfg)
    assert len(decoded) == 20 and "damaged" in caplog.text
    assert torch.equal(first.train.images, second.train.images)
    load_data(cfg)
    assert len(decoded) == 20  # and the cache is mended


def test_an_unwritable_cache_is_only_a_warning(cfg, folder, caplog):
    (folder / "file").touch()
    data = load_data(replace(cfg, cache=str(folder / "file" / "cache")))
    assert_sound(data.train, 6, 12, 2)
    assert [record.levelno for record in caplog.records if "cannot be cached" in record.message] == [logging.WARNING]


def test_a_full_disk_leaves_no_half_written_cache(cfg, monkeypatch, caplog):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    load_data(cfg)
    assert "No space left" in caplog.text and not list(Path(cfg.cache).iterdir())


def test_the_cache_defaults_to_the_users_cache_folder(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_data(replace(cfg, cache=None))
    assert len(list((tmp_path / "xdg" / "revtrain" / "imagefolder").glob("*.npz"))) == 1


def test_folder_root_must_be_given_and_exist(cfg, tmp_path):
    refused(replace(cfg, root=None), "data.root=FOLDER", "train/CLASS/*")
    refused(replace(cfg, root=str(tmp_path / "none")), str(tmp_path / "none"), "test/CLASS/*")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_without_a_split(cfg, folder, split):
    (folder / split).rename(folder / "elsewhere")
    refused(cfg, str(folder / split), "train/CLASS/* and test/CLASS/*")


def test_empty_folder_and_empty_class(cfg, folder):
    (folder / "train" / "zebra").mkdir()
    refused(cfg, str(folder / "train"), "zebra", "at least one image")
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    refused(cfg, str(folder / "train"), "one folder for each class")


def test_differing_classes(cfg, folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    refused(cfg, "Only in train/: dog", "Only in test/: wolf")


@pytest.mark.parametrize("damage", [truncate, lambda content: b"", lambda content: b"hello"])
def test_a_corrupt_image_is_named(cfg, folder, damage):
    for path in (folder / "test" / "dog" / "0.png", folder / "train" / "cat" / "0.png"):
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        refused(cfg, str(path), "damaged")
        path.write_bytes(whole)
    assert not Path(cfg.cache).exists()


def test_odd_sizes_are_refused_with_a_remedy(cfg, folder):
    path = folder / "test" / "cat" / "1.png"
    Image.new("RGB", (14, 14)).save(path)
    refused(cfg, str(path), "14x14", "12x12", "data.image_size=32")
    first = folder / "train" / "cat" / "0.png"
    Image.new("RGB", (14, 10)).save(first)
    refused(cfg, "is 12x12 pixels, but the first one is 14x10", "data.image_size=32")
    assert load_data(replace(cfg, image_size=32)).image_size == (32, 32)
    assert load_data(replace(cfg, image_size=[16, 32])).image_size == (16, 32)


def test_rectangles_of_one_size_are_taken_as_they_are(cfg, folder):
    pictures = {}
    for path in folder.rglob("*.png"):
        pictures[path] = np.random.default_rng(len(pictures)).integers(0, 256, (10, 14, 3), np.uint8)
        Image.fromarray(pictures[path]).save(path)
    data = load_data(cfg)
    assert data.image_size == (10, 14)
    first = folder / "train" / "cat" / "0.png"
    assert np.array_equal(data.train.images[0].numpy(), pictures[first].transpose(2, 0, 1))
    # one that its camera held upright lies on its side in the file
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pictures[first], 1)).save(first, exif=exif)
    assert np.array_equal(load_data(cfg).train.images[0].numpy(), pictures[first].transpose(2, 0, 1))
    Image.fromarray(np.rot90(pictures[first], 1)).save(first)
    refused(cfg, "10x14", "14x10")


def test_a_rectangle_is_covered_and_the_rest_cut_off(cfg, folder):
    tall = np.zeros((40, 16, 3), np.uint8)
    tall[:16], tall[24:] = (255, 0, 0), (0, 0, 255)  # only what lies outside of the 8 rows in the middle is coloured
    Image.fromarray(tall).save(folder / "train" / "cat" / "0.png")
    data = load_data(replace(cfg, image_size=[4, 8]))
    assert data.train.images.shape[-2:] == (4, 8)
    assert data.train.images[0, :, 1:-1].max() == 0  # smoothing lets the outermost rows see a pixel beyond


def test_more_than_eight_bits_are_refused(cfg, folder):
    path = folder / "train" / "cat" / "1.png"
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(path)
    refused(cfg, str(path), "8 bits")


@pytest.mark.parametrize("limit", [100, 60])  # 144 pixels: PIL warns above the limit, raises above twice
@pytest.mark.parametrize("image_size", [None, 12])
def test_decompression_bombs_are_refused(cfg, monkeypatch, limit, image_size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    refused(replace(cfg, image_size=image_size), "0.png", "huge", str(limit))


# ---- which files of a folder are taken ---------------------------------------------------------------------

PICTURE = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)


def put(path, **options):
    """A picture that no turn maps to itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PICTURE).save(path, **options)


def said(caplog) -> str:
    """The one summary of what was left out."""
    texts = [record.getMessage() for record in caplog.records if "left out:" in record.getMessage()]
    assert len(texts) == 1, texts
    return texts[0]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("here", "."),
        ("above", ".."),
        ("far above", "../.."),
        ("other", "../dog"),
        ("sub/back", "../../cat"),
        ("x.png", "."),
    ],
)
def test_a_link_to_a_folder_that_is_listed_adds_no_image(cfg, folder, caplog, name, target):
    link = folder / "train" / "cat" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    assert load_data(cfg).train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"train/cat/{name}" in said(caplog)


def test_links_in_a_circle_end(cfg, folder, tmp_path, caplog):
    for one, other in (("a", "b"), ("b", "a")):
        put(tmp_path / one / f"{one}.png")
        (tmp_path / one / "next").symlink_to(tmp_path / other)
    (folder / "train/cat/a").symlink_to(tmp_path / "a")
    assert load_data(cfg).train.labels.tolist() == [0] * 5 + [1] * 3
    assert "train/cat/a/next/next" in said(caplog)


def test_a_linked_class_and_a_linked_file_are_taken(cfg, folder, tmp_path, caplog):
    for split in ("train", "test"):
        (folder / split / "dog").rename(tmp_path / f"dogs of {split}")
        (folder / split / "dog").symlink_to(tmp_path / f"dogs of {split}")
    (folder / "train/cat/more.png").symlink_to(tmp_path / "dogs of train/0.png")
    assert load_data(cfg).train.labels.tolist() == [0] * 4 + [1] * 3
    assert "left out" not in caplog.text


def test_two_classes_that_are_one_folder_are_refused(cfg, folder):
    (folder / "train/wolf").symlink_to("dog")
    refused(cfg, "no image of: wolf", "listed already, or that the link lies in: wolf")


@pytest.mark.parametrize(
    "name", ["._0.jpg", ".hidden.png", ".ipynb_checkpoints/0-checkpoint.png", ".git/0.png", "@eaDir/0.png",
             "__MACOSX/._0.png", "deep/.thumbnails/0.png"],
)  # fmt: skip
def test_hidden_names_are_no_images(cfg, folder, caplog, name):
    path = folder / "train/cat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((folder / "train/cat/0.png").read_bytes())
    assert load_data(cfg).train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert name.split("/0")[0].split("/.")[0].split("/")[0] in said(caplog)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "lost+found", "$RECYCLE.BIN"])
def test_hidden_folders_are_no_classes(cfg, folder, caplog, name):
    put(folder / "train" / name / "0.png")
    assert load_data(cfg).classes == ("cat", "dog")
    assert f"train/{name}" in said(caplog)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe.png", b"two\nlines.png", b"l" * 250 + b".png"])
def test_file_names_of_any_bytes(cfg, folder, name):
    os.rename(folder / "train/cat/0.png", os.path.join(os.fsencode(folder / "train/cat"), name))
    assert len(load_data(cfg).train) == 6
    assert len(load_data(cfg).train) == 6  # from the cache
    with open(os.path.join(os.fsencode(folder / "train/cat"), name), "wb"):
        refused(cfg, "damaged").encode()


def test_class_names_of_any_bytes_and_of_letters_in_two_spellings(cfg, folder):
    for split, spelling in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        (folder / split / "cat").rename(folder / split / spelling)
        os.rename(folder / split / "dog", os.path.join(os.fsencode(folder / split), b"caf\xe9"))
    classes = load_data(cfg).classes
    assert classes == ("caf\\xe9", "caf\u00e9") and all(name.encode() for name in classes)
    (folder / "train" / "cafe\u0301").mkdir()
    refused(cfg, "several folders for one class")


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jfif", ".jpe", ".JPG", ".apng", ".pnm"])
def test_suffixes_that_other_tools_read_are_taken(cfg, folder, suffix):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, Image.registered_extensions()[suffix.lower()])
    (folder / f"train/cat/9{suffix}").write_bytes(buffer.getvalue())
    assert load_data(cfg).train.labels.tolist() == [0] * 4 + [1] * 3


@pytest.mark.parametrize("name", ["a.heic", "a.jxl", "a.svg", "a.eps", "a.txt", "README"])
def test_other_suffixes_are_left_out_with_a_word(cfg, folder, caplog, name):
    (folder / "train/cat" / name).touch()
    assert len(load_data(cfg).train) == 6
    assert "1 with another suffix: 1 " + (Path(name).suffix or "none") in said(caplog)


def test_an_image_beside_the_class_folders_is_left_out_with_a_word(cfg, folder, caplog):
    put(folder / "train/loose.png")
    assert len(load_data(cfg).train) == 6
    assert "train/loose.png" in said(caplog)


@pytest.mark.parametrize(
    ("form", "options"),
    [("jpeg", {"quality": 100, "subsampling": 0}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})],
)
@pytest.mark.parametrize(("orientation", "stored"), [(3, "ROTATE_180"), (6, "ROTATE_90"), (5, "TRANSPOSE")])
def test_exif_orientation_is_heeded(cfg, folder, form, options, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / "train/cat/0.png").unlink()
    turned = Image.fromarray(PICTURE).transpose(Image.Transpose[stored])
    turned.save(folder / f"train/cat/0.{form}", exif=exif, **options)
    for size in (None, 12):
        found = load_data(replace(cfg, image_size=size)).train.images[0].numpy().transpose(1, 2, 0)
        assert np.abs(found.astype(int) - PICTURE).mean() < 8  # JPEG's loss


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("form", ["EPS", "ICO", "JPEG2000", "TGA", "PCX", "SGI", "DDS"])
def test_no_other_decoder_is_tried(cfg, folder, form, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, form)
    content = POSTSCRIPT if form == "EPS" else buffer.getvalue()
    (folder / "train/cat/1.png").write_bytes(content)
    Image.init()
    monkeypatch.setitem(Image.OPEN, form, (lambda *args: pytest.fail(f"{form} was tried"), None))
    for size in (None, 12):
        refused(replace(cfg, image_size=size), "1.png", "none of the formats")


@pytest.mark.parametrize(("form", "name"), [("JPEG", "0.png"), ("PNG", "0.jpg"), ("GIF", "0.jpeg"), ("WEBP", "0.bmp")])
def test_a_format_of_the_list_under_another_suffix_is_taken(cfg, folder, form, name):
    (folder / "train/cat/0.png").unlink()
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, form)
    (folder / "train/cat" / name).write_bytes(buffer.getvalue())
    assert len(load_data(cfg).train) == 6


def test_what_pillow_warns_of_is_said_once_with_the_name(cfg, folder, caplog, recwarn, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG", exif=exif)
    broken = buffer.getvalue().replace(b"MM\0*", b"MM\0*\xff\xff\xff")
    for name in ("0.jpg", "1.jpg"):
        (folder / "train/cat" / name).write_bytes(broken)
    assert len(load_data(cfg).train) == 8
    remarks = [record.getMessage() for record in caplog.records if "Pillow" in record.getMessage()]
    assert len(remarks) == 1 and "2 of them" in remarks[0] and "cat/0.jpg (Corrupt EXIF data" in remarks[0]
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_all_that_cannot_be_used_is_named_at_once(cfg, folder, caplog):
    caplog.set_level(logging.INFO)
    bad = [folder / "train/cat/a.png", folder / "train/dog/b.jpg", folder / "test/cat/c.png", folder / "test/dog/d.gif"]
    for path in bad:
        path.write_bytes(b"not an image")
    (folder / "test/dog/lost").symlink_to("/no/such/disk")
    message = refused(cfg, "5 images", str(bad[0]), str(bad[1]), "Repair, convert or remove")
    assert len(message.splitlines()) == 5
    assert all(str(path) in caplog.text for path in (*bad, folder / "test/dog/lost"))


def test_a_folder_that_cannot_be_read_is_refused_by_its_name(cfg, folder, monkeypatch):
    """Its images would be missed without a word."""
    scandir = os.scandir

    def closed(path="."):
        if os.fspath(path).endswith("cat/deep"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    put(folder / "train/cat/deep/0.png")
    monkeypatch.setattr(os, "scandir", closed)
    refused(cfg, str(folder / "train/cat/deep"), "cannot be read: Permission denied")


def test_plain_folders_are_listed_as_torchvision_does(cfg, folder, monkeypatch):
    from torchvision.datasets import ImageFolder

    from revtrain.data.imagefiles import list_images

    for name in (
        "train/cat/b/2.png",
        "train/cat/b/1/9.png",
        "train/cat/b.1/0.png",
        "train/cat/A.PNG",
        "train/dog/Z/0.bmp",
    ):
        put(folder / name)
    listing, theirs = list_images(folder / "train", by_class=True), ImageFolder(folder / "train")
    assert list(zip(listing.images, listing.labels, strict=True)) == theirs.samples
    assert listing.classes == theirs.classes


def test_real_images(tmp_path):
    if not REAL_IMAGES.is_file():
        pytest.skip("no real images: ../shared/data/cifar10-jpeg.zip is not there")
    names = [f"{split}/{c}/{i:04d}.jpg" for split in ("train", "test") for c in ("cat", "ship") for i in range(5)]
    with zipfile.ZipFile(REAL_IMAGES) as archive:
        archive.extractall(tmp_path, names)
    data = load_data(DataConfig(name="imagefolder", root=str(tmp_path), cache=str(tmp_path / "cache")))
    assert_sound(data.train, 10, 32, 2)
    assert data.classes == ("cat", "ship")
    assert (data.std > 0.1).all() and ((data.mean > 0.2) & (data.mean < 0.8)).all()


# ---- cifar10 ---------------------------------------------------------------------------------------------


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def archive(monkeypatch):
    """A tiny archive in CIFAR-10's format, whose checksums torchvision is made to expect."""
    from torchvision.datasets import CIFAR10

    generator = np.random.default_rng(0)
    names = [f"class{i}" for i in range(10)]
    files = {"batches.meta": {"label_names": names, "num_cases_per_batch": 20, "num_vis": 3072}}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (20, 3072), np.uint8)
        files[name] = {"data": data, "labels": [i % 10 for i in range(20)], "batch_label": name}
    files = {name: pickle.dumps(content, protocol=2) for name, content in files.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = stream.getvalue()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(files[n])] for n in sorted(files) if "data" in n])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    # no test reaches beyond this machine
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "*")
    return content


@pytest.fixture
def server(tmp_path):
    """The address of a local server, the folder that it serves and the requests that it got."""
    served, requests = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(served))
    ) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}", served, requests
        http_server.shutdown()
        thread.join()


@pytest.fixture
def cifar(tmp_path):
    return DataConfig(name="cifar10", root=str(tmp_path / "cifar"), own=cifar10.Settings())


def test_cifar10_is_downloaded_once_and_quietly(archive, server, cifar, capfd):
    url, served, requests = server
    (served / "mirror.tar.gz").write_bytes(archive)
    cifar = changed(cifar, url=f"{url}/mirror.tar.gz")
    first = load_data(cifar)
    assert_sound(first.train, 100, 32, 10)
    assert_sound(first.test, 20, 32, 10)
    assert first.classes == tuple(f"class{i}" for i in range(10))
    out, err = capfd.readouterr()
    assert out == ""
    assert "%" not in err and "ownload" not in err  # no progress bar, no announcement
    count = len(requests)
    assert count > 0
    second = load_data(cifar)
    assert len(requests) == count
    assert torch.equal(first.train.images, second.train.images)
    assert {path.name for path in Path(cifar.root).iterdir()} == {
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
    }


def test_cifar10_pixels_are_in_the_order_of_the_format(archive, cifar):
    Path(cifar.root).mkdir()
    (Path(cifar.root) / "cifar-10-python.tar.gz").write_bytes(archive)  # placed by hand, no host needed
    data = load_data(cifar)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        batch = pickle.load(tar.extractfile("cifar-10-batches-py/test_batch"))
    # 1024 red bytes, then green, then blue, each row by row
    assert np.array_equal(data.test.images.numpy().reshape(20, 3072), batch["data"])
    assert data.test.labels.tolist() == batch["labels"]


def test_cifar10_at_another_size(archive, cifar):
    Path(cifar.root).mkdir()
    (Path(cifar.root) / "cifar-10-python.tar.gz").write_bytes(archive)
    assert load_data(replace(cifar, image_size=16)).train.images.shape == (100, 3, 16, 16)


def test_cifar10_defaults_to_the_users_cache_folder(archive, cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    refused(replace(cifar, root=None), str(tmp_path / "xdg/revtrain/cifar10/cifar-10-python.tar.gz"))


def test_cifar10_damaged_batches_are_extracted_anew(archive, cifar):
    root = Path(cifar.root)
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    first = load_data(cifar)
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(truncate(batch.read_bytes()))
    assert torch.equal(load_data(cifar).train.images, first.train.images)


def test_cifar10_unreachable_host_names_the_three_ways_out(archive, cifar):
    with socket.socket() as probe:  # bound and not listening: the port is closed
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/cifar.tar.gz"
        message = refused(changed(cifar, url=url), url, "data.url=", "data=synthetic")
    assert len(message.splitlines()) == 2
    assert f"{cifar.root}/cifar-10-python.tar.gz" in message
    assert not list(Path(cifar.root).iterdir())


@pytest.mark.parametrize("path", ["/absent.tar.gz", None])
def test_cifar10_absent_file_or_nonsense_address(archive, server, cifar, path):
    message = refused(changed(cifar, url=server[0] + path if path else "nonsense"), "could not be downloaded")
    assert len(message.splitlines()) == 2


def test_cifar10_silent_host_is_given_up(archive, cifar, monkeypatch):
    monkeypatch.setattr("revtrain.data.cifar10.TIMEOUT_SECONDS", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = refused(changed(cifar, url=f"http://127.0.0.1:{silent.getsockname()[1]}/x"), "timed out")
    assert len(message.splitlines()) == 2 and socket.getdefaulttimeout() == before


@pytest.mark.parametrize("damage", [truncate, flip_a_pixel])
def test_cifar10_wrong_checksum_of_a_mirror_is_refused(archive, server, cifar, damage):
    url, served, _ = server
    (served / "mirror.tar.gz").write_bytes(damage(archive))
    refused(changed(cifar, url=f"{url}/mirror.tar.gz"), "mirror.tar.gz", "MD5", md5(archive), "data.url=")
    assert not list(Path(cifar.root).iterdir())  # no trace of what cannot be trusted


def test_cifar10_wrong_checksum_of_a_placed_archive_is_refused_and_kept(archive, server, cifar):
    url, served, _ = server
    (served / "mirror.tar.gz").write_bytes(archive)
    placed = Path(cifar.root) / "cifar-10-python.tar.gz"
    placed.parent.mkdir()
    placed.write_bytes(b"mine")
    refused(changed(cifar, url=f"{url}/mirror.tar.gz"), str(placed), "MD5", "Remove it")
    assert placed.read_bytes() == b"mine"


def test_cifar10_unwritable_root(archive, cifar, tmp_path):
    (tmp_path / "file").touch()
    refused(replace(cifar, root=str(tmp_path / "file" / "cifar")), str(tmp_path / "file"), "data.root=PATH")
