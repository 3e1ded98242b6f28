"""revtrain-eval and revtrain-export of networks for pixels, and of those whose images were read from disk."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_metrics
from PIL import Image

from revtrain import figures
from revtrain.cli.inference import evaluate_main, export_main
from revtrain.conf import compose
from revtrain.config import ImageSize
from revtrain.inference import export as exporting
from revtrain.inference.evaluate import evaluate
from revtrain.inference.predict import predict
from revtrain.inference.restore import Trained, own_data, restore
from revtrain.training.run import train

CLASSES = ("ground", "box", "bar")
# height x width: none that a pooling divides but the last, and smaller and larger ones than a crop
SIZES = ((19, 33), (13, 11), (40, 21), (24, 16))
A_MOMENT = ("epochs=1", "lr=0.05", "probe.every=0", "device=cpu", "pooling=[channel]", "depth=3", "width=4")
# what is given to a run for pixels, and whether each of its test pixels is judged where it lies in its file
OWN = {
    "drawn": (("data.train_images=20", "data.test_images=10", "batch=4"), False),
    "whole": (("data=maskfolder", "batch=1"), True),
    "crop": (("data=maskfolder", "data.crop=16", "data.crops=2", "batch=3"), True),
    "resized": (("data=maskfolder", "data.image_size=16", "batch=3"), False),
    "resized_crop": (("data=maskfolder", "data.image_size=24", "data.crop=16", "batch=3"), False),
}
FOLDERS = [case for case in OWN if case != "drawn"]


def drawn(seed, size):
    """An image (H, W, 3) with two rectangles, and its mask: 0 and their classes, a corner that counts for nothing."""
    noise = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4 : size[0] // 2, 2:-3] = 1
    mask[2:-2, size[1] // 3 : size[1] // 2] = 2
    image = noise.integers(0, 120, (*size, 3)) + 60 * mask[..., None]
    mask[:2, :2] = 255
    return image.astype(np.uint8), mask


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folders of images and masks of different sizes."""
    root = tmp_path_factory.mktemp("pairs")
    for split in ("train", "test"):
        for number, size in enumerate(SIZES):
            image, mask = drawn(number + 10 * len(split), size)
            for part, pixels in (("images", image), ("masks", mask)):
                path = root / split / part / "near" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def runs(pairs, tmp_path_factory):
    """`runs(case)`: the run directory and the result of a run for pixels, trained when it is first asked for."""
    made = {}

    def run(case):
        if case not in made:
            words, folder = [*OWN[case][0]], tmp_path_factory.mktemp(case) / "run"
            root = [] if case == "drawn" else [f"data.root={pairs}"]
            made[case] = folder, train(compose(["task=segment", *A_MOMENT, *words, *root]), folder)
        return made[case]

    return run


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """Images of two classes and of different sizes."""
    root = tmp_path_factory.mktemp("classes")
    for split in ("train", "test"):
        for number, size in enumerate((*SIZES, *SIZES)):
            name = ("dark", "light")[number % 2]
            path = root / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn(number, size)[0] + np.uint8(70 * (number % 2))).save(path)
    return root


def refused(words, capsys, lines=2) -> str:
    capsys.readouterr()
    assert evaluate_main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == lines and "Traceback" not in message, message
    return message


def confusion_of(masks, truth, classes):
    """The confusion matrix of two lists of masks."""
    found = np.zeros((classes, classes), np.int64)
    for mask, true in zip(masks, truth, strict=True):
        known = true != 255
        np.add.at(found, (true[known], mask[known]), 1)
    return found


# ---- evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OWN)
def test_the_figures_of_pixels_are_the_runs_own(runs, case):
    folder, result = runs(case)
    last = read_metrics(folder)[-1]
    found = evaluate(restore(folder))
    assert found.accuracy == result["test_accuracy"] and found.mean_iou == result["test_iou"]
    assert dict(zip(found.classes, found.class_iou, strict=True)) == last["iou_of_classes"]
    assert found.loss == pytest.approx(last["loss_test"], rel=1e-5)
    other = evaluate(restore(folder), batch=2)
    assert other.loss == pytest.approx(found.loss, rel=1e-3) and other.counted == found.counted


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_pairs_is_read_as_the_runs_own(runs, pairs, case):
    trained = restore(runs(case)[0])
    own = evaluate(trained)
    for folder in (pairs, pairs / "test"):
        other = evaluate(trained, str(folder))
        assert torch.equal(other.confusion, own.confusion) and other.loss == own.loss


