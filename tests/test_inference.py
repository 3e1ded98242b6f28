"""revtrain-eval and revtrain-export: the network in a checkpoint does elsewhere what it did in its run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch
from cases import ARCHS, ids
from conftest import TINY
from omegaconf import OmegaConf
from PIL import Image
from test_docs import python_blocks
from test_docs import run as run_block

from revtrain import figures
from revtrain.cli.inference import evaluate_main, export_main
from revtrain.conf import compose
from revtrain.data import load_data, normalise
from revtrain.inference import export as exporting
from revtrain.inference.restore import restore
from revtrain.models import build_model
from revtrain.runs import checkpoint

SIZE = 16
CLASSES = ("ant", "bee", "cow")


def save_network(folder, overrides=(), **changes):
    """A checkpoint of a network whose running statistics are not those it began with; its logits of six images."""
    cfg = compose(["data=synthetic", *overrides])
    torch.manual_seed(0)
    model = build_model(cfg, len(CLASSES), SIZE)
    with torch.no_grad():
        for _ in range(5):
            model(2 * torch.randn(8, 3, SIZE, SIZE) + 1)
    images = torch.randn(6, 3, SIZE, SIZE)
    with torch.no_grad():
        logits = model.eval()(images)
    state = {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "classes": len(CLASSES),
        "data": {"classes": list(CLASSES), "image_size": SIZE, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
        "epoch": 3,
        "model": model.state_dict(),
        # what inference has no use for
        **{"overrides": [], "images": 0, "processes": 1, "partial": None, "optimizer": {}, "scaler": {}, "rng": {}},
        **{"best_accuracy": 0.0, "lines": 0},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "last.pt", state)
    return images, logits


# ---- export ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every architecture in every format: folder of all, and {arch: (images, logits)}."""
    pytest.importorskip("safetensors", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    folder, expected = tmp_path_factory.mktemp("exported"), {}
    for case in ARCHS:
        here = folder / case.arch
        expected[case.arch] = save_network(here, [f"arch={case.arch}", *case.small])
        words = [word for suffix in exporting.FORMATS for word in ("--to", str(here / f"model{suffix}"))]
        assert export_main([str(here), *words]) == 0
    return folder, expected


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_safetensors_in_a_freshly_built_model(exported, case):
    from safetensors import safe_open
    from safetensors.torch import load_file

    folder, expected = exported
    path = folder / case.arch / "model.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert tuple(json.loads(about["classes"])) == CLASSES and json.loads(about["mean"]) == pytest.approx(
        [0.5, 0.4, 0.3]
    )
    cfg = OmegaConf.create(json.loads(about["config"]))
    model = build_model(cfg, len(CLASSES), int(about["image_size"]))
    model.load_state_dict(load_file(path))
    images, logits = expected[case.arch]
    with torch.no_grad():
        assert torch.equal(model.eval()(images), logits)


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_onnx_in_onnxruntime(exported, case):
    import onnxruntime

    folder, expected = exported
    session = onnxruntime.InferenceSession(folder / case.arch / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["classes"])) == CLASSES and json.loads(about["std"]) == pytest.approx(
        [0.2, 0.25, 0.3]
    )
    images, logits = expected[case.arch]
    for count in (6, 1):  # any number of images
        (found,) = session.run(["logits"], {"images": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits[:count], rtol=0, atol=1e-5)


def test_torch_export_where_revtrain_cannot_be_imported(exported):
    folder, expected = exported
    torch.save(expected, folder / "expected.pt")
    code = f"""
import json, sys, torch
sys.modules["revtrain"] = None
for arch, (images, logits) in torch.load({str(folder / "expected.pt")!r}).items():
    files = {{"revtrain.json": ""}}
    network = torch.export.load(f"{folder}/{{arch}}/model.pt2", extra_files=files).module()
    assert json.loads(files["revtrain.json"])["image_size"] == "{SIZE}"
    for count in (6, 1):
        torch.testing.assert_close(network(images[:count]), logits[:count], rtol=0, atol=1e-5)
    print(arch)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [case.arch for case in ARCHS]


def test_the_examples_of_the_documentation_read_what_was_exported(exported, monkeypatch, capsys):
    folder, _ = exported
    monkeypatch.chdir(folder / "hybrid")
    onnx, pt2, weights, python = python_blocks("docs/inference.md")
    run_block(onnx, "onnx")
    assert capsys.readouterr().out.strip() in CLASSES
    run_block(pt2, "pt2")
    assert capsys.readouterr().out.strip() == "torch.Size([5, 3])"
    assert sum(p.numel() for p in run_block(weights, "weights")["model"].parameters()) > 0
    run_block(python.replace("outputs/DATE/RUN", "."), "python")
    assert capsys.readouterr().out.count("'") == 8


def test_a_run_in_16_bit_is_exported_in_float32(tmp_path):
    save_network(tmp_path, ["arch=hybrid", "width=8", "depth=2", "pooling=[batch]", "precision=bf16", "stream=int16"])
    assert exporting.export(restore(tmp_path), tmp_path / "model.pt2") <= 1e-5


def test_what_differs_is_not_written(tmp_path, monkeypatch, capsys):
    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    packages, write, run = exporting.FORMATS[".pt2"]
    monkeypatch.setitem(exporting.FORMATS, ".pt2", (packages, write, lambda *args: run(*args) + 1e-3))
    assert export_main([str(tmp_path), "--to", str(tmp_path / "model.pt2")]) == 2
    assert "differ from the network's own by 0.001" in capsys.readouterr().err
    assert not (tmp_path / "model.pt2").exists()


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, capsys):
    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    assert export_main([str(tmp_path), "--to", "model.h5"]) == 2
    assert ".safetensors, .onnx, .pt2" in refused(capsys)
    monkeypatch.setitem(exporting.FORMATS, ".onnx", (("no_such_package",), None, None))
    assert export_main([str(tmp_path), "--to", "model.onnx"]) == 2
    assert "pip install no_such_package" in refused(capsys)
    assert export_main([str(tmp_path), "--to", str(tmp_path / "no" / "model.pt2")]) == 2
    assert "cannot be written" in refused(capsys)


# ---- evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run of two epochs on synthetic images, which keeps an average of its weights."""
    from revtrain.training.run import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    result = train(compose([*TINY, "ema_decay=0.9"]), folder)
    return folder, result


@pytest.fixture
def image_folder(trained_run, tmp_path):
    """The test images of that run as files CLASS/NUMBER.png."""
    folder, _ = trained_run
    trained = restore(folder)
    test = load_data(trained.config.data).test
    for number, (image, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        path = tmp_path / "images" / trained.classes[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "images"


def refused(capsys) -> str:
    message = capsys.readouterr().err
    assert 2 <= len(message.strip().splitlines()) <= 6 and "Traceback" not in message, message
    return message


def test_the_accuracy_is_the_runs_own(trained_run, tmp_path, capsys):
    folder, result = trained_run
    table, picture = tmp_path / "confusion.csv", tmp_path / "confusion.png"
    words = ["--png", str(picture)] if figures.available() else []
    assert evaluate_main([str(folder), "--csv", str(table), *words]) == 0
    assert f"accuracy {100 * result['test_accuracy']:.2f} % of 20 images" in capsys.readouterr().out
    rows = list(csv.reader(table.read_text().splitlines()))
    counts = torch.tensor([[int(cell) for cell in row[3:]] for row in rows[1:]])
    assert counts.shape == (10, 10) and counts.sum() == 20
    assert counts.trace().item() / 20 == pytest.approx(result["test_accuracy"])
    assert [float(row[2]) for row in rows[1:]] == pytest.approx((counts.diagonal() / counts.sum(1)).tolist())
    if words:
        with Image.open(picture) as image:
            assert image.size[0] > 300

    # a row is a true class, a column a predicted one
    trained = restore(folder)
    test = load_data(trained.config.data).test
    with torch.no_grad():
        predicted = trained.model(normalise(test.images, trained.mean, trained.std)).argmax(1)
    for label, guess in zip(test.labels.tolist(), predicted.tolist(), strict=True):
        counts[label, guess] -= 1
    assert not counts.any()


def test_the_average_of_the_weights_is_evaluated_and_exported(trained_run, tmp_path, capsys):
    folder, result = trained_run
    assert evaluate_main([str(folder), "--averaged"]) == 0
    assert f"accuracy {100 * result['test_accuracy_ema']:.2f} % of 20 images" in capsys.readouterr().out
    means = torch.load(folder / "last.pt", weights_only=True)["average"]["means"]
    assert export_main([str(folder), "--to", str(tmp_path / "model.pt2"), "--averaged"]) == 0
    exported, own = torch.export.load(tmp_path / "model.pt2").state_dict, restore(folder).model.state_dict()
    assert means and all(torch.equal(exported[name], mean) for name, mean in means.items() if name in exported)
    assert any(not torch.equal(exported[name], own[name]) for name in exported)

    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    capsys.readouterr()
    assert evaluate_main([str(tmp_path), "--averaged"]) == 2
    assert "no average of its weights" in refused(capsys)


def test_another_folder_is_evaluated_alike(trained_run, image_folder, capsys):
    folder, result = trained_run
    for path in (image_folder, image_folder.parent):  # CLASS/*, and below test/
        assert evaluate_main([str(folder / "last.pt"), "--data", str(path)]) == 0
        assert f"accuracy {100 * result['test_accuracy']:.2f} % of 20 images" in capsys.readouterr().out
        if image_folder.exists():
            image_folder.rename(image_folder.parent / "test")


def test_predictions_of_a_folder(trained_run, image_folder, tmp_path, capsys):
    folder, _ = trained_run
    (image_folder / "note.txt").write_text("no image")
    Image.new("RGB", (50, 41), "red").save(image_folder / "wide.jpg")
    table = tmp_path / "predictions.csv"
    assert evaluate_main([str(folder), "--images", str(image_folder), "--top", "2", "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 42 and "wide.jpg" in out and "note.txt" not in out

    trained = restore(folder)
    test = load_data(trained.config.data).test
    probabilities = trained.logits(test.images).softmax(1)
    for row in rows:
        if "wide" not in row["file"] and row["rank"] == "1":
            number = int(row["file"][-7:-4])
            assert row["class"] == trained.classes[probabilities[number].argmax()]
            assert float(row["probability"]) == pytest.approx(probabilities[number].max().item(), abs=2e-6)


def test_a_damaged_image_leaves_the_others_alone(trained_run, image_folder, capsys):
    (image_folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    assert evaluate_main([str(trained_run[0]), "--images", str(image_folder)]) == 2
    out, err = capsys.readouterr()
    assert out.count(" %") == 20 and "bad.png" in err and "1 of 21 files" in err


def test_what_cannot_be_evaluated_is_refused(trained_run, image_folder, tmp_path, capsys):
    folder, _ = trained_run
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, text in (
        ([str(tmp_path / "missing")], "there is no such file"),
        ([str(empty)], "there is no such file"),
        ([str(folder), "--images", str(empty)], "has no images"),
        ([str(folder), "--images", str(tmp_path / "missing")], "is no folder"),
        ([str(folder), "--data", str(empty)], "has no images"),
        ([str(folder), "--data", str(tmp_path / "missing")], "There is no folder"),
        ([str(folder), "--device", "cuda:7"], "this machine has: cpu"),
    ):
        assert evaluate_main(words) == 2, words
        assert text in refused(capsys)
    (image_folder / "disc").rename(image_folder / "plate")
    assert evaluate_main([str(folder), "--data", str(image_folder)]) == 2
    assert "Only in the run: disc. Only in the data: plate." in refused(capsys)


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert evaluate_main([str(tmp_path)]) == 2
    assert "truncated" in refused(capsys)
    for broken in ({"model": {}}, {"config": {"arch": "layerwise", "no such key": 1}}, {"classes": 4}, {"data": {}}):
        save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"], **broken)
        assert evaluate_main([str(tmp_path)]) == 2
        assert "does not fit together" in refused(capsys)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    save_network(tmp_path, ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**state, "format": "revtrain checkpoint 2"}, tmp_path / "last.pt")
    assert evaluate_main([str(tmp_path)]) == 2
    assert "'revtrain checkpoint 2', of another version" in refused(capsys)


def test_without_matplotlib_the_picture_says_how_to_get_it(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "available", lambda: False)
    assert evaluate_main([str(trained_run[0]), "--png", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in refused(capsys)


def test_help_answers_without_torch():
    code = (
        "import sys\nfrom revtrain.cli import inference as command\n"
        "for main in (command.evaluate_main, command.export_main):\n"
        "    try: main(['--help'])\n    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: revtrain-eval" in done.stdout and "usage: revtrain-export" in done.stdout
