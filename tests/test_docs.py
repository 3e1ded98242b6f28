"""README.md and the pages of docs/ are true: their examples run as they stand, their tables are those of the files that
scripts wrote, and every link, path, command and name in them exists."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from revtrain.conf import compose
from revtrain.config import all_keys, read
from revtrain.core.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import set_chunk_mib
from revtrain.models import for_task
from revtrain.numerics.verify import verify
from revtrain.runs.schema import RESULT_KEYS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES_OF_PAGES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES_OF_PAGES)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


def run(block: str, name: str) -> dict:
    variables = {"__name__": "example"}
    exec(compile(block, name, "exec"), variables)
    return variables


@cache
def script(name: str):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


# ---- examples ------------------------------------------------------------------------------------


def test_the_layers_of_the_readme_train_in_a_model_of_ones_own():
    (block,) = python_blocks("README.md")
    model = run(block, "README.md")["model"]
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(each is not None and each.isfinite().all() for each in gradients)
    assert sum(bool(each.any()) for each in gradients) > len(gradients) / 2


@pytest.fixture(scope="module")
def library_page() -> dict:
    """What the examples of docs/library.md have left, run from top to bottom."""
    torch.manual_seed(0)
    return run("\n".join(python_blocks("docs/library.md")), "docs/library.md")


def test_a_chain_trains_inside_of_torchvisions_model(library_page):
    assert library_page["losses"][-1] < 0.8 * library_page["losses"][0]
    for stage in ("layer1", "layer2", "layer3"):
        assert all(p.grad.any() for p in getattr(library_page["model"], stage).parameters() if p.dim() > 1), stage


@pytest.mark.parametrize("name", ["vit", "theirs", "volumes", "unet", "network"])
def test_the_examples_of_the_library_page_train(library_page, name):
    losses = library_page[f"{name}_losses"]
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(p.grad.any() for p in library_page[name].parameters() if p.dim() > 1)


# name -> (a model of this depth, its inputs): of the examples of docs/library.md
EXAMPLES = {
    "ReversibleViT": (lambda kind, depth: kind(dim=16, depth=depth), (3, 32, 32)),
    "Volumes": (lambda kind, depth: kind(blocks=depth), (1, 16, 16, 16)),
    "UNet": (lambda kind, depth: kind(widths=(8, 16), blocks=depth), (3, 16, 16)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_models_of_the_library_page_are_sound_and_short(library_page, name):
    make, shape = EXAMPLES[name]
    report = verify(make(library_page[name], 2).double(), torch.randn(4, *shape, dtype=torch.float64))
    assert report and max(report.layers.values()) < 1e-10, report
    (block,) = (each for each in python_blocks("docs/library.md") if f"class {name}(" in each)
    assert len(block.splitlines()) < 60


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_models_of_the_library_page_need_no_more_activation_memory_with_depth(library_page, name):
    make, shape = EXAMPLES[name]
    activations = {}
    for depth in (2, 8):
        model = make(library_page[name], depth)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        report = verify(model, torch.randn(8, *shape))
        activations[depth] = report.store.peak_bytes - gradients, report.invert.peak_bytes - gradients
    assert activations[8][1] < 1.1 * activations[2][1], activations
    assert activations[8][0] > 1.5 * activations[2][0], activations
    assert activations[8][1] < 0.5 * activations[8][0], activations


def test_a_transformer_of_others_in_a_tenth_of_its_activation_memory(library_page):
    """Its own blocks, twelve of them, with their weights."""
    model = library_page["theirs"]
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    set_chunk_mib(model, 1 / 16)  # a few samples a piece, as of a large batch
    report = verify(model, torch.randn(128, 3, 32, 32))
    assert report, report
    assert report.invert.peak_bytes - gradients < 0.1 * (report.store.peak_bytes - gradients), report


def diffs(name: str) -> dict[str, tuple[str, str]]:
    """Heading -> (before, after): the two sides of the first ```diff block below it."""
    found = re.findall(
        r"^### (.+?)\n(?:(?!^###).)*?^```diff\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE
    )
    sides = {}
    for heading, block in found:
        lines = block.splitlines(keepends=True)
        sides[heading] = tuple("".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
    return sides


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("library", ["MemCNN", "RevTorch", "revlib", "reformer-pytorch", "torch.utils.checkpoint"])
def test_the_lines_to_change_for_who_comes_from_another_library(library):
    """Both sides are run, where the library is installed, and compute the same; at most five lines differ.

    tests/test_peers.py trains whole scripts so.
    """
    before, after = diffs("docs/library.md")[library]
    assert sum(line not in before for line in after.splitlines()) <= 5
    checkpointed, tokens = library == "torch.utils.checkpoint", library == "reformer-pytorch"

    def result(code: str, channels: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        functions = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, channels) if tokens else nn.Conv2d(channels, channels, 3, padding=1), nn.GELU()
            )
            for _ in range(6)
        )
        x = torch.randn(2, 5, 8) if tokens else torch.randn(2, 8, 6, 6)
        given = {
            "nn": nn,
            "channels": 8,
            "dim": 4,
            "pairs": list(zip(functions[::2], functions[1::2], strict=True)),
            "x": x.requires_grad_() + 0,  # as after a stem: without, RevTorch and revlib give no gradient at all
        }
        exec(compile(code, f"{library} in docs/library.md", "exec"), given)
        given["y"].square().mean().backward()
        return [given["y"].detach(), x.grad, *(p.grad for p in functions.parameters())]

    ours = result(after, 4)
    assert all(each is not None and each.any() for each in ours)
    if checkpointed or importlib.util.find_spec(library.lower().replace("-", "_")):
        theirs = result(before, 8 if checkpointed else 4)
        if not checkpointed:  # which is another network
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_the_architecture_and_the_data_set_of_contributing_train_beside_the_package(tmp_path):
    """As a reader would: the files as the page has them, into a folder that REVTRAIN_PATH names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = dict(re.findall(r"`FOLDER/([\w/.]+)`:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert set(files) == {
        "models/bottleneck.py", "conf/arch/bottleneck.yaml", "data/stripes.py", "conf/data/stripes.yaml",
    }  # fmt: skip
    folder = tmp_path / "beside"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    words = ["arch=bottleneck", "squeeze=4", "data=stripes", "batch=10", "epochs=2", "lr=0.02", "device=cpu"]
    words += ["pooling=[channel]", "data.augment.pad=0", "data.augment.cutout=0", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "revtrain", *words],
        cwd=tmp_path, env={**os.environ, "REVTRAIN_PATH": str(folder)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["arch"], result["config"]["squeeze"]) == ("completed", "bottleneck", 4)
    assert result["gradients"]["minimum_cosine"] > 0.99


def test_the_layer_of_contributing_trains_in_a_chain():
    (block,) = (each for each in python_blocks("CONTRIBUTING.md") if "InvertibleLayer" in each)
    kind = run(block, "CONTRIBUTING.md")["PositiveScale"]
    gradients = {}
    for backward in ("invert", "store"):
        layer = kind(4).double()
        nn.init.constant_(layer.log_scale, 0.3)
        x = torch.ones(2, 4, 3, 3, dtype=torch.float64).cumsum(3).requires_grad_()
        InvertibleChain([layer], backward=backward)(x).square().sum().backward()
        gradients[backward] = torch.cat([x.grad.flatten(), layer.log_scale.grad.flatten()])
    assert torch.allclose(gradients["invert"], gradients["store"], rtol=1e-12)


# ---- tables --------------------------------------------------------------------------------------


@every_page
def test_tables_are_those_of_the_files_that_scripts_wrote(page):
    """Edited by hand, a table would differ; `python scripts/docs_tables.py` puts the file's in its place."""
    assert page.read_text() == script("docs_tables").filled(page)


