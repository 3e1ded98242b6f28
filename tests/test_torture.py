"""A folder of images as bad as they come (scripts/image_torture.py): each file is used rightly, or named with the
reason; and no other program is started whatever the files hold."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, read_checkpoint
from test_inference import save_network

from revtrain.cli.inference import evaluate_main
from revtrain.data import imagefiles
from revtrain.errors import RevtrainError, printable

SCRIPT = Path(__file__).parents[1] / "scripts" / "image_torture.py"
WORDS = [word for word in TINY if not word.startswith("data")]


@pytest.fixture(scope="module")
def torture():
    spec = importlib.util.spec_from_file_location("image_torture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_torture"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def built(torture, tmp_path):
    folder = tmp_path / "images"
    return folder, torture.build(folder)


def of(items, folder, *fates):
    return {item.within(folder) for item in items if item.fate in fates}


def words_of(folder):
    cache = f"data.cache='{folder.parent / 'cache'}'"
    words = ["data=imagefolder", f"data.root='{folder}'", cache, "data.image_size=16"]
    return [*WORDS, *words, "data.augment.pad=2", "epochs=1"]


def test_every_file_is_listed_or_left_out(torture, built):
    folder, items = built
    assert len(items) > 120
    listings = [imagefiles.list_images(folder / split, by_class=True) for split in ("train", "test")]
    taken = [path for listing in listings for path in listing.images]
    assert len(taken) == len(set(taken))
    assert set(taken) == of(items, folder, torture.TAKEN, torture.REFUSED)
    left = [path for listing in listings for paths in listing.left_out.values() for path in paths]
    assert len(left) == len(set(left)) and set(left) == of(items, folder, torture.LEFT_OUT)


def test_every_image_is_right_or_refused_by_name(torture, built):
    folder, items = built
    with imagefiles.pillow_quiet():
        for item in items:
            path = item.within(folder)
            if item.fate == torture.REFUSED:
                with pytest.raises(RevtrainError) as caught:
                    imagefiles.pixels(path, torture.SIDE, resize=True)
                assert str(caught.value).startswith(printable(path)) and str(caught.value).count("\n") == 1
            elif item.fate == torture.TAKEN:
                expected = torture.PICTURE.convert(item.mode).convert("RGB")
                found = imagefiles.pixels(path, torture.SIDE, resize=True).transpose(1, 2, 0).astype(int)
                assert np.abs(found - np.asarray(expected)).mean() < 12, item  # of 255: what JPEG and GIF lose


def test_the_command_names_all_that_is_wrong_and_then_all_that_is_left_out(torture, built, command):
    folder, items = built
    ran = command(*words_of(folder))
    refused = of(items, folder, torture.REFUSED)
    assert ran.code == 2 and f"{len(refused)} images below {folder} cannot be used" in ran.err
    assert len(ran.err.splitlines()) <= 5 and "Traceback" not in ran.out + ran.err
    log = (ran.dir / "train.log").read_text()
    assert all(printable(path) in log for path in refused)

    torture.remove_refused(folder, items)
    ran = command(*words_of(folder), "hydra.run.dir=second")
    assert ran.code == 0, ran.err
    assert "Warning" not in ran.out + ran.err and ran.out.count("left out:") == 1
    counts = json.loads((ran.dir / "result.json").read_text())
    assert counts["status"] == "completed"
    taken = of(items, folder, torture.TAKEN)
    assert f"{len(taken)} images taken of {folder}" in ran.out
    log = (ran.dir / "train.log").read_text()
    assert all(f": {printable(path)}" in log for path in of(items, folder, torture.LEFT_OUT))


def test_images_and_data_take_what_training_takes(torture, built, tmp_path, capsys, caplog):
    folder, items = built
    here = {item for item in items if item.path.startswith(b"train/")}
    table = tmp_path / "seen.csv"
    save_network(tmp_path / "run", ["arch=layerwise", "width=4", "depth=2", "pooling=[]"])
    assert evaluate_main([str(tmp_path / "run"), "--images", str(folder / "train/dog"), "--csv", str(table)]) == 2
    out, err = capsys.readouterr()
    of_dog = {item for item in here if item.path.startswith(b"train/dog/")}
    refused = of(of_dog, folder, torture.REFUSED)
    assert all(path in err for path in refused) and "Traceback" not in out + err
    seen = {line.split(",")[0] for line in table.read_text().splitlines()[1:]}
    assert seen == of(of_dog, folder, torture.TAKEN)
    assert caplog.text.count("left out:") == 1 and "linked/below/back" in caplog.text

    caplog.clear()
    torture.remove_refused(folder, items)
    assert evaluate_main([str(tmp_path / "run"), "--data", str(folder / "train")]) == 2
    out, err = capsys.readouterr()
    assert "Only in the run: ant, bee, cow. Only in the data: \\xff\\xfe, caf" in err
    assert caplog.text.count("left out:") == 1


def test_folders_and_names_that_are_no_utf8_are_trained_on(torture, command, tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        for name in (b"cat", b"d\xe9g"):
            folder = os.path.join(os.fsencode(root / split), name)
            os.makedirs(folder)
            for index in range(8):
                with open(os.path.join(folder, b"%d\xe9.png" % index), "wb") as file:
                    file.write(torture.encoded("PNG"))
    ran = command(*words_of(root))
    assert ran.code == 0 and "Traceback" not in ran.out + ran.err, ran.err
    assert read_checkpoint(ran.dir)["data"]["classes"] == ["cat", "d\\xe9g"]


PROGRAMS = (
    "gs", "gswin64c", "djpeg", "cjpeg", "convert", "magick", "ffmpeg", "heif-convert", "exiftool", "file", "xdg-open",
    "uname", "lscpu", "ldconfig", "gcc", "cc", "sh", "git", "nvidia-smi",
)  # fmt: skip
WATCHED = """
import sys, traceback
started = []
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"):
        if not any("cuda/pathfinder" in frame.filename for frame in traceback.extract_stack()):  # torch's
            started.append((event, arguments))
sys.addaudithook(hook)
from revtrain.cli.train import main
code = main(sys.argv[1:])
print("STARTED", started, code)
"""


def test_no_other_program_is_started(torture, built, tmp_path):
    """Neither by the interpreter's hooks nor by the path: fakes of likely programs come first in it."""
    folder, items = built
    for item in items:
        if item.fate == torture.REFUSED and not item.path.endswith((b"postscript.png", b"postscript.jpg", b"eps.gif")):
            os.unlink(item.within(folder))
    fakes, proof = tmp_path / "fakes", tmp_path / "proof"
    fakes.mkdir()
    for name in PROGRAMS:
        (fakes / name).write_text(f"#!/bin/sh\necho {name} >> {proof}\n")
        (fakes / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}"}

    def run(*words):
        return subprocess.run([sys.executable, "-c", WATCHED, *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip

    ran = run(*words_of(folder))
    assert "3 images below" in ran.stderr and "STARTED [] 2" in ran.stdout, ran.stdout + ran.stderr
    torture.remove_refused(folder, [item for item in items if os.path.lexists(item.within(folder))])
    ran = run(*words_of(folder))
    assert "STARTED [] 0" in ran.stdout, ran.stdout + ran.stderr
    assert not proof.exists(), proof.read_text()


def test_the_script_says_what_should_become_of_each(torture, tmp_path, capsys):
    assert torture.main([str(tmp_path / "images")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 120 and "refused   'train/cat/bomb.png'" in lines