def test_a_network_of_drawn_images_judges_pairs_of_any_size(runs, tmp_path):
    trained = restore(runs("drawn")[0])
    for part, pixels in zip(("images", "masks"), drawn(0, SIZES[0]), strict=True):
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "a.png")
    found = evaluate(trained, str(tmp_path))
    assert found.counted == SIZES[0][0] * SIZES[0][1] - 4 and found.images == 1


def test_masks_of_0_and_255_are_of_two_classes(tmp_path):
    for split in ("train", "test"):
        for number, size in enumerate(SIZES):
            image, mask = drawn(number, size)
            for part, pixels in (("images", image), ("masks", np.where(mask == 1, 255, 0).astype(np.uint8))):
                path = tmp_path / "pairs" / split / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    root = tmp_path / "pairs"
    words = ["task=segment", *A_MOMENT, "data=maskfolder", "batch=1", f"data.root={root}"]
    train(compose(words), tmp_path / "run")
    trained = restore(tmp_path / "run")
    own, other = evaluate(trained), evaluate(trained, str(root))
    assert torch.equal(own.confusion, other.confusion)
    assert own.counted == sum(height * width for height, width in SIZES) and (own.confusion.sum(1) > 0).all()


def test_table_csv_and_picture_of_pixels(runs, tmp_path, capsys):
    folder, result = runs("crop")
    table, picture = tmp_path / "confusion.csv", tmp_path / "confusion.png"
    words = ["--png", str(picture)] if figures.available() else []
    assert evaluate_main([str(folder), "--csv", str(table), *words]) == 0
    out = capsys.readouterr().out
    pixels = sum(height * width - 4 for height, width in SIZES)
    assert f"accuracy {100 * result['test_accuracy']:.2f} % of {pixels:,} pixels" in out
    assert f"mean IoU {100 * result['test_iou']:.2f} % without ground" in out
    evaluation = evaluate(restore(folder))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["true class"] for row in rows] == list(CLASSES)
    for row, counts, iou in zip(rows, evaluation.confusion.tolist(), evaluation.class_iou, strict=True):
        assert [int(row[f"taken for {name}"]) for name in CLASSES] == counts and int(row["pixels"]) == sum(counts)
        assert float(row["iou"]) == pytest.approx(iou, abs=1e-6)
    if words:
        with Image.open(picture) as image:
            assert image.size[0] > 300


def test_a_class_without_pixels_has_no_figures(runs, tmp_path, capsys):
    folder, _ = runs("drawn")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(drawn(0, (16, 16))[0]).save(tmp_path / "images" / "a.png")
    Image.new("L", (16, 16), 3).save(tmp_path / "masks" / "a.png")
    table = tmp_path / "confusion.csv"
    assert evaluate_main([str(folder), "--data", str(tmp_path), "--csv", str(table)]) == 0
    assert "nan" not in capsys.readouterr().out
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["accuracy"] == "" for row in rows] == [row["pixels"] == "0" for row in rows]
    assert sum(row["pixels"] == "0" for row in rows) == len(rows) - 1


# ---- masks -------------------------------------------------------------------------------------------------


def written(folder, pairs, out, *more):
    """The masks that revtrain-eval writes of the test images, in the order of their numbers."""
    words = [str(folder), "--images", str(pairs / "test" / "images"), "--masks", str(out), *more]
    assert evaluate_main(words) == 0
    masks = []
    for number in range(len(SIZES)):
        with Image.open(out / "near" / f"{number}.png") as image:
            assert image.mode == "L"
            masks.append(np.asarray(image))
    return masks


