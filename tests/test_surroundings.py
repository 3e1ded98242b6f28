"""The commands in odd surroundings (tests/surroundings.py): a terminal that shows ASCII alone or is gone, no home, a
file system that can do little. Whatever the surroundings, the work is done and no traceback is seen."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from test_faults import image_folder

from revtrain.conf import compose
from revtrain.training.run import train

TINIEST = (
    *(word for word in TINY if not word.startswith(("epochs", "depth", "data.train", "probe"))), "data.train_images=20",
    "data.image_size=16", "batch=10", "depth=1", "epochs=1", "probe.every=0",
)  # fmt: skip
OUTPUTS = (
    "ascii", "closed stdout", "closed stderr", "closed stdout and stderr", "a pipe that nobody reads", "a full device",
)  # fmt: skip
PLACES = ("no home", "read-only home", "umask 077", "no chmod, fsync, flock, link", "a folder whose name is no UTF-8")
ALL = (*OUTPUTS, *PLACES)


def most_slow(*fast):
    """All surroundings; those that are not named are tried with the slow tests."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in ALL]


BAD = ("Traceback", "bug", "Logging error", "Exception ignored", "Warning:", "Errno")


@pytest.fixture(scope="module")
def server():
    words = [sys.executable, str(Path(__file__).with_name("surroundings.py"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images in a folder, and below it names that ASCII lacks."""
    folder = tmp_path_factory.mktemp("trained") / "müller ☃"
    images = image_folder(folder / "images", side=16)
    (images / "train/cat").rename(images / "train/kätzchen")
    (images / "test/cat").rename(images / "test/kätzchen")
    words = ["data=imagefolder", f"data.root='{images}'", f"data.cache='{folder / 'cache'}'", "batch=4"]
    train(compose([*(word for word in TINIEST if not word.startswith(("data", "batch"))), *words]), folder / "run")
    return folder


@pytest.fixture
def within(server, tmp_path):
    """`within(surroundings, command, *words)`: exit code, and what was said; in an empty folder."""

    def run(surroundings, command, *words):
        case = {"command": command, "words": [str(word) for word in words], "surroundings": surroundings}
        server.stdin.write(json.dumps({**case, "folder": str(tmp_path)}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = b"".join(
            (tmp_path / name).read_bytes() for name in ("out", "err", "escaped") if (tmp_path / name).exists()
        )
        return code, said.decode(errors="surrogateescape")

    return run


def assert_clean(code, said, expected=0):
    assert code == expected, said
    assert not any(each in said for each in BAD), said


def found(folder, name):
    """All files of that name below, also where a folder's name is no UTF-8."""
    return [os.path.join(here, name) for here, _, names in os.walk(folder) if name in names]


@pytest.mark.parametrize(
    "surroundings", most_slow("ascii", "closed stdout and stderr", "a pipe that nobody reads", *PLACES[-3:])
)
def test_a_run_completes(within, tmp_path, surroundings):
    code, said = within(surroundings, "revtrain", *TINIEST)
    assert_clean(code, said)
    (result,) = found(tmp_path, "result.json")
    with open(result) as file:
        assert json.load(file)["status"] == "completed"
    assert found(tmp_path, "last.pt")
    if surroundings == "no chmod, fsync, flock, link":
        assert said.count("no locks: start no two runs") == said.count("cannot sync") == 1
    if surroundings == "umask 077":
        modes = {stat.S_IMODE(os.lstat(each).st_mode) & 0o077 for each in Path(result).parent.rglob("*")}
        assert modes == {0}


@pytest.mark.parametrize("surroundings", most_slow("ascii", "a pipe that nobody reads", *PLACES[-2:]))
def test_a_sweep_completes(within, tmp_path, surroundings):
    code, said = within(surroundings, "revtrain", "-m", *TINIEST, "plan=true", "seed=0,1")
    assert_clean(code, said)
    assert len(found(tmp_path, "result.json")) == 2


@pytest.mark.parametrize("surroundings", most_slow(*OUTPUTS[1:], *PLACES[-1:]))
def test_help(within, surroundings):
    code, said = within(surroundings, "revtrain", "--help")
    assert_clean(code, said)
    assert surroundings in OUTPUTS[1:] or "data.root" in said


@pytest.mark.parametrize("command", ["revtrain-report", "revtrain-eval", "revtrain-export"])
@pytest.mark.parametrize("surroundings", most_slow("closed stdout", "a pipe that nobody reads"))
def test_help_of_the_small_commands(within, command, surroundings):
    code, said = within(surroundings, command, "--help")
    assert_clean(code, said)
    assert surroundings in OUTPUTS[1:] or "usage" in said


@pytest.mark.parametrize("surroundings", ALL)
def test_the_report_is_written(within, trained, tmp_path, surroundings):
    code, said = within(surroundings, "revtrain-report", trained, "--html", "a.html", "--csv", "ä.csv")
    lost = surroundings == "a full device"
    assert_clean(code, said, 2 if lost else 0)
    assert found(tmp_path, "a.html") and found(tmp_path, "ä.csv")
    assert ("could not be written: No space left" in said) == lost


@pytest.mark.parametrize("surroundings", ALL)
def test_a_network_is_evaluated(within, trained, tmp_path, surroundings):
    what = ["--images", trained / "images/test"] if surroundings in PLACES else []
    code, said = within(surroundings, "revtrain-eval", trained / "run", "--csv", "a.csv", *what)
    assert_clean(code, said, 2 if surroundings == "a full device" else 0)
    (table,) = found(tmp_path, "a.csv")
    assert "kätzchen" in Path(table).read_text()


@pytest.mark.parametrize("surroundings", ALL)
def test_a_network_is_exported(within, trained, tmp_path, surroundings):
    pytest.importorskip("safetensors", reason="the extra export is not installed")
    code, said = within(surroundings, "revtrain-export", trained / "run", "--to", "ä.safetensors")
    assert_clean(code, said, 2 if surroundings == "a full device" else 0)
    assert found(tmp_path, "ä.safetensors")


def test_files_take_the_umask(within, tmp_path):
    assert within("umask 002", "revtrain", *TINIEST)[0] == 0  # umask 077: above
    files = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) >= 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}


@pytest.mark.parametrize(
    ("surroundings", "remark"),
    [
        pytest.param("no home", "there is no home directory; data.cache=FOLDER", marks=pytest.mark.slow),
        ("read-only home", "cannot be cached: /proc/"),
        pytest.param("no chmod, fsync, flock, link", "cannot sync", marks=pytest.mark.slow),
        pytest.param("plain", "decoding 12 images", marks=pytest.mark.slow),
    ],
)
def test_images_are_trained_on_and_cached_where_they_can_be(within, trained, surroundings, remark):
    words = [word for word in TINIEST if not word.startswith(("data", "batch"))]
    code, said = within(
        surroundings, "revtrain", *words, "data=imagefolder", f"data.root='{trained / 'images'}'", "batch=4"
    )
    assert_clean(code, said)
    assert remark in said and said.count("cannot be cached") == ("home" in surroundings)


@pytest.mark.parametrize("words", [TINIEST, ("-m", *TINIEST, "seed=0,1"), ("data=imagefolder", "data.root=x")])
def test_a_deleted_working_folder_is_said(within, words):
    code, said = within("a deleted folder", "revtrain", *words)
    assert_clean(code, said, 2)
    assert "The working folder, where this was started, does not exist any more.\nChange to one" in said


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["| head -1", ">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full", "| true"])
@pytest.mark.parametrize(
    "command", ["revtrain", "revtrain --help", "revtrain -m", "report", "eval", "export", "joblib"]
)
def test_real_processes(trained, tmp_path, command, ending):
    """The same with a shell and a fresh interpreter."""
    words = {
        "revtrain": f"revtrain.cli.train {' '.join(TINIEST)}",
        "revtrain --help": "revtrain.cli.train --help",
        "revtrain -m": f"revtrain.cli.train -m {' '.join(TINIEST)} plan=true seed=0,1",
        "joblib": f"revtrain.cli.train -m hydra/launcher=joblib {' '.join(TINIEST)} seed=0,1",
        "report": f"revtrain.cli.report '{trained}' --html a.html",
        "eval": f"revtrain.cli.inference:evaluate_main '{trained}/run' --csv a.csv",
        "export": f"revtrain.cli.inference:export_main '{trained}/run' --to a.safetensors",
    }[command]
    module, _, rest = words.partition(" ")
    module, _, function = module.partition(":")
    code = f"import sys; from {module} import {function or 'main'} as main; sys.exit(main())"
    line = f"set -o pipefail; PYTHONIOENCODING=ascii {sys.executable} -c '{code}' {rest} {ending}; echo $? > code"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, errors="replace")
    expected = 2 if ending == "> /dev/full" and command in ("report", "eval", "export") else 0
    assert_clean(int((tmp_path / "code").read_text()), done.stdout + done.stderr, expected)
    wanted = {"revtrain": "last.pt", "revtrain -m": "result.json", "report": "a.html", "eval": "a.csv",
              "export": "a.safetensors", "joblib": "last.pt"}  # fmt: skip
    assert command not in wanted or found(tmp_path, wanted[command])