def test_the_table_of_architectures_is_that_of_its_sources():
    tables = script("docs_tables")
    assert (ROOT / "docs/figures/architectures.md").read_text() == tables.architectures()


def test_a_table_changed_by_hand_is_seen(tmp_path):
    tables = script("docs_tables")
    (tmp_path / "numbers.csv").write_text('# command: none\nlayer,"loss, dB"\nBN,-1.5\n')
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table of numbers.csv: python scripts/x.py -->\n<!-- end of table -->\nb\n")
    page.write_text(tables.filled(page))
    assert "| layer | loss, dB |\n|---|---:|\n| BN | -1.5 |\n" in page.read_text()
    assert tables.filled(page) == page.read_text()
    page.write_text(page.read_text().replace("-1.5", "-1.6"))
    assert tables.filled(page) != page.read_text()
    (tmp_path / "numbers.csv").unlink()
    with pytest.raises(SystemExit, match="no such file"):
        tables.filled(page)


def tables_in(text: str) -> list[list[str]]:
    """The lines of each table outside of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [table.splitlines() for table in re.findall(r"(?:^ *\|.*\n?)+", text, re.MULTILINE)]


def misshapen(table: Sequence[str]) -> list[str]:
    """The lines of a table that do not have as many cells as its header, and a separator that is none."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in table]
    wrong = [line for line, cells in zip(table, lines, strict=True) if len(cells) != len(lines[0])]
    if len(lines) < 2 or not all(re.fullmatch(r" *:?-{3,}:? *", cell) for cell in lines[1]):
        wrong.append("no separator line")
    return wrong


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("docs/figures/*.md"))], ids=lambda page: page.name)
def test_every_row_has_as_many_cells_as_its_header(page):
    for table in tables_in(page.read_text()):
        assert not misshapen(table), table[0]


