"""Images that stay on disk: which part of a file is taken when, and runs on them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import at_call, read_metrics, read_result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from revtrain.conf import compose as compose_as_is
from revtrain.config import ImageSize, StreamSettings, read
from revtrain.data import load_data
from revtrain.data.streamed import Item, StreamedSplit, windows
from revtrain.errors import RevtrainError
from revtrain.machine.sigterm import Terminated
from revtrain.planning.plan import loop_bytes, make_plan
from revtrain.step.feed import FromDisk
from revtrain.training import run as training

CPU = torch.device("cpu")
SIZES = ((40, 24), (16, 16), (33, 50))  # height, width


def write(path: Path, size: tuple[int, int], seed: int) -> np.ndarray:
    """A random image (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folder_of(root: Path, sizes=SIZES, train: int = 8, test: int = 4) -> Path:
    """Two classes, so many images in all, whose sizes take turns."""
    for split, count in (("train", train), ("test", test)):
        for index in range(count):
            path = root / split / ("cat", "dog")[index % 2] / f"{index:02}.png"
            write(path, sizes[index % len(sizes)], index + 100 * (split == "test"))
    return root


def config(root: Path, *words: str):
    small = (
        "arch=chunked",
        "width=4",
        "depth=2",
        "pooling=[channel]",
        "batch=4",
        "epochs=2",
        "lr=0.01",
        "probe.every=0",
    )
    return compose_as_is(["data=imagefolder", f"data.root={root}", "data.augment.cutout=0", *small, *words])


def data_of(root: Path, *words: str, divisor: int = 1, seed: int = 0):
    return load_data(read(config(root, *words)).data, divisor, seed)


def run(folder: Path, root: Path, *words: str):
    return training.train(config(root, *words), folder, list(words))


def refused(root: Path, *words: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(RevtrainError) as caught:
        run(root / f"out {len(list(root.iterdir()))}", root, *words)
    message = str(caught.value)
    assert 2 <= len(message.splitlines()) <= 5, message
    for part in parts:
        assert part in message, message


# ---- which part ------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 20)] * 2))
@settings(deadline=None, max_examples=60)
def test_windows_cover_every_pixel_and_own_it_once(whole, size):
    seen = np.zeros(whole, int)
    for window in windows(ImageSize(*whole), ImageSize(*size)):
        assert 0 <= window.top <= max(0, whole[0] - size[0]) and 0 <= window.left <= max(0, whole[1] - size[1])
        seen[
            window.top + window.seen_rows : window.top + size[0],
            window.left + window.seen_columns : window.left + size[1],
        ] += 1
    assert (seen == 1).all()


def places(split: StreamedSplit, pixels: dict[str, np.ndarray], epoch: int | None) -> list[tuple[int, int]]:
    """Where in its file each part lies."""
    found = []
    for index in range(len(split)):
        (part,), _ = split.read(torch.tensor([index]), epoch)
        whole = pixels[split.items[index // split.repeats].path]
        height, width = part.shape[1:]
        found += [
            (top, left)
            for top in range(whole.shape[0] - height + 1)
            for left in range(whole.shape[1] - width + 1)
            if np.array_equal(whole[top : top + height, left : left + width], part.permute(1, 2, 0).numpy())
        ]
    return found


def test_parts_are_of_the_file_and_follow_from_seed_epoch_and_image_alone(tmp_path):
    data = data_of(folder_of(tmp_path, [(40, 24)]), "data.crop=[8,6]", "data.crops=3")
    pixels = {item.path: np.asarray(Image.open(item.path)) for item in data.train.items}
    assert len(data.train) == 24 and len(data.test) == 4
    first, again, second = (places(data.train, pixels, epoch) for epoch in (1, 1, 2))
    assert len(first) == 24 and first == again and first != second
    assert len(set(first)) > 15 and first[:3] != first[3:6]
    other = data_of(tmp_path, "data.crop=[8,6]", "data.crops=3", "data.workers=1", seed=1)
    assert places(other.train, pixels, 1) != first
    same = data_of(tmp_path, "data.crop=[8,6]", "data.crops=3", "data.workers=1")
    assert places(same.train, pixels, 1) == first
    assert places(data.train, pixels, None) == [(16, 9)] * 24
    whole = {item.path: np.asarray(Image.open(item.path)) for item in data.test.items}
    assert places(data.test, whole, None) == [(16, 9)] * 4


def test_a_part_may_lie_at_every_place(tmp_path):
    data = data_of(folder_of(tmp_path, [(5, 4)], train=4), "data.crop=[4,3]")
    pixels = {item.path: np.asarray(Image.open(item.path)) for item in data.train.items}
    found = {place for epoch in range(1, 30) for place in places(data.train, pixels, epoch)}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_small_images_are_mirrored_at_their_borders(tmp_path):
    data = data_of(folder_of(tmp_path, [(6, 10)]), "data.crop=[10,8]")
    image, _ = data.test.read(torch.tensor([0]))
    own = np.asarray(Image.open(data.test.items[0].path)).transpose(2, 0, 1)[:, :, 1:9]
    assert np.array_equal(image[0, :, 2:8].numpy(), own)
    assert np.array_equal(image[0, :, :2].numpy(), own[:, 1::-1]) and np.array_equal(
        image[0, :, 8:].numpy(), own[:, :3:-1]
    )


def test_whole_images_keep_their_sizes_up_to_the_divisor(tmp_path):
    data = data_of(folder_of(tmp_path), "data.stream=true", divisor=4)
    assert (
        not data.train.is_uniform
        and data.image_size == (36, 52)
        and data.train.least == (16, 16)
        and data.train.greatest == (40, 52)
    )
    sizes = [tuple(images.shape[2:]) for images, _ in data.train.batches(4)]
    assert sizes == [((40, 24), (16, 16), (36, 52))[index] for index in (0, 2, 1, 0, 1, 0, 2, 1)]
    alike = data_of(folder_of(tmp_path / "b", [(13, 16)]), "data.stream=true", divisor=4)
    assert alike.train.is_uniform and alike.image_size == (16, 16)


def test_resized_and_streamed_images_are_those_in_memory(tmp_path):
    folder_of(tmp_path)
    streamed = data_of(tmp_path, "data.stream=true", "data.image_size=[12,20]")
    in_memory = data_of(tmp_path, "data.image_size=[12,20]", f"data.cache={tmp_path / 'cache'}")
    for ours, theirs in ((streamed.train, in_memory.train), (streamed.test, in_memory.test)):
        images, labels = ours.read(torch.arange(len(ours)), epoch=1)
        assert torch.equal(images, theirs.images) and torch.equal(labels, theirs.labels)
        assert torch.equal(ours.class_labels, theirs.labels)
    assert torch.equal(streamed.mean, in_memory.mean) and torch.equal(streamed.std, in_memory.std)
    both = data_of(tmp_path, "data.crop=4", "data.image_size=[12,20]")
    assert torch.equal(both.test.read(torch.arange(4))[0], in_memory.test.images[:, :, 4:8, 8:12])


def test_a_subset_of_parts_keeps_their_files(tmp_path):
    data = data_of(folder_of(tmp_path), "data.crop=8", "data.crops=2", "data.train_limit=6")
    assert data.train.files == 6 and data.train.class_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.read(torch.arange(12), 1)[1].tolist() == 6 * [0] + 6 * [1]


def test_no_more_than_two_batches_are_read_at_a_time(tmp_path, monkeypatch):
    """The set is never in memory: while a batch is at work, the next one is read, and none beyond it."""
    data = data_of(folder_of(tmp_path, train=12), "data.crop=8")
    feed, reading = FromDisk(data.train, CPU), []
    original = StreamedSplit.begin
    monkeypatch.setattr(
        StreamedSplit,
        "begin",
        lambda self, picked, epoch=None: reading.append(picked.tolist()) or original(self, picked, epoch),
    )
    batches = torch.arange(12).split(4)
    for batch, following in zip(batches, (*batches[1:], None), strict=True):
        feed.load(batch, 1)
        if following is not None:
            feed.begin(following, 1)
        assert torch.equal(feed.take(slice(0, 4), batch)[0], data.train.read(batch, 1)[0])
    own = [each for each in reading if len(each) == 4]
    assert own == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_what_was_read_ahead_for_something_else_is_not_taken(tmp_path):
    data = data_of(folder_of(tmp_path), "data.crop=8")
    feed = FromDisk(data.train, CPU)
    for ahead, epoch in ((torch.tensor([4, 5]), 1), (torch.tensor([0, 1]), 2)):
        feed.begin(ahead, epoch)
        feed.load(torch.tensor([0, 1]), 1)
        assert torch.equal(feed.take(slice(0, 2), torch.tensor([0, 1]))[0], data.train.read(torch.tensor([0, 1]), 1)[0])


def test_reading_ends_with_who_waits_for_it(tmp_path):
    data = data_of(folder_of(tmp_path, train=40), "data.crop=8", "data.workers=1")
    turns = data.train.batches(20)
    next(turns)
    turns.close()
    feed = FromDisk(data.train, CPU)
    feed.begin(torch.arange(40), 1)
    last = feed._next[2][-1]
    feed.close()
    assert last.cancelled()


# ---- runs ------------------------------------------------------------------------------------------------


def test_a_streamed_run_is_that_of_images_in_memory(tmp_path):
    folder_of(tmp_path, [(16, 24)])
    words = ("data.augment.pad=2", "data.augment.cutout=3")
    lines = []
    for name, own in (("disk", "data.stream=true"), ("memory", f"data.cache={tmp_path / 'cache'}")):
        run(tmp_path / name, tmp_path, *words, own)
        lines.append(
            [
                {key: line[key] for key in line if "seconds" not in key and "per_second" not in key}
                for line in read_metrics(tmp_path / name)
            ]
        )
    assert lines[0] == lines[1] and lines[0][2]["loss_train"] is not None


def test_images_of_different_sizes_train_one_by_one(tmp_path):
    folder_of(tmp_path)
    result = run(tmp_path / "one", tmp_path, "data.stream=true", "batch=4", "accumulate=4")
    assert result["status"] == "completed" and result["epochs"] == 2 and result["test_accuracy"] is not None
    with_one = run(tmp_path / "two", tmp_path, "data.stream=true", "batch=1")
    assert with_one["status"] == "completed"
    refused(tmp_path, "data.stream=true", parts=("differ in size", "34x50", "accumulate=4", "data.crop"))


def test_a_run_on_parts_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Interrupted within an epoch: what was read ahead is read again, and is the same."""
    folder_of(tmp_path)
    words = ("data.crop=8", "data.crops=2", "data.augment.colour=0.3", "data.augment.flip_vertical=true")
    run(tmp_path / "whole", tmp_path, *words)
    with monkeypatch.context() as patch:
        at_call(patch, "draw_augmentation", 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated):
            run(tmp_path / "cut", tmp_path, *words)
    resumed = compose_as_is([f"resume={tmp_path / 'cut'}"])
    training.train(resumed, tmp_path / "rest", [])
    kept = ("loss_train", "loss_test", "accuracy_train", "accuracy_test")
    whole, rest = (
        [[line[key] for key in kept] for line in read_metrics(tmp_path / name)] for name in ("whole", "rest")
    )
    assert whole == rest


def test_a_file_that_is_damaged_ends_the_run_with_its_name(tmp_path):
    folder_of(tmp_path)
    damaged = tmp_path / "train" / "dog" / "01.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    refused(tmp_path, "data.crop=8", "data.train_limit=8", parts=("01.png", "damaged"))
    assert read_result(next(tmp_path.glob("out*")))["status"] == "failed"


def test_the_plan_is_that_of_a_part(tmp_path):
    plan = make_plan(read(config(tmp_path, "data.crop=[64,32]", "data.classes=2")), CPU)
    assert plan.image_size == (64, 32) and not plan.assumptions
    words = ("data.image_size=32", "data.classes=2", "probe.every=0")
    streamed, held = (read(config(tmp_path, *words, *own)) for own in (["data.stream=true"], []))
    more, less = (loop_bytes(each, CPU, 4, 32, 100)[0] for each in (streamed, held))
    assert more - less == 3 * 4 * (3 * 32**2 + 8)


def test_a_large_set_needs_no_room_where_it_is_streamed(tmp_path, monkeypatch):
    folder_of(tmp_path, [(16, 16)])
    monkeypatch.setattr(os, "sysconf", lambda name: 64)
    refused(tmp_path, "data.cache=" + str(tmp_path / "cache"), parts=("data.stream=true", "GiB"))
    assert run(tmp_path / "ok", tmp_path, "data.stream=true", "epochs=1")["status"] == "completed"


def test_values_that_no_run_could_use_are_refused(tmp_path):
    folder_of(tmp_path)
    refused(tmp_path, "data.crop=9", parts=("9x9", "data.crop=8"))
    refused(tmp_path, "data.stream=true", "data.augment.pad=16", "accumulate=4", parts=("data.augment.pad=16", "16x16"))
    refused(tmp_path, "data.crop=8", "data.level=1", parts=("Level 1", "slides"))
    refused(tmp_path, "data.crops=3", parts=("data.crops=3", "without data.crop"))
    with pytest.raises(RevtrainError, match=r"data\.crop=8 was given; data=cifar10"):
        read(compose_as_is(["data.crop=8"]))


def test_the_settings_are_those_of_the_configuration(tmp_path):
    own = read(config(tmp_path, "data.crop=[8,16]", "data.workers=2")).data.own
    assert isinstance(own, StreamSettings) and own.crop_size == (8, 16) and own.streams
    assert json.loads(json.dumps(own.crop)) == [8, 16]
    assert not read(config(tmp_path)).data.streams and read(config(tmp_path, "data.stream=true")).data.streams


def test_an_item_stands_for_its_file(tmp_path):
    pixels = write(tmp_path / "a.png", (8, 8), 0)
    split = StreamedSplit([Item(str(tmp_path / "a.png"), 3)], StreamSettings(crop=8))
    images, labels = split.read(torch.tensor([0]))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels) and labels.tolist() == [3]


def test_slides_are_read_at_a_level_of_their_pyramid(tmp_path, request):
    vips, _ = pytest.importorskip("pyvips"), pytest.importorskip("openslide")
    for index, split in enumerate(("train", "train", "test", "test")):
        path = tmp_path / split / "ab"[index % 2] / "slide.svs"
        path.parent.mkdir(parents=True)
        pixels = np.random.default_rng(index).integers(0, 256, (64, 96, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        saved = {"tile": True, "pyramid": True, "compression": "deflate", "tile_width": 64, "tile_height": 64}
        vips.Image.new_from_array(pixels).tiffsave(str(path), **saved)
    data = data_of(tmp_path, "data.crop=[32,48]", "data.level=1")
    (centre,), _ = data.test.read(torch.tensor([0]))
    expected = np.asarray(Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)))
    assert np.abs(centre[:, 2::4, 2::4].numpy().astype(int) - expected[28:36, 42:54].transpose(2, 0, 1)).max() <= 2
    whole = data_of(tmp_path, "data.stream=true", "data.level=3", divisor=2)
    assert whole.image_size == (64, 96)
    resized = data_of(tmp_path, "data.stream=true", "data.image_size=[64,96]", "data.level=3")
    images, labels = resized.test.read(torch.arange(2))
    assert torch.equal(images, whole.test.read(torch.arange(2))[0]) and labels.tolist() == [0, 1]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_on_its_side_and_its_mask_are_turned_together(tmp_path, orientation, compression):
    """Pillow maps uncompressed ones into memory as if they were stored turned."""
    mask = np.random.default_rng(0).integers(0, 3, (20, 12), np.uint8)
    paths = [str(tmp_path / f"{name}.tif") for name in ("image", "mask")]
    for path, pixels in zip(paths, (mask * 100, mask), strict=True):
        Image.fromarray(pixels).save(path, tiffinfo={274: orientation}, compression=compression)
    split = StreamedSplit([Item(paths[0], mask=paths[1])], StreamSettings(crop=[12, 12]), classes=3)
    images, labels = split.read(torch.arange(1), 1)
    assert torch.equal(images[0, 0], labels[0] * 100) and labels.unique().tolist() == [0, 1, 2]


# ---- faults that once were -------------------------------------------------------------------------------


def test_mean_and_deviation_are_of_all_of_the_image_not_of_its_centre(tmp_path):
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 0
    for split in ("train", "test"):
        path = tmp_path / split / "a" / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    data = data_of(tmp_path, "data.crop=32")
    assert 0.35 < data.mean[0] < 0.7 and data.std[0] > 0.4  # the centre alone is black


def test_limits_count_images_and_keep_all_of_their_parts(tmp_path):
    folder_of(tmp_path, [(16, 24)], train=8, test=4)
    data = data_of(tmp_path, "data.crop=8", "data.crops=3", "data.train_limit=4", "data.test_limit=2")
    assert (data.train.files, len(data.train), data.test.files, len(data.test)) == (4, 12, 2, 2)


def test_an_image_that_changes_its_size_is_named(tmp_path):
    data = data_of(folder_of(tmp_path, [(32, 32)]), "data.stream=true")
    write(Path(data.train.items[0].path), (16, 16), 0)
    write(Path(data.train.items[1].path), (48, 48), 0)
    for index in (0, 1):
        with pytest.raises(RevtrainError, match="another size than it had"):
            data.train.read(torch.tensor([index]))


def test_the_steps_before_a_damaged_file_are_kept(tmp_path, monkeypatch):
    """Repaired, the run goes on to the bits that it would have come to."""
    folder_of(tmp_path)
    run(tmp_path / "whole", tmp_path, "data.crop=8", "batch=2", "epochs=1")
    sound = {path: path.read_bytes() for path in tmp_path.glob("train/*/*")}
    step, calls = training.Run.step, []

    def then_damaged(self, *args):
        calls.append(1)
        if len(calls) == 3:
            for path in sound:
                path.write_bytes(b"nothing")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", then_damaged)
        with pytest.raises(RevtrainError, match="damaged"):
            run(tmp_path / "cut", tmp_path, "data.crop=8", "batch=2", "epochs=1")
    for path, content in sound.items():
        path.write_bytes(content)
    kept = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["partial"]
    assert kept["step"] in (2, 3)  # the third batch had perhaps been read
    training.train(compose_as_is([f"resume={tmp_path / 'cut'}", "data.workers=2"]), tmp_path / "rest", [])
    whole, rest = (read_metrics(tmp_path / name)[-1] for name in ("whole", "rest"))
    assert whole["loss_train"] == rest["loss_train"] and whole["loss_test"] == rest["loss_test"]


def test_cutouts_reach_all_of_a_large_image_beside_a_small_one():
    from revtrain.config import AugmentConfig
    from revtrain.data import augment, draw_augmentation

    cfg = AugmentConfig(pad=0, flip=False, cutout=12)
    draws = draw_augmentation(400, [64, 48], cfg, torch.Generator().manual_seed(0))
    for height, width in ((64, 48), (16, 20)):
        white = torch.full((400, 3, height, width), 255, dtype=torch.uint8)
        hidden = augment(white, draws, torch.zeros(3), torch.ones(3), cfg)[:, 0] == 0
        assert hidden.any(0).all() and hidden.flatten(1).any(1).all()


def test_auto_takes_images_of_different_sizes_one_at_a_time(tmp_path):
    folder_of(tmp_path)
    result = run(tmp_path / "run", tmp_path, "data.stream=true", "batch=auto", "memory_limit=1GiB", "epochs=1")
    assert result["status"] == "completed" and result["config"]["batch"] == 1
