"""The command line: `revtrain-report [PATH ...]`.

Exit codes: 0 at least one run was read, 2 none was (or a file could not be written), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from revtrain.cli.guard import DONE, MENDABLE, guarded
from revtrain.machine.files import write_result_file
from revtrain.report.group import group_runs
from revtrain.report.page import page
from revtrain.report.paper import paper_tables
from revtrain.report.tables import clean, comma_separated, markdown, terminal
from revtrain.runs.read import gather
from revtrain.runs.schema import CONFIG, METRICS, RESULT

DESCRIPTION = """\
Gather run directories, in any state, into a table: configurations with their accuracy, memory, SNR and compute
overhead; runs that differ only in the seed become mean and standard deviation."""
EPILOG = f"""\
Only {RESULT} and {METRICS} are read ({CONFIG} where there is no result yet). What cannot be read is
listed with the reason. Exit code: 0 if at least one run was read, else 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `revtrain-report`; by default those of this process.

    Returns:
        The exit code, see the head of this module.
    """
    return guarded(_report, _parser(), argv)


def _report(args: argparse.Namespace) -> int:
    runs, problems = gather(args.paths)
    groups = group_runs(runs)
    if not runs:
        for problem in problems:
            print(f"{clean(problem.path)}: {clean(problem.reason)}", file=sys.stderr)
        print(
            f"No run was read at or below {clean(', '.join(map(str, args.paths)))}; nothing was written.\n"
            "Expected run directories of revtrain, or folders above them, as in: revtrain-report outputs",
            file=sys.stderr,
        )
        return MENDABLE
    print(paper_tables(groups) if args.paper else terminal(groups, problems), flush=True)
    wanted = (
        (args.markdown, lambda: markdown(groups, problems)),
        (args.csv, lambda: comma_separated(groups)),
        (args.html, lambda: page(groups, problems, args.paths)),
    )
    failed = [_write(path, make()) for path, make in wanted if path is not None].count(False)
    return MENDABLE if failed else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("revtrain-report", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", type=Path, default=[Path("outputs")],
        help="run directories, or folders with such below them (default: outputs)",
    )  # fmt: skip
    parser.add_argument(
        "--paper", action="store_true", help="print tables in the paper's layout: networks of equal size, their twins"
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one page with plots; it needs no network")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables as Markdown")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write one line a run, unrounded")
    return parser


def _write(path: Path, text: str) -> bool:
    """Whether the file was written; if not, why not has been said."""
    content = text.encode(errors="backslashreplace")
    try:
        write_result_file(path, content)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"{clean(path)} cannot be written: {why}.\nChoose another file or folder.", file=sys.stderr)
        return False
    print(f"wrote {clean(path)}", file=sys.stderr)
    return True