def test_a_row_with_another_number_of_cells_is_seen():
    assert not misshapen(["| a | b \\| c |", "|---|---:|", "| 1 | 2 |"])
    assert misshapen(["| a | b |", "|---|---:|---|", "| 1 | 2 |"])
    assert misshapen(["| a | b |", "|---|---:|", "| 1 | 2 | 3 |"])
    assert misshapen(["| a | b |", "| 1 | 2 |"])


# ---- links and paths -----------------------------------------------------------------------------


def present(page: Path) -> str:
    """The text of a page without what it says of former versions (CHANGELOG.md)."""
    text = page.read_text()
    text = re.sub(r"^### Removed\n.*?(?=^##)", "", text, flags=re.DOTALL | re.MULTILINE)
    formerly = re.compile(r"(^ *\| formerly \|.*\n)((?: *\|.*\n)+)", re.MULTILINE)
    return formerly.sub(lambda table: re.sub(r"(?m)^ *\|[^|]*\|", "|", table[2]), text)


@every_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, section in re.findall(r'\]\(([^)\s#]+)[^)]*\)(?:, "([^"]+)")?', text):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), target
        if section:
            words = re.escape(section).replace(r"\ ", r"\s+")
            assert re.search(rf"^(#+ |\*\*){words}", (page.parent / target).read_text(), re.MULTILINE), section


@every_page
def test_paths_exist(page):
    """Mentioned anywhere: in prose, in commands, in the markers of tables."""
    for path in re.findall(r"(?<![\w/.])(?:src|docs|tests|scripts|conf|\.ci)/[\w./*-]*\w[*/]?", present(page)):
        pattern = re.sub(r"NAME|CLASS", "*", path.rstrip("/"))
        assert list(ROOT.glob(pattern)), path


# ---- commands ------------------------------------------------------------------------------------

PROGRAMS = {"pip", "tensorboard", "ruff", "mypy", "grep", "python3", ".", ".ci/run"}  # others', or seen by other tests
SCRIPTS = {
    "revtrain-report": ("revtrain.cli.report", "main"),
    "revtrain-eval": ("revtrain.cli.inference", "evaluate_main"),
    "revtrain-export": ("revtrain.cli.inference", "export_main"),
}


def commands_of(page: Path) -> Iterator[tuple[list[str], bool]]:
    """(words, whole): of shell blocks, and of code in prose, which need not be whole commands."""
    text = re.sub(r"<!--.*?-->", "", present(page), flags=re.DOTALL)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"\s&&\s", line):
                if words := shlex.split(command, comments=True):
                    yield words, True
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(r"(\w+=\S+ )?(revtrain(?!\.)\S* |python scripts|pytest |torchrun )", span) and "..." not in span:
            yield shlex.split(span), False


def each_run(words: list[str]) -> Iterator[list[str]]:
    """The overrides of runs that `revtrain WORDS` would start, without Hydra's own: in all, every value once."""
    multirun = "-m" in words
    words = [word for word in words if word != "-m"]
    own = [word for word in words if re.match(r"\+*hydra[./]", word)]
    for word in own:
        group, _, name = word.partition("=")
        if group.startswith("hydra/") and name != "ray":  # ray: a launcher that the reader installs
            assert (ROOT / "conf" / group / f"{name}.yaml").exists(), word
    overrides = [word for word in words if word not in own]
    if not multirun:
        yield overrides
        return
    parser = OverridesParser.create()
    swept = {word: parser.parse_override(word) for word in overrides}
    fixed = [word for word, parsed in swept.items() if not parsed.is_sweep_override()]
    with initialize_config_module("revtrain.conf", version_base="1.3"):
        params = hydra_compose("config", overrides=fixed, return_hydra_config=True).hydra.sweeper.params or {}
    for key, values in params.items():
        parsed = parser.parse_override(f"{key}={values}")
        if parsed.is_sweep_override():
            swept[f"{key}={values}"] = parsed
        else:
            fixed.append(f"{key}={values}")
    choices = [
        [f"{parsed.key_or_group}={value}" for value in parsed.sweep_string_iterator()]
        for parsed in swept.values()
        if parsed.is_sweep_override()
    ]
    for turn in range(max(map(len, choices), default=1)):
        yield [*fixed, *(values[min(turn, len(values) - 1)] for values in choices)]


