"""Width and depth of every architecture for about the same number of parameters: what conf/size/*.yaml holds.

    python scripts/equal_sizes.py 11173962 [--within 0.015] [irevnet.pooling=[channel,channel] ...]

By the closed forms; nothing is run. Of the sizes within the bound the one is chosen whose depth is next to the
architecture's own; of those the nearest in parameters. ARCH.KEY=VALUE changes a key of one architecture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from revtrain.conf import compose
from revtrain.config import Network, read, registry
from revtrain.errors import RevtrainError
from revtrain.models import Images, analytic_memory, for_task, traits

IMAGES = Images(classes=10, size=32)


def sizes(network: Network[Any], target: int, within: float, deepest: int = 16) -> Iterator[tuple[int, Network[Any]]]:
    """(parameters, network) of all widths and depths near enough to `target`."""
    memory = registry.load("models", network.arch).memory
    depths = range(len(network.pooling) + 1, deepest + 1) if traits(network.arch).reversible else [network.depth]
    for depth in depths:
        for width in range(2, 257, 2):
            found = replace(network, width=width, depth=depth)
            parameters = sum(module.parameters for module in memory(found, IMAGES))
            if parameters > target * (1 + within):
                break
            if parameters >= target * (1 - within) and buildable(found):
                yield parameters, found


def buildable(network: Network[Any]) -> bool:
    """Whether an invertible block takes the width: hybrid halves it twice."""
    import torch

    try:
        with torch.device("meta"):
            registry.load("models", network.arch).build(network, IMAGES)
    except RevtrainError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parameters", type=int)
    parser.add_argument("keys", nargs="*", metavar="ARCH.KEY=VALUE")
    parser.add_argument("--within", type=float, default=0.015, help="share of the parameters (default: 0.015)")
    args = parser.parse_args(argv)
    for arch in for_task("classify"):
        own = [each.removeprefix(f"{arch}.") for each in args.keys if each.startswith(f"{arch}.")]
        config = read(compose([f"arch={arch}", "data=synthetic", *own]))
        if not hasattr(registry.load("models", arch), "memory"):
            continue
        found = list(sizes(config.network, args.parameters, args.within))
        if not found:
            print(f"{arch}: none within {args.within:.1%}")
            continue
        usual = config.network.depth
        best = min(found, key=lambda each: (abs(each[1].depth - usual), abs(each[0] - args.parameters)))
        parameters, network = best
        cost = analytic_memory(replace(config, network=network)).bytes_per_pixel
        off = parameters / args.parameters - 1
        print(f"{arch}: width {network.width}, depth {network.depth}: {parameters:,} ({off:+.1%}), {cost:.0f} B/px")


if __name__ == "__main__":
    main()
