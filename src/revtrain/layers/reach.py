"""How far a function looks: which pixels of its input a pixel of its result depends on.

A function of convolutions can be run on a tile of an image that is read with a halo as wide as their reaches added up:
values near a cut are wrong, since a convolution pads there, and are left out; at the image's border it pads as ever.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.conv import _ConvNd

from revtrain.core.hooks import has_hooks

log = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish),
    nn.Identity,
)
_said: set[str] = set()  # of which functions it was said that they run untiled


def reach_of(module: nn.Module) -> tuple[int, ...] | None:
    """In pixels, for each dimension of the image; (): each value depends on one pixel alone; None: it is not known.

    Known are torch's convolutions of stride 1 that keep the size of the image, its activations, and rows of these. A
    module of one's own says so by an attribute `reach`: pixels, for all dimensions or each; 0 for one that looks at
    each pixel alone. Not known, that is the whole image: attention, global pooling, norms, dropout.
    """
    said = getattr(module, "reach", None)
    if isinstance(said, int | tuple | list):  # another may have something else by this name
        return (said,) if isinstance(said, int) else tuple(said)
    if has_hooks(module) or "forward" in vars(module):
        return None
    if isinstance(module, _CONVOLUTIONS) and type(module).forward in [each.forward for each in _CONVOLUTIONS]:
        return reach_of_convolution(module)
    if type(module) in _POINTWISE:
        return ()
    if type(module) is nn.Sequential:
        return _sum([reach_of(each) for each in module])
    return None


def say_untiled(name: str) -> None:
    """Say once of a function that its memory grows with the image."""
    if name not in _said:
        _said.add(name)
        log.warning(
            "pieces     %s runs on whole images: how far it looks is not known, and its memory grows with the image. "
            "If it looks at neighbours only, give its module an attribute `reach`, in pixels.", name
        )  # fmt: skip


def reach_of_convolution(conv: _ConvNd) -> tuple[int, ...] | None:
    """See `reach_of`."""
    if any(step != 1 for step in conv.stride) or conv.padding_mode == "circular":
        return None
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        return None
    reach = tuple(span // 2 for span in spans)
    return reach if conv.padding == "same" or conv.padding == reach else None


def _sum(reaches: list[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [each for each in reaches if each is not None]
    if len(known) < len(reaches):
        return None
    length = max(map(len, known), default=0)
    # a single number stands for all dimensions
    wide = [each * length if len(each) == 1 else each for each in known if each]
    return tuple(map(sum, zip(*wide, strict=True))) if wide else ()