def check_revtrain(words: list[str], folder: Path) -> None:
    """It composes, and every value is one that a run could use. `folder` stands for a run of before."""
    for overrides in each_run(words):
        if overrides in (["--help"], []):
            continue
        read(compose([re.sub(r"^resume=.*", f"resume={folder}", word) for word in overrides]))


class Parsed(Exception):
    """Raised in the place of parsing: the parser, and how it would have parsed."""


def parser_of(main, monkeypatch) -> tuple[argparse.ArgumentParser, str]:
    """The argument parser that a command's main function makes."""

    def stop(method: str):
        def raise_parsed(self, *_: Any, **__: Any):
            raise Parsed(self, method)

        return raise_parsed

    with monkeypatch.context() as patched, pytest.raises(Parsed) as caught:
        for method in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, method, stop(method))
        patched.setattr(sys, "argv", ["command"])
        main()
    return caught.value.args


def check_arguments(main, words: list[str], whole: bool, monkeypatch) -> None:
    parser, method = parser_of(main, monkeypatch)
    if whole:
        getattr(parser, method)(words)  # exits with a message where it does not understand
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in parser._option_string_actions, word
    read(compose(["data=synthetic", *(word for word in words if re.match(r"[a-z][\w.]*=", word))]))


def check_pytest(words: list[str]) -> None:
    for word, before in zip(words, [None, *words], strict=False):
        if before == "-k":
            named = [ROOT / each for each in words if each.startswith("tests/")] or [*ROOT.glob("tests/*.py")]
            assert any(word in path.read_text() for path in [*named, ROOT / "tests/cases.py"]), word
        elif not word.startswith("-") and before not in ("-m", "-k"):
            assert (ROOT / word).exists(), word


def check_command(words: list[str], whole: bool, folder: Path, monkeypatch) -> None:
    """Raises or exits where a command of a page cannot be typed as it stands."""
    while re.match(r"[A-Z_]+=", words[0]):
        if words[0].startswith("REVTRAIN_PATH="):
            return  # an architecture of the reader's own: a test of its own
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        check_revtrain(rest[rest.index("revtrain") + 1 :], folder)
    elif program == "revtrain":
        check_revtrain(rest, folder)
    elif program in SCRIPTS:
        module, function = SCRIPTS[program]
        check_arguments(getattr(import_module(module), function), rest, whole, monkeypatch)
    elif program == "python":
        path = Path(rest[0])
        assert path.parent.name == "scripts" and (ROOT / path).exists(), rest[0]
        check_arguments(script(path.stem).main, rest[1:], whole, monkeypatch)
    elif program == "pytest":
        check_pytest(rest)
    else:
        assert program in PROGRAMS, f"{program}: a program that nobody knows"
    if program == "pip" and rest[1] == "-e":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", rest[2])) <= set(extras), rest[2]


@every_page
def test_commands_can_be_typed_as_they_stand(page, tmp_path, monkeypatch):
    for words, whole in commands_of(page):
        try:
            check_command(words, whole, tmp_path, monkeypatch)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            pytest.fail(f"{' '.join(words)}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "revtrain arhc=hybrid",
        "revtrain -m arch=hybrid,hibrid",
        "revtrain arch=hybrid max_gain=1 expansion=[1]",
        "revtrain-report outputs --htlm report.html",
        "python scripts/no_such_script.py",
        "python scripts/memory_table.py --archs hybrid",
        "python scripts/memory_table.py widht=16",
        "pytest tests/test_nothing.py",
        "revtrian arch=hybrid",
        "pip install -e .[figure]",
    ],
)
def test_commands_that_cannot_be_typed_are_seen(command, tmp_path, monkeypatch, capsys):
    with pytest.raises(BaseException):  # noqa: B017  # each program refuses in a way of its own
        check_command(shlex.split(command), True, tmp_path, monkeypatch)


# ---- names ---------------------------------------------------------------------------------------


@cache
def written() -> frozenset[str]:
    """Every word of the code, this file apart."""
    files = [path for folder in ("src", "scripts", "tests", "conf") for path in (ROOT / folder).rglob("*.*")]
    code = [path for path in files if path.suffix in (".py", ".yaml") and path != Path(__file__)]
    text = "\n".join(path.read_text() for path in [*code, ROOT / "pyproject.toml"])
    return frozenset(re.findall(r"\w+", text))


