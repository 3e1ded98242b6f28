"""What the engine's guards cost: a training step with them over one without, side by side in one process.

    python scripts/guard_cost.py [--batch 64] [--rounds 7]

The guards record what a function's first run depends on and compare the second with it (docs/engine.md, section 4).
Without them, buffers are still restored and parameters stood in for; random numbers, attributes, versions, modes,
fingerprints, foreign leaves and kept gradients are not looked at. One thread; the two take turns, and the median of
their ratios is printed, in percent of a step, in seconds of the processor, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from revtrain.conf import compose
from revtrain.core import layer, recompute
from revtrain.models import build_model


class _NoGenerators:
    def __init__(self, *_: object):
        pass

    def have_changed(self) -> bool:
        return False

    def now(self) -> _NoGenerators:
        return self

    def restore(self) -> None:
        pass


@contextmanager
def without_guards() -> Iterator[None]:
    """Inside, functions are recomputed as they are: for models that draw no random numbers and change no attributes."""
    first, second = recompute.FirstRun, recompute.SecondRun
    with ExitStack() as stack:
        for target, name, value in (
            (recompute, "Generators", _NoGenerators),
            (recompute, "sample", lambda x: None),
            (layer, "sample", lambda x: None),
            (recompute, "_slow_path", lambda needed: nullcontext()),
            (layer, "users_of_memory", lambda x: 0),
            (first, "_changed_attributes", lambda self: ()),
            (second, "_compare", lambda self, given, y: None),
            (second, "_refuse_foreign_leaves", lambda self, y, inputs: None),
            (recompute.AsItWas, "check", lambda self: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


def seconds_of(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def step_of(model: nn.Module, batch: int) -> Callable[[], None]:
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arch", nargs="+", default=["chunked", "irevnet", "hybrid"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for arch in options.arch:
        step = step_of(build_model(compose(["data=synthetic", f"arch={arch}", "width=16"])), options.batch)
        step()
        ratios = []
        for turn in range(options.rounds):
            # who goes first changes from turn to turn
            timed = {}
            for guarded in (True, False) if turn % 2 else (False, True):
                with nullcontext() if guarded else without_guards():
                    timed[guarded] = seconds_of(step)
            ratios.append(timed[True] / timed[False])
        print(f"{arch:9} {100 * (statistics.median(ratios) - 1):+.1f} % of a step of {timed[False]:.2f} s", flush=True)


if __name__ == "__main__":
    main()
