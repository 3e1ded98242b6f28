"""What the engine's guards cost: the processor's time inside of them, in percent of a training step.

    python scripts/guard_cost.py [--batch 64] [--rounds 5] [--width 32] [--arch chunked irevnet hybrid]

The guards record what a function's first run depends on and compare the second with it (docs/engine.md, section 4):
generators, attributes, buffers, versions, modes, fingerprints, foreign leaves, kept gradients. Every one of them is a
function; each is wrapped in a clock of this thread's processor time, nested calls counted once, while a step runs. What
the clocks themselves take counts for the guards, so that the figure is an upper bound; and it is no difference of two
large times, which other programs on the machine would disturb. One thread; the median over all rounds is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from revtrain.conf import compose
from revtrain.core import chain, layer, recompute
from revtrain.models import build_model

# where each guard lives; a step calls all of them
GUARDS: list[tuple[Any, str]] = [
    (recompute.FirstRun, "__init__"),
    (recompute.FirstRun, "end"),
    (recompute.FirstRun, "_keeps_a_state"),
    (recompute.SecondRun, "__init__"),
    (recompute.SecondRun, "__enter__"),
    (recompute.SecondRun, "__exit__"),
    (recompute.SecondRun, "_compare"),
    (recompute.SecondRun, "_refuse_foreign_leaves"),
    (recompute.AsItWas, "__init__"),
    (recompute.AsItWas, "check"),
    (recompute, "sample"),
    (layer, "sample"),
    (layer, "users_of_memory"),
    (chain, "takes_context"),
]


class Clock:
    """Processor time inside of guards; a guard within a guard counts once."""

    def __init__(self) -> None:
        self.nanoseconds = self.depth = self.calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            start = time.thread_time_ns()
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                self.calls += 1
                self.nanoseconds += time.thread_time_ns() - start

        return timed


@contextmanager
def timed_guards() -> Iterator[Clock]:
    """Inside, every guard runs by a clock."""
    clock = Clock()
    with ExitStack() as stack:
        for owner, name in GUARDS:
            stack.enter_context(patch.object(owner, name, clock.around(getattr(owner, name))))
        yield clock


def step_of(model: nn.Module, batch: int) -> Callable[[], None]:
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def measure(arch: str, batch: int, rounds: int, width: int) -> tuple[float, float, int]:
    """(share of a step that the guards take at most, seconds of a step, guards called in one)."""
    # backward passes run in a thread of autograd's unless it is the caller's, which it is on a CPU
    step = step_of(build_model(compose(["data=synthetic", f"arch={arch}", f"width={width}"])), batch)
    step()
    shares, seconds, calls = [], [], 0
    for _ in range(rounds):
        with timed_guards() as clock:
            start = time.thread_time_ns()
            step()
            taken = time.thread_time_ns() - start
        shares.append(clock.nanoseconds / taken)
        seconds.append(taken / 1e9)
        calls = clock.calls
    return statistics.median(shares), statistics.median(seconds), calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--arch", nargs="+", default=["chunked", "irevnet", "hybrid"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for arch in options.arch:
        share, seconds, calls = measure(arch, options.batch, options.rounds, options.width)
        print(f"{arch:9} at most {100 * share:.2f} % of a step of {seconds:.2f} s; {calls} guards in it", flush=True)


if __name__ == "__main__":
    main()
