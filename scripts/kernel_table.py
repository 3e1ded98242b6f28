"""Registers, spills and shared memory of every kernel, for every architecture that Triton serves, without a GPU.

    python scripts/kernel_table.py                           # everything: about 10 minutes of one core
    python scripts/kernel_table.py --architectures 90        # one of them
    python scripts/kernel_table.py --operators read_part --every 4

Each operator is compiled with all combinations of types and memory formats that a training step can have
(revtrain.kernels.compile_ahead); kernels that are the same code are compiled once. Triton keeps what it has compiled,
so that a run that was interrupted goes on where it was. Writes docs/figures/kernels.csv, a row for each kernel:

compiled        how often: combinations of types, times architectures
sm_70 ...       the most registers of a thread there; 65,536 of a multiprocessor are shared by its threads
spilled bytes   the most of a thread, registers that found no place
shared bytes    the most of a program, for sums and for the exchange of two memory formats
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import triton

from revtrain.kernels.compile_ahead import ARCHITECTURES, compile_for, launches, same_code, variants

Row = tuple[str, str, int, int, int, int]  # operator, kernel, architecture, registers, spilled, shared bytes


def rows(operators: list[str] | None, architectures: list[int], every: int) -> Iterator[Row]:
    """A row for each kernel that is compiled."""
    seen = set()
    chosen = [each for each in variants() if not operators or each.operator in operators]
    for variant in chosen[::every]:
        for launch in launches(variant):
            if (code := same_code(launch)) in seen:
                continue
            seen.add(code)
            for each in architectures:
                made = compile_for(launch, each)
                used = made.registers, made.spilled_bytes, made.shared_bytes
                yield variant.operator, made.kernel, each, *used


def summary(table: list[Row], architectures: list[int]) -> Iterator[list[str]]:
    """Header and rows: for each kernel how many were compiled, and the most of what they take."""
    yield ["operator", "kernel", "compiled", *(f"sm_{each}" for each in architectures), "spilled bytes", "shared bytes"]
    for operator, kernel in dict.fromkeys(row[:2] for row in table):
        own = [row[2:] for row in table if row[:2] == (operator, kernel)]
        registers = [max(row[1] for row in own if row[0] == each) for each in architectures]
        spilled, shared = (max(row[place] for row in own) for place in (2, 3))
        yield [operator, kernel, *(f"{each:,}" for each in (len(own), *registers, spilled, shared))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", help="only these")
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES), help="of sm_90 the 90")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th combination of types")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/figures/kernels.csv")
    options = parser.parse_args(arguments)
    table = []
    for row in rows(options.operators, options.architectures, options.every):
        table.append(row)
        print(f"\r{len(table)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    condensed = list(summary(table, options.architectures))
    with options.out.open("w", newline="") as file:
        file.write(f"# python scripts/kernel_table.py; triton {triton.__version__}\n")
        csv.writer(file, lineterminator="\n").writerows(condensed)
    for each in condensed:
        print(*each, sep=" | ")


if __name__ == "__main__":
    main()
