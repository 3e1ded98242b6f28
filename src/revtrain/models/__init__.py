"""The architectures: one file here and one yaml in `conf/arch/` each; they are found, not listed.

An architecture's file holds all that concerns it. It starts with a shape legend, its stages and a diagram, and defines

    Settings   a dataclass: the keys that it has besides those of every network (left out: none)
    TRAITS     a `Traits`: what the rest of the program must know of it
    build      (network, images) -> the module
    memory     (network, images) -> the modules of its memory in closed form, from `revtrain.memory.formulas` (left out:
               none; the prediction with fake tensors serves any network)
    advise     (network) -> what to change on the command line for less noise of reconstruction, the best first, as in
               ["max_gain=1", "a larger slope (now 0.2)"] (left out: nothing)
    advise_on_halves   likewise, for halves that do not become copies of each other (left out: a smaller residual_scale)

Neither torch nor anything that needs it is imported at the head of such a file: the command line reads the `Settings`
of all of them before torch is there. Images are (B, 3, H, W), logits (B, classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from revtrain.config import Config, CouplingSettings, InvertibleSettings, Network, read, registry
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import MemoryModel, memory_model

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

SHARED = ("common",)  # modules of this package that are no architecture
Noise = Literal["nowhere", "in blocks", "along the chain"]
Task = Literal["classify", "segment"]


class Images(NamedTuple):
    """What a network must know of the data."""

    classes: int
    size: int | Sequence[int]  # side in pixels, or [height, width]; see `revtrain.config.ImageSize`


@dataclass(frozen=True)
class Traits:
    """What the program must know of an architecture besides how to build it.

    `reversible`: something is rebuilt in the backward pass, so `backward=store` is another way to train it, and its
    channels are halved. `task`: what it is for; one for "segment" ends in a `revtrain.layers.DenseHead`, takes labels
    beside the images, and then returns the loss of each. `noise` says where reconstruction errors pile up, from the
    least to the most: "nowhere", "in blocks" (inside a coupling block, which begins anew from a true input) or "along
    the chain" (from layer to layer).
    `hardly_uses`: keys of every network that make no difference here, or next to none, and why.
    """

    reversible: bool = True
    task: Task = "classify"
    noise: Noise = "nowhere"
    hardly_uses: Mapping[str, str] = field(default_factory=dict)


def architectures() -> list[str]:
    """The names that `arch=` accepts, sorted."""
    return registry.names("models")


def traits(arch: str) -> Traits:
    """The traits of an architecture."""
    return registry.load("models", arch).TRAITS


def for_task(task: str) -> list[str]:
    """The architectures for one task, sorted."""
    return [name for name in architectures() if traits(name).task == task]


def divisor(network: Network[Any]) -> int:
    """Of the sides of an image: each pooling halves them."""
    return 2 ** len(network.pooling)


def less_noisy(arch: str) -> list[str]:
    """The reversible architectures next to this one in noise: those with the most of all that have less."""
    order = get_args(Noise)
    same_task = for_task(traits(arch).task)
    found = {name: order.index(traits(name).noise) for name in same_task if traits(name).reversible}
    less = {name: noise for name, noise in found.items() if noise < order.index(traits(arch).noise)}
    return [name for name, noise in less.items() if noise == max(less.values())]


def advise(network: Network[Any]) -> list[str]:
    """What its architecture advises for less noise of reconstruction, the best first; [] where it has nothing."""
    found = getattr(registry.load("models", network.arch), "advise", None)
    return found(network) if found is not None else []


def advise_on_halves(network: Network[Any]) -> list[str]:
    """What to change where the two halves of the state have become copies of each other, the best first."""
    found = getattr(registry.load("models", network.arch), "advise_on_halves", None)
    ways = found(network) if found is not None else []
    if isinstance(network.own, CouplingSettings):
        ways = [*ways, f"a smaller residual_scale (now {network.own.residual_scale:g})"]
    return ways or ["another arch"]


def build_model(
    cfg: DictConfig | Mapping[str, Any] | Config,
    classes: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """The network that the composed configuration `cfg` describes.

    Args:
        cfg: as `revtrain.conf.compose` or Hydra returns it, or a `revtrain.config.Config`.
        classes: number of classes; None: `data.classes`, or 10.
        image_size: side of the images in pixels, or [height, width], to check the pooling; None: `data.image_size`, or
            32.

    Returns:
        A module from images (B, 3, H, W) float to logits (B, classes); its backward pass follows `backward`.

    Raises:
        RevtrainError: a value that no run could use, or a network that cannot be built.
    """
    config = read(cfg)
    data = config.data
    return build(config.network, Images(classes or data.classes or 10, image_size or data.image_size or 32))


def build(network: Network[Any], images: Images) -> nn.Module:
    """The network of one part of the configuration; see `build_model`."""
    from revtrain.kernels.pieces import set_chunk_mib

    _check_known(network.arch)
    model = registry.load("models", network.arch).build(network, images)
    if isinstance(network.own, CouplingSettings) and network.own.zero_last:
        from revtrain.models.common import start_at_zero

        start_at_zero(model)
    set_chunk_mib(model, network.piece_mib())
    return model


def analytic_memory(
    cfg: DictConfig | Mapping[str, Any] | Config, classes: int = 10, image_size: int | Sequence[int] = 32
) -> MemoryModel:
    """The memory of one training step of `cfg` in closed form, term by term.

    Args:
        cfg: as `build_model` takes it.
        classes: of the head.
        image_size: side of the images in pixels, or [height, width].

    Raises:
        RevtrainError: an architecture whose file has no closed form.
    """
    config = read(cfg)
    network = config.network
    _check_known(network.arch)
    modules = getattr(registry.load("models", network.arch), "memory", None)
    if modules is None:
        raise RevtrainError(
            f"arch={network.arch} has no closed form of its memory: its file has no function `memory`.\n"
            "The prediction with fake tensors (revtrain.planning.predict) serves any network."
        )
    training, built = config.training, modules(network, Images(classes, image_size))
    return memory_model(network, built, image_size, training.momentum, training.ema_decay is not None)


def _check_known(arch: str) -> None:
    if arch not in architectures():
        raise RevtrainError(f"arch={arch} is unknown.\nExpected one of: {', '.join(architectures())}.")


# ---- what several architectures share, without torch; with it: common.py ---------------------------------


def spread_depth(depth: int, stages: int) -> list[int]:
    """`depth` units over `stages` stages, as evenly as can be, earlier stages first: (7, 3) -> [3, 2, 2]."""
    if depth < 1:
        raise RevtrainError(f"depth={depth} leaves nothing to train.\nExpected 1 or more repeated units.")
    return [depth // stages + (stage < depth % stages) for stage in range(stages)]


def units_of_stages(network: Network[Any]) -> list[int]:
    """The units of every stage: `depth` of them, over one stage more than there are poolings."""
    return spread_depth(network.depth, len(network.pooling) + 1)


def advise_on_couplings(own: CouplingSettings) -> list[str]:
    """Sums on a grid are undone exactly: a plain stream has the only noise that coupling blocks themselves have."""
    return ["stream=auto"] if own.stream == "plain" else []


def advise_on_invertible_layers(slope: float, own: InvertibleSettings) -> list[str]:
    """Less gain, more negative BN gains, a larger slope: see docs/numerics.md."""
    ways = []
    if own.max_gain is None or own.max_gain > 1:
        ways.append("max_gain=1")
    if own.norm_sign != "negative":
        ways.append("norm_sign=" + {"positive": "mixed", "mixed": "negative"}[own.norm_sign])
    if slope < 0.5:
        ways.append(f"a larger slope (now {slope:g})")
    return [*ways, f"a larger epsilon_i (now {own.epsilon_i:g})"]
