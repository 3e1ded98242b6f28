"""Puts the tables of README.md and docs/*.md in place: each is the content of a file, so none is typed by hand.

    python scripts/docs_tables.py              # fill all pages
    python scripts/docs_tables.py --check      # say which differ from their files; the exit code is 1 if any does

A page marks a table with the file it comes from (relative to the page) and, for readers, the command that wrote it:

    <!-- table 2 of figures/memory_table.md: python scripts/memory_table.py -->
    ...
    <!-- end of table -->

A .md file is searched for its tables, the first if no number is given. A .csv file is one table; its first lines,
beginning with #, state command, data, hardware and versions, which a run of before left behind.
figures/architectures.md, the table of the README, is made here, from figures/memory_table.csv, its twin of 16 bit and
the defaults in conf/arch.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(
    r"(?P<begin><!-- table (?:(?P<number>\d+) )?of (?P<file>[^\s:]+)[^>]*-->\n)"
    r"(?P<table>.*?)"
    r"(?P<end><!-- end of table -->)",
    re.DOTALL,
)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
NUMBER = re.compile(r"[*+-]*[\d,]*\.?\d+(e[+-]\d+)?[*%]*|-|exact")


def pages() -> list[Path]:
    """All pages that may hold tables."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def table_of(file: Path, number: int = 1) -> str:
    """The table number `number` of a file, as Markdown that ends in a line break.

    Raises:
        SystemExit: there is no such file or table.
    """
    if not file.exists():
        raise SystemExit(f"{file}: no such file.\nRun the command that writes it, or correct the page's marker.")
    text = file.read_text()
    tables = [_from_csv(text)] if file.suffix == ".csv" else TABLE.findall(text)
    if not 0 < number <= len(tables):
        raise SystemExit(f"{file}: table {number} was asked for; it has {len(tables)}.\nCorrect the page's marker.")
    return tables[number - 1].rstrip("\n") + "\n"


def _from_csv(text: str) -> str:
    """Rows of cells as they are; a column of numbers stands to the right."""
    header, *rows = csv.reader(line for line in text.splitlines() if not line.startswith("#"))
    numbers = [all(NUMBER.fullmatch(row[place]) for row in rows if row[place]) for place in range(len(header))]
    return markdown(header, rows, numbers)


def markdown(header: list[str], rows: list[list[str]], numbers: list[bool]) -> str:
    """A table; `numbers` says which columns stand to the right."""
    lines = [header, *rows]
    if any(len(line) != len(header) for line in lines):
        raise SystemExit(f"A row has another number of cells than its header: {', '.join(header)}.")
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "|".join("---:" if right else "---" for right in numbers) + "|")
    return "\n".join(text) + "\n"


def filled(page: Path) -> str:
    """The text of a page with every marked table as its file has it."""

    def fill(match: re.Match[str]) -> str:
        return match["begin"] + table_of(page.parent / match["file"], int(match["number"] or 1)) + match["end"]

    return MARKED.sub(fill, page.read_text())


def architectures() -> str:
    """Width, depth, pooling, parameters and bytes per pixel of every architecture by default."""
    from revtrain.conf import compose

    def bytes_per_pixel(name: str) -> dict[tuple[str, str], str]:
        with open(ROOT / "docs" / "figures" / name, newline="") as file:
            rows = list(csv.DictReader(file))
        found = {(row["arch"], row["backward"]): f"{float(row['predicted B/px']):.0f}" for row in rows}
        parameters.update({row["arch"]: f"{int(row['parameters']):,}" for row in rows})
        return found

    parameters: dict[str, str] = {}
    full, half = bytes_per_pixel("memory_table.csv"), bytes_per_pixel("memory_table_bf16.csv")
    header = ["`arch`", "width", "depth", "pooling", "parameters"]
    header += ["`invert`, B/px", "`store`, B/px", "`invert` `precision=bf16`, B/px"]
    rows = []
    for arch in parameters:
        cfg, either = compose(["data=synthetic", f"arch={arch}"]), (arch, "either")
        wanted = ((full, "invert"), (full, "store"), (half, "invert"))
        cells = [found.get((arch, mode)) or found[either] for found, mode in wanted]
        pooling = f"`[{','.join(cfg.pooling)}]`"
        rows.append([f"`{arch}`", str(cfg.width), str(cfg.depth), pooling, parameters[arch], *cells])
    return markdown(header, rows, [False, True, True, False, True, True, True, True])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; name the pages that differ")
    args = parser.parse_args(argv)
    differ = []

    def put(path: Path, text: str) -> None:
        if not path.exists() or path.read_text() != text:
            differ.append(path)
            print(f"{path.relative_to(ROOT)}: {'differs from its files' if args.check else 'written'}")
            if not args.check:
                path.write_text(text)

    put(ROOT / "docs" / "figures" / "architectures.md", architectures())
    for page in pages():
        put(page, filled(page))
    if args.check and differ:
        print("python scripts/docs_tables.py puts the files' tables into the pages.")
    return int(bool(args.check and differ))


if __name__ == "__main__":
    raise SystemExit(main())
