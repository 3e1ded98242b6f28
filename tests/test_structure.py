"""Imports flow one way: cli -> train -> (data, models, measure, report, ...); models -> layers -> chain."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import revtrain

ROOT = Path(revtrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# package or module -> what of revtrain it may import, itself apart
BASE = {"config", "errors", "files"}
CORE = {"invertible", "chain", "stream"}
MAY_IMPORT = {
    "__init__": {"errors"},
    "__main__": {"cli"},
    "errors": set(),
    "files": set(),
    "preemption": {"launch"},
    "config": {"errors"},
    "invertible": BASE,
    "stream": BASE | {"invertible"},
    "chain": BASE | CORE,
    "layers": BASE | CORE,
    "models": BASE | CORE | {"layers"},
    "data": BASE,
    "optim": BASE | {"layers"},
    "device": BASE,
    "launch": {"errors"},
    "distributed": BASE | {"launch", "layers"},
    "checkpoint": BASE | {"launch"},
    "fidelity": BASE,
    "report": BASE | {"fidelity", "reporting"},
    "reporting": BASE,
    "measure": BASE | CORE | {"layers", "models", "optim", "device"},
    "plan": BASE | CORE | {"layers", "models", "measure", "optim", "device"},
    "theory": BASE | CORE | {"layers", "measure"},
    "inference": BASE | {"checkpoint", "data", "device", "models", "reporting"},
    "train": BASE
    | {"data", "layers", "models", "measure", "report", "checkpoint", "optim", "device", "plan"}
    | {"distributed", "fidelity", "preemption"},
    "sweeps": BASE | {"report", "checkpoint"},
    "cli": BASE | {"preemption", "train", "report", "checkpoint", "sweeps", "conf", "launch", "__init__"},
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, dotted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(node.module)
            if node.module == "revtrain":
                names |= {f"revtrain.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    own = {name.split(".")[1] for name in imported(path) if name.startswith("revtrain.")}
    own -= {"__version__", part(path)}
    assert own <= MAY_IMPORT[part(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_imports_hydra(path):
    assert part(path) == "cli" or not any(name.split(".")[0] == "hydra" for name in imported(path))


def test_help_answers_without_torch():
    code = (
        "import sys; from revtrain.cli.train import main; code = main(['--help']);"
        "assert code == 0 and 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "revtrain [key=value ...]" in done.stdout
