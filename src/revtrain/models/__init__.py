"""The architectures. One file and one yaml in `conf/arch/` each; `build_model` finds them by name.

Every file starts with a shape legend, its stages and a diagram. Images are (B, 3, H, W), logits (B, classes).
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

from revtrain.errors import RevtrainError
from revtrain.invertible import set_chunk_mib

_SHARED = {"parts"}  # modules of this package that are no architecture


def architectures() -> list[str]:
    """The names that `arch=` accepts, sorted."""
    return sorted(m.name for m in iter_modules(__path__) if m.name not in _SHARED)


def build_model(cfg: Any, classes: int | None = None, image_size: int | None = None) -> nn.Module:
    """The network that the composed configuration `cfg` describes.

    Args:
        cfg: as `hydra.compose` over `revtrain.conf` returns it; attribute access suffices.
        classes: number of classes; None: `cfg.data.classes`, or 10.
        image_size: side of the images in pixels, to check the pooling; None: `cfg.data.image_size`, or 32.

    Returns a module from images (B, 3, H, W) float to logits (B, classes); its backward pass follows
    `cfg.backward`. Raises `RevtrainError` for what cannot be built.
    """
    if cfg.arch not in architectures():
        raise RevtrainError(f"arch={cfg.arch} is unknown.\nExpected one of: {', '.join(architectures())}.")
    module = import_module(f"revtrain.models.{cfg.arch}")
    model = module.build(cfg, classes or cfg.data.classes or 10, image_size or cfg.data.image_size or 32)
    set_chunk_mib(model, cfg.chunk_mib)
    return model
