"""Functions that a coupling runs over pieces of the batch: each sample has to be treated on its own."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from revtrain.errors import RevtrainError


def looks_at_the_batch(module: nn.Module) -> bool:
    """Whether `module` itself is a norm whose result or statistics depend on all samples, in its present mode.

    Or a `PreNorm` over one.
    """
    if getattr(module, "is_prenorm", False):
        return looks_at_the_batch(module.norm)  # type: ignore[arg-type]
    if isinstance(module, _BatchNorm):
        return module.training or not module.track_running_stats
    return isinstance(module, _InstanceNorm) and module.training and module.track_running_stats


def is_a_norm_of_each_sample(module: nn.Module) -> bool:
    """Whether `module` is one of torch's norms that look at one sample at a time."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _InstanceNorm)
    return isinstance(module, norms) and not looks_at_the_batch(module)


def check_per_sample(function: nn.Module, name: str) -> None:
    """Raise `RevtrainError` where `function` is known to look at the whole batch."""
    for path, module in function.named_modules():
        if looks_at_the_batch(module):
            raise RevtrainError(
                f"{name} is run over pieces of the batch, but {path or 'it'} is a {type(module).__name__}, whose "
                "statistics are those of the whole batch.\n"
                "Take it out, call eval() on it, or leave the batch whole: no per_sample=True, no PreNorm around it. "
                "GroupNorm and LayerNorm treat each sample on its own."
            )
