"""Print a Markdown table of finished runs: python scripts/results_table.py outputs/DATE/RUN ..."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HEADER = """| arch | parameters | test accuracy, % | best, % | minimum SNR, dB | bytes/px | peak VRAM, MiB | images/s |
|---|---|---|---|---|---|---|---|"""


def row(result: dict) -> str:
    """One run as a row; a dash stands for what was not measured."""
    snr, vram = result["snr_db"], result["peak_vram_mib"]
    cells = [
        result["arch"],
        f"{result['params']:,}",
        f"{100 * result['test_accuracy']:.2f}",
        f"{100 * result['best_test_accuracy']:.2f}",
        f"{snr['minimum']:.1f}" if snr else "-",
        f"{result['bytes_per_pixel']:.0f}",
        f"{vram['allocated']:.0f}" if vram else "-",
        f"{result['images_per_second']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders that hold them")
    files = [file for run in parser.parse_args().runs for file in sorted(run.rglob("result.json"))]
    results = [json.loads(file.read_text()) for file in files]
    print(HEADER)
    for result in sorted((r for r in results if r["status"] == "completed"), key=lambda r: r["bytes_per_pixel"]):
        print(row(result))


if __name__ == "__main__":
    main()
