"""task=segment on the command line: masks, their augmentation, runs and what they log."""

from __future__ import annotations

import math
import os
import re
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import at_call, read_checkpoint, read_metrics, read_result
from PIL import Image

from revtrain.conf import compose as compose_as_is
from revtrain.config import IGNORED, AugmentConfig, DataConfig, read
from revtrain.data import augment, augment_masks, draw_augmentation, load_data, normalise
from revtrain.data.augmentation import Draws, draw_columns
from revtrain.errors import RevtrainError
from revtrain.machine.sigterm import Terminated
from revtrain.models import build_model
from revtrain.objective import accuracy, iou_of_classes, mean_iou
from revtrain.planning.plan import make_plan
from revtrain.runs.dashboard import LAYOUT
from revtrain.training import run as training

SMALL = (
    "task=segment", "width=4", "depth=3", "pooling=[channel]", "data.train_images=30", "data.test_images=20",
    "data.image_size=16", "batch=8", "epochs=2", "lr=0.05", "probe.batch=4", "device=cpu",
)  # fmt: skip
IN_FOLDERS = (
    "task=segment", "data=maskfolder", "width=4", "depth=3", "pooling=[channel]", "batch=2", "epochs=2", "lr=0.05",
    "probe.every=0", "device=cpu",
)  # fmt: skip
OFF = AugmentConfig(pad=0, flip=False, cutout=0)


def run(folder: Path, *words: str, base=SMALL):
    return training.train(compose_as_is([*base, *words]), folder, list(words))


# ---- images with masks -----------------------------------------------------------------------------------


def test_drawn_masks_show_where_the_shapes_of_the_same_images_are():
    plain, with_masks = (
        load_data(read(compose_as_is([*words, "data.train_images=40", "data.test_images=20"])).data)
        for words in (["data=synthetic"], ["task=segment"])
    )
    masks, labels = with_masks.train.labels, plain.train.labels
    assert torch.equal(with_masks.train.images, plain.train.images) and masks.dtype == torch.uint8
    assert with_masks.classes == ("background", *plain.classes)
    share = (masks > 0).float().mean((1, 2))
    assert share.min() > 0.05 and share.max() < 0.6
    assert all(set(mask.unique().tolist()) == {0, int(label) + 1} for mask, label in zip(masks, labels, strict=True))


