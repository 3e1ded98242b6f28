"""Does a deep layer-wise network train as well when it rebuilds its activations? `store` minus `invert`, over seeds.

    python scripts/layerwise_gap.py --data FOLDER --out outputs/layerwise_gap            # 12 runs, two at a time
    python scripts/layerwise_gap.py --data FOLDER --out outputs/layerwise_gap --table    # what is there so far

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. Two variants of arch=layerwise depth=10 slope=0.2:

ours      biased variance, epsilon_i = 0.1, bounded convolutions (max_gain=1), BN gains of mixed signs
authors   unbiased variance in the inverse, epsilon_i = 0, no bound, positive gains

The same command continues where it was cut off: runs that ended are kept, others start anew.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from revtrain.runs.read import Run, read_run

VARIANTS = {
    "ours": [],
    "authors": ["epsilon_i=0", "max_gain=null", "norm_sign=positive"],
}
ENDED = ("completed", "failed")
SETTING = [
    "arch=layerwise", "depth=10", "width=16", "slope=0.2", "experiment=cifar10_jpeg_small", "epochs=8", "probe.every=2",
    "data.test_limit=5000",
]  # fmt: skip


def run(variant: str, backward: str, seed: int, folder: Path, overrides: list[str]) -> None:
    """Train one network into `folder`, unless that was done before."""
    if (before := _run(folder)) and before.status in ENDED:
        return
    shutil.rmtree(folder, ignore_errors=True)
    from revtrain.conf import compose
    from revtrain.errors import RevtrainError
    from revtrain.training.run import train

    if variant == "authors":
        _invert_by_the_unbiased_variance()
    with suppress(RevtrainError):  # a loss that is not finite is a result, too
        train(compose([*SETTING, *VARIANTS[variant], f"backward={backward}", f"seed={seed}", *overrides]), folder)
    print(_line(variant, backward, seed, _run(folder)), flush=True)


def _invert_by_the_unbiased_variance() -> None:
    """The authors' inverse: the deviation that it multiplies by is not the one that the forward pass divided by."""
    import revtrain.models.layerwise as layerwise
    from revtrain.layers import InvertibleBatchNorm2d

    class UnbiasedInverse(InvertibleBatchNorm2d):
        def forward_(self, x):
            y, saved = super().forward_(x)
            count = y.numel() / self.channels
            return y, saved._replace(deviation=saved.deviation * math.sqrt(count / (count - 1)))

    layerwise.InvertibleBatchNorm2d = UnbiasedInverse


def _run(folder: Path) -> Run | None:
    return read_run(folder, problems=[])


def _line(variant: str, backward: str, seed: int, run: Run | None) -> str:
    if run is None or not run.completed:
        return f"{variant} {backward} seed {seed}: {((run and run.error) or 'not ended').splitlines()[0]}"
    snr = f", minimum SNR {run.snr_minimum_db:.1f} dB" if run.snr_minimum_db is not None else ""
    return f"{variant} {backward} seed {seed}: {100 * run.test_accuracy:.2f} %{snr}"


def table(out: Path, seeds: int) -> str:
    """Markdown: accuracies in %, means over the seeds that have ended in both modes."""
    lines = [
        "| variant | seeds | store % | invert % | gap, points | minimum SNR dB, after training |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        found = {
            backward: [_run(out / f"{variant}-{backward}-{seed}") for seed in range(seeds)]
            for backward in ("store", "invert")
        }
        pairs = [
            (s, i)
            for s, i in zip(found["store"], found["invert"], strict=True)
            if s and i and s.completed and i.status in ENDED
        ]
        if not pairs:
            continue
        lost = [i for _, i in pairs if not i.completed]
        if lost:
            store = _spread([100 * s.test_accuracy for s, _ in pairs])
            why = f"diverged ({len(lost)} of {len(pairs)} seeds)"
            snr = ", ".join("-" if i.snr_minimum_db is None else f"{i.snr_minimum_db:.1f} at the start" for i in lost)
            lines.append(f"| {variant} | {len(pairs)} | {store} | {why} | - | {snr} |")
            continue
        store, invert = ([100 * r.test_accuracy for r in side] for side in zip(*pairs, strict=True))
        gaps = [a - b for a, b in zip(store, invert, strict=True)]
        snr = ", ".join(f"{i.snr_minimum_db:.1f}" for _, i in pairs)
        lines.append(f"| {variant} | {len(pairs)} | {_spread(store)} | {_spread(invert)} | {_spread(gaps)} | {snr} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="configuration, e.g. epochs=4 width=8")
    parser.add_argument("--data", required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, default=Path("outputs/layerwise_gap"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that are there")
    args = parser.parse_intermixed_args(argv)
    if not args.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        overrides = [f"data.root={args.data}", *args.overrides]
        jobs = [
            (variant, backward, seed, args.out / f"{variant}-{backward}-{seed}", overrides)
            for seed in range(args.seeds)
            for variant in VARIANTS
            for backward in ("store", "invert")
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context, max_tasks_per_child=1) as pool:
            for job in [pool.submit(run, *job) for job in jobs]:
                job.result()
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