@cache
def names_of_tests() -> frozenset[str]:
    text = "\n".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    return frozenset(re.findall(r"def (test_\w+)", text)) | {path.stem for path in ROOT.glob("tests/*.py")}


def exists(dotted: str) -> bool:
    """Whether revtrain has this module, class, function, method or attribute."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(["revtrain", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@cache
def usable(assignment: str) -> bool:
    """Whether some architecture takes this key=value."""
    data = "imagefolder" if assignment.startswith(("experiment=fig", "experiment=cifar10")) else "synthetic"
    archs = [[f"arch={arch}"] for arch in sorted(for_task("classify"), key="hybrid".__ne__)]  # most take hybrid's keys
    sets = [[f"data={data}"], ["data=imagefolder"]]
    tried = [[*arch, *own] for own in sets for arch in archs]
    for words in (*tried, [], ["task=segment"], ["task=segment", "data=maskfolder"]):
        try:
            read(compose([*words, "data.root=FOLDER", assignment]))
            return True
        except (RevtrainError, HydraException, OmegaConfBaseException):
            continue
    return False


def unknown(span: str, own: frozenset[str] = frozenset()) -> list[str]:
    """What of some code in prose does not exist. `own`: words that the page's own examples define."""
    keys, groups = all_keys(), {"experiment", "scale", "size", "recipe", "arch", "data", "task"}
    missing = []
    for word in span.split():
        if "/" in word and "::" not in word and re.search(r"\.\w+$|/$|\*", word):
            continue  # a path: a test of its own
        if word in keys or word in RESULT_KEYS:
            continue
        key, equals, value = word.partition("=")
        if equals and (key in keys or key in groups):
            certain = value and not re.search(r"RUN|FOLDER|[|\"',]", value)
            if certain and key not in ("resume", "memory_limit") and not usable(word):
                missing.append(word)
        elif test := re.fullmatch(r"(test_\w+)(\*|\.py)?", word):
            if not any(fnmatch.fnmatch(name, test[1] + ("*" if test[2] == "*" else "")) for name in names_of_tests()):
                missing.append(word)
        elif (dotted := re.fullmatch(r"(revtrain\.)?([a-z]\w*(?:\.\w+)+)(?:\(.*)?", word)) and (
            dotted[1] or exists(dotted[2].split(".")[0])
        ):
            if dotted[2] not in keys and not dotted[2].endswith(".KEY") and not exists(dotted[2]):
                missing.append(word)
        elif not word.startswith(("torch.", "nn.", "hydra.", "FOLDER/")):
            named = re.findall(r"\b[a-zA-Z]\w*_\w+|\b_\w+|\b[A-Z][a-z]+[A-Z]\w+", word)
            missing += [name for name in named if name not in written() | own and not _is_ending(name)]
    return missing


def _is_ending(name: str) -> bool:
    """Of names, as in `_mib`."""
    return name.startswith("_") and name.islower() and any(word.endswith(name) for word in written())


OTHERS = {  # names of other programs, formats and papers
    "DistributedDataParallel", "state_dict", "OMP_NUM_THREADS", "max_num_timeout", "submitit_slurm", "cpus_per_task",
    "mem_gb", "gpus_per_node", "weights_only", "split_dim", "arg_route",
}  # fmt: skip


@every_page
def test_names_exist(page):
    if page.name == "engine.md":
        return  # says what is planned, too
    text = re.sub(r"<!--.*?-->", "", present(page), flags=re.DOTALL)
    own = frozenset(re.findall(r"\w+", "\n".join(python_blocks(str(page.relative_to(ROOT)))))) | OTHERS
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`]+)`", prose) if "REVTRAIN_PATH" not in span]
    assert not [name for span in spans for name in unknown(span, own)]


def test_names_that_do_not_exist_are_seen():
    assert not unknown("layers.AdditiveCoupling") and not unknown("revtrain.core.chain.InvertibleChain")
    assert not unknown("test_gradcheck_*") and not unknown("norm_sign=mixed") and not unknown("probe.every")
    for name in (
        "layers.coupling._WalkedBack", "revtrain.theory.alpha", "layers.AdditiveCuopling", "test_of_nothing",
        "norm_sign=odd", "depth=many", "WalkedBack", "_WalkedBack", "no_such_name",
    ):  # fmt: skip
        assert unknown(name), name


def test_a_changed_key_is_seen():
    with pytest.raises(RevtrainError):
        read(compose(["data=synthetic", "arch=chunked", "max_gain=1"]))
    assert usable("max_gain=1"), "another architecture has it"
