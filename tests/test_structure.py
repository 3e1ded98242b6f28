"""The layout: imports flow one way, without a cycle; torch and Hydra stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import revtrain

ROOT = Path(revtrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))  # conf/ lies beside src/, and inside only where the package is installed
FILES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "conf"]

# package or module -> what of revtrain it may import, itself apart
GROUND = {"errors", "config", "machine"}
ENGINE = GROUND | {"kernels", "core", "layers", "memory"}
BUILT = ENGINE | {"models", "numerics", "objective", "optim"}
MAY_IMPORT = {
    "errors": set(),
    "figures": {"errors"},
    "machine": {"errors"},
    "machine/processes": {"errors", "config", "core", "layers"},  # the statistics of all processes are one
    "config": {"errors", "machine"},
    "kernels": {"errors"},
    "core": GROUND | {"kernels"},
    "layers": GROUND | {"kernels", "core"},
    "memory": GROUND | {"kernels", "core", "layers"},
    "models": ENGINE,
    "numerics": ENGINE | {"models", "objective"},
    "objective": {"config", "layers"},
    "optim": ENGINE,
    "data": GROUND,
    "step": BUILT | {"data"},
    "planning": BUILT | {"data", "step"},
    "runs": GROUND | {"figures", "numerics"},
    "training": BUILT | {"data", "step", "planning", "runs"},
    "report": {"errors", "config", "memory", "models", "numerics", "runs"},
    "inference": BUILT | {"data", "runs", "report", "figures", "__init__"},
    "cli": GROUND | {"data", "figures", "runs", "training", "inference", "report", "conf", "__init__"},
    # for programs that import revtrain
    "__init__": BUILT | {"planning", "training", "conf"},
    "__main__": {"cli"},
    "chain": {"core"},
    "invertible": {"core"},
    "stream": {"core"},
}


def imports(nodes: list[ast.stmt], everywhere: bool) -> Iterator[str]:
    """The modules that statements import, dotted: anywhere in them, or as Python comes by when it imports the file."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not everywhere:
                continue
            yield from imports([each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)], everywhere)


def imported(path: Path, everywhere: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text()).body, everywhere))


def part(path: Path) -> str:
    """The key of `MAY_IMPORT` that a file belongs to."""
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    return name if name in MAY_IMPORT else name.split("/")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path):
    own = {name.split(".")[1] for name in imported(path) if name.startswith("revtrain.")}
    own = {"__init__" if name == "__version__" else name for name in own} - {path.relative_to(ROOT).parts[0]}
    assert own - {part(path)} <= MAY_IMPORT[part(path)]


def module_of(name: str) -> Path | None:
    """The file that `import name` runs, where name may also be something within a file."""
    for words in (name.split(".")[1:], name.split(".")[1:-1]):
        place = ROOT.joinpath(*words)
        for path in (place.with_suffix(".py") if words else place, place / "__init__.py"):
            if path.is_file():
                return path
    return None


def graph() -> dict[Path, set[Path]]:
    """File -> files that it needs in order to be imported."""
    return {
        path: {found for name in imported(path, False) if name.startswith("revtrain.") and (found := module_of(name))}
        for path in FILES
    }


def test_no_file_needs_itself_to_be_imported():
    try:
        TopologicalSorter({path: needs - {path} for path, needs in graph().items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(path.relative_to(ROOT).as_posix() for path in error.args[1]))


def test_no_package_needs_itself_to_be_imported():
    packages: dict[str, set[str]] = {}
    for path, needs in graph().items():
        packages.setdefault(part(path), set()).update({part(each) for each in needs} - {part(path)})
    try:
        TopologicalSorter(packages).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_command_line_imports_hydra(path):
    assert part(path) == "cli" or not any(name.split(".")[0] == "hydra" for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_rewrites_another(path):
    assert not re.search(r"sys\.modules|partial\(_all", path.read_text())


def without(modules: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, which must end without having imported one of `modules`."""
    code = f"import sys\n{code}\nfound = {{{modules}}} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_the_configuration_needs_no_torch():
    """Nor do the heads of the architectures and data sets, which state keys of their own."""
    done = without(
        "'torch', 'torchvision', 'numpy'",
        "from revtrain.conf import compose\nfrom revtrain.config import all_keys, read, registry\n"
        "read(compose(['data=synthetic']))\n"
        "for package in ('models', 'data'):\n"
        "    for name in registry.names(package):\n"
        "        registry.load(package, name)\n"
        "print(*all_keys())",
    )
    assert {"depth", "expansion", "data.url"} <= set(done.stdout.split())


def test_help_answers_without_torch():
    done = without("'torch'", "from revtrain.cli.train import main\nassert main(['--help']) == 0")
    assert "revtrain [key=value ...]" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "training").glob("*.py")), ids=lambda path: path.name)
def test_a_step_of_training_is_a_page(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {each.name: each.end_lineno - each.lineno + 1 for each in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_every_package_is_in_the_wheel():
    project = ROOT.parents[1] / "pyproject.toml"
    listed = tomllib.loads(project.read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT.parent) for path in ROOT.rglob("__init__.py")]
    assert sorted(listed) == sorted(["revtrain.conf", *(".".join(folder.parts) for folder in folders)])
