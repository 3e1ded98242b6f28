"""What a long run costs in memory and on the disk: `python scripts/long_run.py`.

Runs a tiny network for 300 epochs, looks at the process and at the run's files after each of them, and draws
docs/figures/long_run.png (and .csv). Linux only: the memory is that of /proc. The figure needs matplotlib
(`pip install -e ".[figures]"`).
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from revtrain.runs.schema import CHECKPOINT, EVENTS, LOG, METRICS

TINY = (
    "arch=hybrid", "depth=1", "width=8", "pooling=[]", "data=synthetic", "data.train_images=64", "data.test_images=20",
    "data.image_size=16", "batch=16", "lr=0.02", "probe.batch=8", "device=cpu",
)  # fmt: skip
FILES = {METRICS: METRICS, "events": EVENTS, CHECKPOINT: CHECKPOINT, LOG: LOG}  # name -> pattern


def measure(epochs: int, folder: Path) -> dict[str, list[float]]:
    """Run `epochs` epochs into `folder`.

    Returns:
        Columns with a row for each epoch that was seen: `epoch`, `resident_kib` (of the process), `written_bytes` (all
        that it has written so far) and the size in bytes of each of `FILES`.

    Raises:
        RuntimeError: the run did not complete.
    """
    words = [sys.executable, "-m", "revtrain", *TINY, f"epochs={epochs}", f"hydra.run.dir={folder}"]
    seen: dict[str, list[float]] = {key: [] for key in ("epoch", "resident_kib", "written_bytes", *FILES)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    lines = 0
    while process.poll() is None:
        time.sleep(0.02)
        now = (folder / METRICS).read_bytes().count(b"\n") if (folder / METRICS).exists() else 0
        row = _row(process.pid, folder) if now > lines else None
        if row:
            lines = now
            for key, value in {"epoch": now - 1, **row}.items():
                seen[key].append(value)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}")
    return seen


def slope(seen: dict[str, list[float]], key: str, start: int) -> float:
    """What `key` grows by in an epoch, by least squares from epoch `start` on."""
    epoch, value = np.array(seen["epoch"]), np.array(seen[key])
    late = epoch >= start
    return float(np.polyfit(epoch[late], value[late], 1)[0])


def write(seen: dict[str, list[float]], path: Path) -> None:
    """The columns as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(name if name in ("epoch", "resident_kib", "written_bytes") else f"{name} bytes" for name in seen)
        rows.writerows(zip(*seen.values(), strict=True))


def _row(pid: int, folder: Path) -> dict[str, Any] | None:
    try:
        status, io = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "io"))
    except OSError:  # it has just ended
        return None
    fields = dict(line.split(":", 1) for line in (status + io).splitlines() if ":" in line)
    if "VmRSS" not in fields:
        return None
    sizes = {name: sum(each.stat().st_size for each in folder.glob(pattern)) for name, pattern in FILES.items()}
    return {"resident_kib": int(fields["VmRSS"].split()[0]), "written_bytes": int(fields["wchar"]), **sizes}


def draw(seen: dict[str, list[float]], path: Path) -> None:
    """Three panels: the memory of the process, the sizes of its files, what it has written in all."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    left.plot(seen["epoch"], np.array(seen["resident_kib"]) / 1024, color="#2a6f97")
    left.set(title="resident memory of the process", ylabel="MiB", ylim=(0, None))
    for name, colour in zip(FILES, ("#2a6f97", "#e07a5f", "#3d405b", "#81b29a"), strict=True):
        middle.plot(seen["epoch"], np.array(seen[name]) / 1024, label=name, color=colour)
    middle.set(title="sizes of its files", ylabel="KiB", ylim=(0, None))
    middle.legend(frameon=False)
    right.plot(seen["epoch"], np.array(seen["written_bytes"]) / 2**20, color="#2a6f97")
    right.set(title="bytes written so far", ylabel="MiB", ylim=(0, None))
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/long_run.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = measure(given.epochs, Path(folder) / "run")
    start = given.epochs // 3
    print(f"epochs {start} to {given.epochs}, growth an epoch:")
    print(
        f"  resident memory  {slope(seen, 'resident_kib', start):8.2f} KiB of {seen['resident_kib'][-1] / 1024:.0f} MiB"
    )
    print(f"  bytes written    {slope(seen, 'written_bytes', start) / 1024:8.2f} KiB, "
          f"in the last third {slope(seen, 'written_bytes', 2 * start) / 1024:.2f} KiB")  # fmt: skip
    for name in FILES:
        print(f"  {name:<15}  {slope(seen, name, start) / 1024:8.2f} KiB of {seen[name][-1] / 1024:,.0f} KiB")
    write(seen, given.figure.with_suffix(".csv"))
    draw(seen, given.figure)


if __name__ == "__main__":
    main()
