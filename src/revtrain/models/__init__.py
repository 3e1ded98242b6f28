"""The architectures: one file here and one yaml in `conf/arch/` each; they are found, not listed.

An architecture's file holds all that concerns it. It starts with a shape legend, its stages and a diagram, and defines

    Settings   a dataclass: the keys that it has besides those of every network (left out: none)
    TRAITS     a `Traits`: what the rest of the program must know of it
    build      (network, images) -> the module
    memory     (network, images) -> its memory in closed form, from `revtrain.memory.closed_form` (left out: none; the
               prediction with fake tensors serves any network)
    advise     (network) -> words for the command line that lessen the noise of reconstruction (left out: none)

Neither torch nor anything that needs it is imported at the head of such a file: the command line reads the `Settings`
of all of them before torch is there. Images are (B, 3, H, W), logits (B, classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from revtrain.config import Network, read, registry
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from torch import nn

SHARED = ("common",)  # modules of this package that are no architecture


class Images(NamedTuple):
    """What a network must know of the data."""

    classes: int
    size: int  # side in pixels


@dataclass(frozen=True)
class Traits:
    """What the program must know of an architecture besides how to build it.

    `reversible`: something is rebuilt in the backward pass, so `backward=store` is another way to train it, and its
    channels are halved. `noise` says where reconstruction errors pile up: "nowhere", "in blocks" (inside a coupling
    block, which begins anew from a true input) or "along the chain" (from layer to layer).
    """

    reversible: bool = True
    noise: str = "nowhere"


def architectures() -> list[str]:
    """The names that `arch=` accepts, sorted."""
    return registry.names("models")


def traits(arch: str) -> Traits:
    """The traits of an architecture."""
    return registry.load("models", arch).TRAITS


def build_model(cfg: Any, classes: int | None = None, image_size: int | None = None) -> nn.Module:
    """The network that the composed configuration `cfg` describes.

    Args:
        cfg: as `revtrain.conf.compose` or Hydra returns it, or a `revtrain.config.Config`.
        classes: number of classes; None: `data.classes`, or 10.
        image_size: side of the images in pixels, to check the pooling; None: `data.image_size`, or 32.

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
    from revtrain.core.pieces import set_chunk_mib

    if network.arch not in architectures():
        raise RevtrainError(f"arch={network.arch} is unknown.\nExpected one of: {', '.join(architectures())}.")
    model = registry.load("models", network.arch).build(network, images)
    set_chunk_mib(model, network.chunk_mib)
    return model
