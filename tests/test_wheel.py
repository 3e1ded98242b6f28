"""The wheel: what `pip install` puts into another environment runs there, from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import TINY, read_result

ROOT = Path(__file__).parents[1]


def run(*words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves build/ and egg-info where it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "conf"):
        if (ROOT / name).exists():
            (source / name).symlink_to(ROOT / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
    ]
    run(*pip, source)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_every_yaml(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"revtrain/{path.relative_to(ROOT / 'src/revtrain')}" for path in (ROOT / "src/revtrain").rglob("*.py")}
    expected |= {f"revtrain/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert expected <= names
    assert not {name for name in names if name.startswith(("tests", "src", "conf"))}


def test_the_installed_command_runs_from_another_folder(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # torch and the others are taken from here; a .pth of an editable revtrain lying there is not read again
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"cwd": elsewhere, "env": environment}
    locate = "import revtrain, revtrain.conf; print(revtrain.__file__, revtrain.conf.__file__)"
    where = run(python, "-c", locate, **options)
    assert all(path.startswith(str(site)) for path in where.stdout.split())
    assert "revtrain -m depth=4,6,8" in run(python.parent / "revtrain", "--help", **options).stdout
    run(python.parent / "revtrain", *TINY, "epochs=1", "hydra.run.dir=here", **options)
    assert read_result(elsewhere / "here")["status"] == "completed"