@pytest.mark.parametrize("case", OWN)
def test_masks_have_the_size_of_their_images_and_the_classes_that_were_found(runs, pairs, tmp_path, case):
    folder, _ = runs(case)
    table = tmp_path / "shares.csv"
    masks = written(folder, pairs, tmp_path / "out", "--csv", str(table), "--top", "2")
    assert [mask.shape for mask in masks] == list(SIZES)
    trained = restore(folder)
    if OWN[case][1]:
        truth = [np.asarray(Image.open(pairs / f"test/masks/near/{number}.png")) for number in range(len(SIZES))]
        expected = evaluate(trained).confusion.numpy()
        assert (confusion_of(masks, truth, len(CLASSES)) == expected).all()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert rows and all(float(row["share"]) > 0 for row in rows)
    if not case.startswith("resized"):  # there the shares are of another number of pixels
        for row in rows:
            mask = masks[int(row["file"][-5])]
            share = (mask == trained.classes.index(row["class"])).mean()
            assert float(row["share"]) == pytest.approx(share, abs=1e-6)
            assert row["rank"] != "1" or share == max((mask == index).mean() for index in range(len(trained.classes)))
        assert len(rows) == sum(min(2, len(np.unique(mask))) for mask in masks)


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (5, 33), (50, 15), (32, 48)])
def test_every_pixel_gets_the_class_of_its_own_place(runs, tmp_path, monkeypatch, case, size):
    trained = restore(runs(case)[0])
    seen = []

    def red(self, images):
        seen.append(ImageSize(*images.shape[2:]))
        return images[:, 0]

    monkeypatch.setattr(Trained, "classes_of_pixels", red)
    if case.startswith("resized"):  # one class: others would be mixed
        pixels = np.full((*size, 3), 2, np.uint8)
    else:
        pixels = np.random.default_rng(0).integers(0, len(trained.classes), (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (found,) = predict(trained, [tmp_path / "a.png"], masks=True)
    assert found.mask.dtype == np.uint8 and (found.mask == pixels[..., 0]).all()
    assert sum(share for _, share in found.classes) <= 1 and found.error is None
    assert all(each.height % 2 == each.width % 2 == 0 for each in seen)  # as the pooling asks
    if "crop" in case:
        assert set(seen) == {ImageSize(16, 16)}


def test_an_image_is_resized_as_a_whole_and_its_mask_back(runs, tmp_path, monkeypatch):
    trained = restore(runs("resized")[0])
    monkeypatch.setattr(Trained, "classes_of_pixels", lambda self, images: images[:, 0] // 50)
    pixels = np.zeros((40, 200, 3), np.uint8)
    pixels[22:, 120:] = 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (found,) = predict(trained, [tmp_path / "a.png"], masks=True)
    assert found.mask.shape == (40, 200) and (found.mask[27:, 125:] == 2).all()
    assert (found.mask[:, :115] == 0).all() and (found.mask[:17] == 0).all()


def test_a_single_file_and_the_best_class_alone(runs, pairs, tmp_path, capsys):
    folder, _ = runs("whole")
    image = pairs / "test/images/near/2.png"
    assert evaluate_main([str(folder), "--images", str(image), "--masks", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count(" %") == 1 and [path.name for path in (tmp_path / "out").iterdir()] == ["2.png"]


def test_a_damaged_file_is_named_and_the_others_have_masks(runs, pairs, tmp_path, capsys):
    folder, _ = runs("crop")
    shutil.copytree(pairs / "test/images", tmp_path / "images")
    (tmp_path / "images" / "near" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    words = [str(folder), "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "out")]
    assert evaluate_main(words) == 2
    err = capsys.readouterr().err
    assert "bad.png is damaged" in err and "1 of 5 files" in err and "wrote 4 masks" in err
    assert sorted(path.name for path in (tmp_path / "out" / "near").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]


def test_what_cannot_be_done_with_masks_is_refused(runs, pairs, class_runs, tmp_path, capsys):
    folder, _ = runs("whole")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.png")
    out = tmp_path / "out"
    assert "--masks was given without --images" in refused([folder, "--masks", out], capsys)
    words = [class_runs("crop")[0], "--images", images, "--masks", out]
    assert "--masks was given for a run of task=classify" in refused(words, capsys)
    assert "would replace an image" in refused([folder, "--images", images, "--masks", images], capsys)
    with Image.open(images / "a.png") as image:
        assert image.mode == "RGB"
    Image.new("RGB", (8, 8)).save(images / "a.jpg")
    message = refused([folder, "--images", images, "--masks", out], capsys)
    assert "a.jpg" in message and "would both have the mask" in message
    assert not out.exists()
    (images / "a.jpg").unlink()
    assert "a file" in refused([folder, "--images", images, "--masks", images / "a.png" / "b"], capsys).lower()


def test_pairs_that_cannot_be_used_are_refused(runs, pairs, tmp_path, capsys):
    folder, _ = runs("whole")
    (tmp_path / "images").mkdir()
    assert "images and masks" in refused([folder, "--data", tmp_path], capsys)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    assert "There is no folder" in refused([folder, "--data", tmp_path], capsys)
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "masks" / "a.png")
    assert "a.png holds 7; classes go from 0 to 2" in refused([folder, "--data", tmp_path], capsys)


def test_classes_that_were_renamed_are_refused(runs, pairs, tmp_path, capsys):
    root = tmp_path / "pairs"
    shutil.copytree(pairs, root)
    words = ["task=segment", *A_MOMENT, "data=maskfolder", "batch=1", f"data.root={root}"]
    train(compose(words), tmp_path / "run")
    (root / "classes.txt").write_text("ground\nbar\nbox")
    assert "Name them in classes.txt as they were" in refused([tmp_path / "run"], capsys, 3)


# ---- classes of images that were read from disk --------------------------------------------------------------


@pytest.fixture(scope="module")
def class_runs(class_folder, tmp_path_factory):
    """`class_runs(case)`: the run directory and the result of a run for the classes of images of different sizes."""
    cases = {
        "crop": ("data.crop=16", "batch=4"),
        "whole": ("data.stream=true", "batch=2", "accumulate=2"),
        "resized": ("data.stream=true", "data.image_size=16", "batch=4"),
    }
    made = {}

    def run(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case) / "run"
            words = ["arch=hybrid", *A_MOMENT, "data=imagefolder", f"data.root={class_folder}", *cases[case]]
            made[case] = folder, train(compose(words), folder)
        return made[case]

    return run


@pytest.mark.parametrize("case", ["crop", "whole", "resized"])
def test_images_are_read_as_the_run_read_its_own(class_runs, class_folder, tmp_path, capsys, case):
    folder, result = class_runs(case)
    trained = restore(folder)
    own, other = evaluate(trained), evaluate(trained, str(class_folder))
    assert own.accuracy == result["test_accuracy"] and torch.equal(own.confusion, other.confusion)

    table = tmp_path / "predictions.csv"
    words = [str(folder), "--images", str(class_folder / "test"), "--csv", str(table), "--batch", "3"]
    assert evaluate_main(words) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    expected = [trained.logits(images).softmax(1)[0] for images, _ in own_data(trained).test.batches(1)]
    assert len(rows) == len(expected) == 2 * len(SIZES)  # files come in the same order: by class, by name
    for row, probabilities in zip(rows, expected, strict=True):
        assert row["class"] == trained.classes[probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=2e-6)


# ---- export ------------------------------------------------------------------------------------------------


def test_a_network_for_pixels_is_exported(runs, tmp_path):
    pytest.importorskip("safetensors", reason="the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    folder, _ = runs("crop")
    words = [word for suffix in exporting.FORMATS for word in ("--to", str(tmp_path / f"model{suffix}"))]
    assert export_main([str(folder), *words]) == 0

    trained = restore(folder)
    images = torch.randn(5, 3, 16, 16)
    expected = trained.model(images)
    assert expected.shape == (5, len(CLASSES), 16, 16)
    files = {exporting.METADATA_FILE: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (5, 1):
        for found in (program(images[:count]), session.run(["logits"], {"images": images[:count].numpy()})[0]):
            assert found.shape == expected[:count].shape
            assert exporting.difference_of(torch.as_tensor(found), expected[:count]) <= exporting.TOLERANCE_OF_PIXELS
    assert json.loads(files[exporting.METADATA_FILE])["task"] == "segment"
    assert session.get_modelmeta().custom_metadata_map["task"] == "segment"


def test_a_few_pixels_off_the_grid_are_no_difference_and_a_border_is():
    expected = torch.zeros(2, 3, 100, 100)
    few, border = expected.clone(), expected.clone()
    few[0, 0, 3, 5] = 2**-16
    border[:, :, 0] = 0.1
    assert exporting.difference_of(few, expected) < 1e-7
    assert exporting.difference_of(border, expected) > exporting.TOLERANCE_OF_PIXELS
    assert exporting.difference_of(few[0, :, 3, 5], expected[0, :, 3, 5]) == 2**-16