def written(folder: Path, sizes, numbers=(0, 1, 2), seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and masks of these sizes in `folder`; what was written, by name."""
    found, generator = {}, np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        mask = generator.choice(np.array(numbers, np.uint8), size)
        mask.flat[: len(numbers)] = numbers
        image = np.stack([mask * 50, 255 - mask, generator.integers(0, 256, size, np.uint8)], 2).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.tif")
        found[str(index)] = image, mask
    return found


def pairs(root: Path, numbers=(0, 1, 2)) -> Path:
    written(root / "train", [(24, 16), (16, 16), (18, 30), (16, 20)], numbers)
    written(root / "test", [(20, 28), (16, 16)], numbers, seed=1)
    return root


def masks_of(root: Path, *words: str):
    return load_data(read(compose_as_is([*IN_FOLDERS, f"data.root={root}", *words])).data, 2)


def test_masks_in_folders_are_read_with_their_images(tmp_path):
    data = masks_of(pairs(tmp_path))
    assert data.classes == ("background", "1", "2") and not data.train.is_uniform
    for (images, labels), item in zip(data.train.batches(1), data.train.items, strict=True):
        height, width = np.asarray(Image.open(item.mask)).shape
        assert np.array_equal(labels[0].numpy()[:height, :width], np.asarray(Image.open(item.mask)))
        assert labels.dtype == torch.uint8 and images.shape[2:] == labels.shape[1:]


def test_parts_of_masks_are_those_of_images(tmp_path):
    data = masks_of(pairs(tmp_path), "data.crop=12", "data.crops=4")
    images, labels = data.train.read(torch.arange(16), 1)
    assert torch.equal(images[:, 0], labels * 50) and torch.equal(images[:, 1], 255 - labels)
    larger = masks_of(tmp_path, "data.crop=[20,40]").train.read(torch.arange(4), 1)
    inside = larger[1] != IGNORED
    assert torch.equal(larger[0][:, 0][inside], larger[1][inside] * 50)
    assert [int(each.sum()) for each in inside] == [20 * 16, 16 * 16, 18 * 30, 16 * 20]


def test_windows_of_test_images_hold_every_pixel_once(tmp_path):
    data = masks_of(pairs(tmp_path), "data.crop=12")
    assert len(data.test) == 2 * 3 + 2 * 2
    counted = sum(
        (torch.bincount(labels.flatten().long(), minlength=256) for _, labels in data.test.batches(4)),
        torch.zeros(256, dtype=torch.int64),
    )
    true = np.bincount(
        np.concatenate([np.asarray(Image.open(path)).ravel() for path in (tmp_path / "test/masks").iterdir()]),
        minlength=256,
    )
    assert counted[:IGNORED].tolist() == true[:IGNORED].tolist()


def test_resized_masks_have_no_classes_between(tmp_path):
    data = masks_of(pairs(tmp_path, numbers=(0, 2)), "data.image_size=[10,14]", "data.classes=3")
    _, labels = data.train.read(torch.arange(4))
    assert labels.shape == (4, 10, 14) and set(labels.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("numbers", [(0, 255), (0, 1)], ids=str)
def test_two_numbers_are_background_and_the_rest(tmp_path, numbers):
    data = masks_of(pairs(tmp_path, numbers))
    assert data.classes == ("background", "1") and set(data.train.read(torch.arange(4))[1].unique().tolist()) == {0, 1}


def test_objects_are_one_class(tmp_path):
    pairs(tmp_path)
    for path in (tmp_path / "train/masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)).astype(np.int32) * 300).save(path)
    data = masks_of(tmp_path, "data.binary=true")
    assert data.classes == ("background", "1") and set(data.train.read(torch.arange(4))[1].unique().tolist()) == {0, 1}


def test_many_classes_may_be_objects_and_a_line_says_so(tmp_path, caplog):
    Image.fromarray((np.arange(256) % 60).astype(np.uint8).reshape(16, 16)).save(pairs(tmp_path) / "train/masks/1.tif")
    assert len(masks_of(tmp_path).classes) == 60 and "name 60 classes" in caplog.text
    caplog.clear()
    masks_of(tmp_path, "data.classes=60")
    assert "name 60 classes" not in caplog.text


def test_a_file_may_name_the_classes(tmp_path):
    (pairs(tmp_path) / "classes.txt").write_text("ground\ncell\n\ndebris\n")
    assert masks_of(tmp_path).classes == ("ground", "cell", "debris")


def spoil_size(root):
    Image.new("L", (9, 9)).save(root / "train/masks/1.tif")


def spoil_colours(root):
    Image.new("RGB", (16, 16)).save(root / "train/masks/1.tif")


def spoil_numbers(root):
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(root / "test/masks/1.tif")


def spoil_names(root):
    (root / "classes.txt").write_text("one\ntwo\nthree\nfour\n")


def spoil_stems(root):
    Image.new("RGB", (16, 16)).save(root / "train/images/1.bmp")


def many_objects(root):
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16) * 2).save(root / "train/masks/1.tif")


def cut_short(root):
    path = root / "train/masks/1.tif"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "words", "parts"),
    [
        (lambda root: (root / "train/masks/2.tif").unlink(), (), ("1 of 4 images", "'2'", "train/masks")),
        (lambda root: (root / "test/masks").rename(root / "test/other"), (), ("no folder", "test/masks")),
        (
            lambda root: [each.unlink() for each in (root / "train/images").iterdir()],
            (),
            ("train/images has no image",),
        ),
        (spoil_size, (), ("1.tif", "9x9", "16x16")),
        (spoil_colours, (), ("1.tif", "colours", "RGB")),
        (spoil_numbers, ("data.classes=3",), ("hold 7", "of 3 classes", "data.classes=8")),
        (spoil_names, ("data.classes=3",), ("classes.txt", "4 classes", "data.classes=3")),
        (cut_short, (), ("1.tif", "damaged")),
        (spoil_stems, (), ("1.bmp", "1.png", "one name")),
        (many_objects, (), ("up to 510", "at most 255", "data.binary=true")),
        (lambda root: None, ("data.root=null",), ("without data.root",)),
        (lambda root: None, ("data.root=nowhere",), ("nowhere", "no folder")),
    ],
    ids=[
        "no mask",
        "no masks",
        "no images",
        "size",
        "colours",
        "numbers",
        "names",
        "damaged",
        "stems",
        "objects",
        "no root",
        "nowhere",
    ],
)
def test_masks_that_cannot_be_used_are_refused(tmp_path, spoil, words, parts):
    spoil(pairs(tmp_path))
    with pytest.raises(RevtrainError) as caught:
        data = masks_of(tmp_path, *words)
        for split in (data.train, data.test):
            list(split.batches(1))
    message = str(caught.value)
    assert 2 <= len(message.splitlines()) <= 5, message
    for part in parts:
        assert part in message.replace('"', "'") or part.strip("'") in message, message


# ---- augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [AugmentConfig(pad=3, flip=True, flip_vertical=True, cutout=0), OFF])
def test_masks_move_as_images_do(cfg):
    masks = torch.randint(0, 5, (6, 12, 10), dtype=torch.uint8)
    images = masks[:, None].expand(-1, 3, -1, -1).contiguous()
    draws = draw_augmentation(6, [12, 10], cfg, torch.Generator().manual_seed(0))
    zero, one = torch.zeros(3), torch.ones(3)
    moved = (augment(images, draws, zero, one, cfg) * 255).round().byte()
    assert torch.equal(moved[:, 1], augment_masks(masks, draws, cfg))
    assert torch.equal(moved[:, 0], masks) is (cfg is OFF)


def test_what_a_cutout_hides_counts_for_nothing():
    cfg = AugmentConfig(pad=0, flip=False, cutout=4)
    draws = Draws(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]), torch.tensor([[5, 5]]))
    found = augment_masks(torch.ones(1, 10, 10, dtype=torch.uint8), draws, cfg)[0]
    hidden = found == IGNORED
    assert hidden[3:7, 3:7].all() and hidden.sum() == 16 and set(found.unique().tolist()) == {1, IGNORED}


def test_vertical_flips_turn_half_of_the_images_over():
    cfg = AugmentConfig(pad=0, flip=False, flip_vertical=True, cutout=0)
    images = torch.randint(0, 256, (200, 3, 6, 4), dtype=torch.uint8)
    draws = draw_augmentation(200, [6, 4], cfg, torch.Generator().manual_seed(0))
    found = augment(images, draws, torch.zeros(3), torch.ones(3), cfg)
    plain = normalise(images, torch.zeros(3), torch.ones(3))
    over, same = ((found == each).flatten(1).all(1) for each in (plain.flip(2), plain))
    assert (over ^ same).all() and 70 < over.sum() < 130


def test_further_draws_leave_the_others_as_they_are_and_travel_as_numbers():
    plain, more = AugmentConfig(), AugmentConfig(flip_vertical=True, colour=0.4)
    first, second = (draw_augmentation(50, 32, cfg, torch.Generator().manual_seed(3)) for cfg in (plain, more))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True)) and first[3:] == (None, None)
    for draws, cfg in ((first, plain), (second, more)):
        packed = draws.packed()
        assert packed.shape == (50, draw_columns(cfg)) and packed.dtype == torch.int64
        for own, again in zip(draws, Draws.unpacked(packed, cfg), strict=True):
            assert own is again is None or torch.equal(own, again)


def reference_colours(image: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """Brightness, contrast and saturation of one image (3, H, W) in 0..1, each as its definition has it."""
    brightness, contrast, saturation = factors

    def grey(of: torch.Tensor) -> torch.Tensor:
        return 0.299 * of[0] + 0.587 * of[1] + 0.114 * of[2]

    image = image * brightness
    image = contrast * image + (1 - contrast) * grey(image).mean()
    return (saturation * image + (1 - saturation) * grey(image)).clamp(0, 1)


def test_colours_change_by_the_drawn_factors():
    cfg = AugmentConfig(pad=0, flip=False, cutout=0, colour=0.5)
    images = torch.randint(0, 256, (8, 3, 9, 7), dtype=torch.uint8)
    draws = draw_augmentation(8, [9, 7], cfg, torch.Generator().manual_seed(0))
    found = augment(images, draws, torch.zeros(3), torch.ones(3), cfg)
    for index, drawn in enumerate(draws.colours.tolist()):
        factors = [1 + 0.5 * (2 * each / 2**16 - 1) for each in drawn]
        assert all(0.5 <= each <= 1.5 for each in factors)
        torch.testing.assert_close(found[index], reference_colours(images[index] / 255, factors))
    assert len({tuple(each) for each in draws.colours.tolist()}) == 8


# ---- what is counted -------------------------------------------------------------------------------------


def test_figures_of_hits_are_those_of_their_definitions():
    hits = torch.tensor([[50, 5, 0], [10, 30, 0], [0, 0, 0]])
    assert accuracy(hits, 7) == pytest.approx(80 / 95) and accuracy(torch.tensor(3), 4) == 0.75
    assert iou_of_classes(hits) == [pytest.approx(50 / 65), pytest.approx(30 / 45), None]
    assert mean_iou(hits) == pytest.approx(30 / 45) and mean_iou(torch.tensor(3)) is None
    assert mean_iou(torch.tensor([[9, 0], [0, 0]])) is None and accuracy(torch.zeros(2, 2), 1) == 0


# ---- runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented")
    return run(folder), folder


def test_a_run_logs_accuracy_and_overlap_of_pixels(segmented):
    result, folder = segmented
    first, *lines = read_metrics(folder)
    assert result == read_result(folder) and result["status"] == "completed" and first["iou_test"] is None
    for line in lines:
        assert 0 < line["accuracy_test"] < 1 and 0 < line["accuracy_train"] < 1
        known = [value for name, value in line["iou_of_classes"].items() if name != "background" and value is not None]
        assert len(line["iou_of_classes"]) == 11 and line["iou_test"] == pytest.approx(sum(known) / len(known))
    assert result["test_iou"] == lines[-1]["iou_test"] and result["test_accuracy"] == lines[-1]["accuracy_test"]
    assert result["snr_db"]["minimum"] > 60 and result["gradients_trusted"]


def test_the_figures_are_those_of_the_logits_of_the_checkpoint(segmented):
    result, folder = segmented
    cfg = compose_as_is(SMALL)
    data = load_data(read(cfg).data)
    model = build_model(cfg, 11, 16).eval()
    model.load_state_dict(read_checkpoint(folder)["model"])
    with torch.no_grad():
        logits = model(normalise(data.test.images, data.mean, data.std))
    truth, taken = data.test.labels.long(), logits.argmax(1)
    assert result["test_accuracy"] == pytest.approx((taken == truth).double().mean().item())
    overlap = []
    for index in range(1, 11):
        own, found = truth == index, taken == index
        overlap.append(((own & found).sum() / (own | found).sum()).item())
    assert result["test_iou"] == pytest.approx(sum(overlap) / 10)
    line = read_metrics(folder)[-1]
    assert line["loss_test"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5)


def test_the_dashboard_shows_the_overlap(segmented):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(segmented[1])).Reload()
    tags = events.Tags()["scalars"]
    assert {"iou/test", "iou/train", "iou/class/background", "iou/class/star", "accuracy/test"} <= set(tags)
    assert events.Scalars("iou/test")[-1].value == pytest.approx(segmented[0]["test_iou"])
    charted = [chart[1] for group in LAYOUT.values() for chart in group.values()]
    for tag in tags:
        assert sum(re.match(pattern, tag) is not None for patterns in charted for pattern in patterns) == 1, tag


def test_rebuilding_trains_as_storing_does(tmp_path):
    losses = [
        run(tmp_path / mode, f"backward={mode}") and read_metrics(tmp_path / mode) for mode in ("invert", "store")
    ]
    for ours, theirs in zip(*(each[1:] for each in losses), strict=True):
        assert ours["loss_train"] == pytest.approx(theirs["loss_train"], rel=1e-4)


@pytest.mark.parametrize("words", [("data.crop=12", "data.crops=2"), ("accumulate=2",)], ids=["parts", "whole"])
def test_a_run_on_folders_resumes_within_an_epoch_to_the_same_bits(tmp_path, monkeypatch, words):
    base = (*IN_FOLDERS, f"data.root={pairs(tmp_path / 'data')}")
    run(tmp_path / "whole", *words, base=base)
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        at_call(patch, "draw_augmentation", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(tmp_path / "cut", *words, base=base)
    training.train(compose_as_is([f"resume={tmp_path / 'cut'}"]), tmp_path / "rest", [])
    kept = ("loss_train", "loss_test", "accuracy_train", "accuracy_test", "iou_train", "iou_test")
    whole, rest = (
        [[line[key] for key in kept] for line in read_metrics(tmp_path / each)] for each in ("whole", "rest")
    )
    assert whole == rest and not math.isnan(whole[-1][0])


def test_the_plan_counts_masks_in_bytes():
    words = ("task=segment", "data.image_size=64", "batch=4", "width=8")
    plan = make_plan(read(compose_as_is(words)), torch.device("cpu"))
    assert plan.classes == 11 and plan.image_size == (64, 64) and not plan.assumptions
    assert plan.peak_bytes < 2 * plan.activation_bytes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["task=segment", "arch=chunked"], ("arch=chunked", "task=segment", "arch=unet", "task=classify")),
        (["arch=unet"], ("arch=unet", "task=classify", "Add task=segment")),
        (["task=segment", "data=cifar10"], ("data=cifar10", "data=maskfolder", "data=synthetic_masks")),
        (["data=synthetic_masks"], ("data=synthetic_masks", "Add task=segment")),
        (["task=segment", "label_smoothing=0.1"], ("label_smoothing=0.1", "Leave")),
        (["task=segment", "test_flip=true"], ("test_flip", "Leave")),
        (["task=detect"], ("detect",)),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_the_task_is_refused(words, parts):
    with pytest.raises(Exception, match="task") as caught:
        read(compose_as_is(words))
    for part in parts:
        assert part in str(caught.value)


def test_a_task_brings_its_architecture_and_data():
    config = read(compose_as_is(["task=segment"]))
    assert (config.network.arch, config.data.name, config.data.augment.cutout) == ("unet", "synthetic_masks", 0)
    assert isinstance(config.data, DataConfig) and read(compose_as_is([])).network.task == "classify"


# ---- faults that once were -------------------------------------------------------------------------------


def one_pair(folder: Path, mask: Image.Image, image: Image.Image | None = None, **saved) -> Path:
    """A data set of one image, for training and test."""
    for split in ("train", "test"):
        for part, content in (("images", image or Image.new("RGB", mask.size)), ("masks", mask)):
            (folder / split / part).mkdir(parents=True)
            content.save(folder / split / part / "a.png", **(saved if part == "masks" else {}))
    return folder


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits_keep_their_numbers(tmp_path, bits):
    """Pillow multiplies them, so that the highest is white."""
    numbers = np.random.default_rng(0).integers(0, 4, (8, 12)).astype(np.uint8)
    packed = np.zeros((8, 12 * bits // 8), np.uint8)
    for column in range(12):
        packed[:, column * bits // 8] |= numbers[:, column] << (8 - bits - column * bits % 8)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return len(content).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = (12).to_bytes(4, "big") + (8).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    one_pair(tmp_path, Image.new("L", (12, 8)))
    for split in ("train", "test"):
        (tmp_path / split / "masks/a.png").write_bytes(content)
    data = masks_of(tmp_path)
    assert len(data.classes) == 4 and np.array_equal(data.test.read(torch.arange(1))[1][0].numpy(), numbers)


def test_lossy_masks_are_refused(tmp_path):
    one_pair(tmp_path, Image.new("L", (16, 16), 1))
    Image.new("L", (16, 16), 1).save(tmp_path / "train/masks/a.png", "JPEG")
    with pytest.raises(RevtrainError, match=r"JPEG changes numbers"):
        masks_of(tmp_path)


def test_a_mask_of_another_size_is_refused_also_where_both_are_resized(tmp_path):
    one_pair(tmp_path, Image.new("L", (32, 64)), Image.new("RGB", (64, 32)))
    with pytest.raises(RevtrainError, match=r"32x64 pixels, its image 64x32"):
        masks_of(tmp_path, "data.image_size=16")


def test_what_255_means_is_kept_with_the_run(tmp_path):
    from revtrain.inference.evaluate import evaluate
    from revtrain.inference.restore import restore

    plain, white = pairs(tmp_path / "plain", (0, 1)), pairs(tmp_path / "white", (0, 255))
    trained = {}
    for name, root in (("plain", plain), ("white", white)):
        run(tmp_path / "runs" / name, f"data.root={root}", "accumulate=2", "epochs=1", "probe.every=0", base=IN_FOLDERS)
        trained[name] = restore(tmp_path / "runs" / name)
    assert not trained["plain"].binary and trained["white"].binary
    ignoring = evaluate(trained["plain"], str(white))
    assert ignoring.confusion[1].sum() == 0 < ignoring.confusion[0].sum()
    assert (evaluate(trained["white"], str(white)).confusion.sum(1) > 0).all()
    for path in (white / "test/masks").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(RevtrainError, match="No pixel of"):
        evaluate(trained["plain"], str(white))
    assert masks_of(white, "data.classes=3").classes == ("background", "1", "2")
    assert not masks_of(white, "data.classes=3").train.binary


def test_the_loss_of_a_test_set_is_the_mean_of_its_pixels(tmp_path):
    """Windows at an edge have few pixels of their own."""
    base = (*IN_FOLDERS, f"data.root={pairs(tmp_path)}", "epochs=1", "probe.every=0")
    run(tmp_path / "run", "data.crop=12", base=base)
    state, cfg = read_checkpoint(tmp_path / "run"), read(compose_as_is([*base, "data.crop=12"]))
    data = load_data(cfg.data, 2)
    model = build_model(cfg, 3, 12).eval()
    model.load_state_dict(state["model"])
    losses = []
    for images, labels in data.test.batches(1):
        with torch.no_grad():
            logits = model(normalise(images, data.mean, data.std))
        losses.append(F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none")[labels != IGNORED])
    assert read_metrics(tmp_path / "run")[-1]["loss_test"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_names_that_look_the_same_are_the_same(tmp_path):
    one_pair(tmp_path, Image.new("1", (8, 8)))
    for split in ("train", "test"):
        (tmp_path / split / "images/a.png").rename(tmp_path / split / "images/gr\u00fcn.png")
        (tmp_path / split / "masks/a.png").rename(tmp_path / split / "masks/gru\u0308n.png")
    assert len(masks_of(tmp_path).train) == 1
