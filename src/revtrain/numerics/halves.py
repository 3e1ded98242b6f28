"""Whether the two halves of a reversible network's state say different things.

A coupling block y1 = x1 + F(x2), y2 = x2 + G(y1) whose F and G mostly hand their input on stretches the state along
x1 = x2 and shrinks it across: after some blocks the halves are copies of each other, and the network learns as one of
half its channels, at twice its memory. Nothing else in a run shows that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revtrain.config import Network
from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.models import advise_on_halves
from revtrain.numerics.probing import on_the_side, storing
from revtrain.numerics.snr import layer_names

log = logging.getLogger(__name__)

# Halves that correlate more than this share over half of their variance: 0.7^2.
COLLAPSED = 0.7


class Halves(NamedTuple):
    """The two halves of a state (B, C, ...)."""

    correlation: float  # of the one with the other, channel by channel, taken together; -1..1
    effective_rank: float  # of all channels, 1..C
    channels: int  # C


def correlation_of_halves(state: Tensor) -> float:
    """Pearson's correlation of the first with the second half of the channels of a state (B, C, ...), C even.

    The mean of each channel is taken off first; channel i of one half is compared with channel i of the other.
    """
    product, norms = _products(state)
    return 0.0 if norms == 0 else float(product / norms)


def _products(state: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar product of the halves, and that of their norms."""
    first, second = _centred(state).chunk(2)
    norms = first.norm() * second.norm()
    return (first * second).sum(), norms


def effective_rank(state: Tensor) -> float:
    """exp(entropy) of the shares of the principal components in the variance of the channels (Roy, Vetterli 2007).

    1 where all channels of a state (B, C, ...) are multiples of one, C where they are as independent as can be.
    """
    values = _centred(state)
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    variances = torch.linalg.eigvalsh(gram).clamp_min(0)
    shares = variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def _centred(state: Tensor) -> Tensor:
    """Its channels as rows, (C, B * ...), of mean zero, in float64."""
    values = state.detach().transpose(0, 1).flatten(1).double()
    return values - values.mean(1, keepdim=True)


def probe_halves(model: nn.Module, images: Tensor) -> dict[str, float | Halves]:
    """The correlation of the halves behind each layer of the outermost chains, and `Halves` behind the last.

    One forward pass in training mode, under the caller's autocast state; it leaves no trace. Layers behind which the
    number of channels is odd, and those inside F and G, are left out.

    Args:
        images: (B, 3, H, W), normalised, on the model's device.

    Returns layer name (see `numerics.snr.layer_names`) -> correlation, and "last" -> `Halves`; {} without a chain.
    """
    names, found = layer_names(model), dict[str, float | Halves]()
    last: list[Tensor] = []

    def look(layer: nn.Module, state: Tensor) -> None:
        found[names[layer]] = correlation_of_halves(state)
        last[:] = [state]

    _look_at_states(model, images, look)
    if last:
        state = last[0]
        found["last"] = Halves(correlation_of_halves(state), effective_rank(state), state.shape[1])
    return found


def count_halves(model: nn.Module, images: Tensor) -> None:
    """Do what `probe_halves` does to tensors without values, for a count of their memory."""
    _look_at_states(model, images, lambda layer, state: _products(state))


def _look_at_states(model: nn.Module, images: Tensor, look: Callable[[nn.Module, Tensor], object]) -> None:
    """One forward pass that stores, in which `look` sees the state behind each outer layer."""
    chains = [m for m in model.modules() if isinstance(m, InvertibleChain)]
    inside = {id(m) for chain in chains for layer in chain.layers for m in layer.modules()}
    outer = [layer for chain in chains if id(chain) not in inside for layer in chain.layers]

    def hook(layer: nn.Module, given: Any, state: Tensor) -> None:
        if state.dim() > 1 and state.shape[1] % 2 == 0:
            look(layer, state)

    hooks = [layer.register_forward_hook(hook) for layer in outer if isinstance(layer, InvertibleLayer)]
    try:
        with on_the_side(model, images.device), storing(model), torch.no_grad():
            model(images)
    finally:
        for each in hooks:
            each.remove()


def summarise_halves(found: dict[str, float | Halves]) -> dict[str, Any] | None:
    """The `halves` of a line of metrics.jsonl, from `probe_halves`; None for a network without halves."""
    last = found.pop("last", None)
    return {**last._asdict(), "layers": found} if isinstance(last, Halves) else None


class HalvesWatch:
    """Says once when the halves have become copies of each other."""

    def __init__(self, network: Network[Any]):
        self.network, self.warned = network, False

    def look(self, line: Mapping[str, Any]) -> None:
        """`line`: of metrics.jsonl."""
        halves = line["halves"]
        if self.warned or halves is None or abs(halves["correlation"]) < COLLAPSED:
            return
        self.warned = True
        log.warning(
            "halves     the two halves of the last state are nearly copies of each other at epoch %d: their\n"
            "           correlation is %.2f, the effective rank %.0f of %d channels. The network learns as one of\n"
            "           half its width. Try %s.",
            line["epoch"], halves["correlation"], halves["effective_rank"], halves["channels"],
            ", or ".join(advise_on_halves(self.network)),
        )  # fmt: skip
