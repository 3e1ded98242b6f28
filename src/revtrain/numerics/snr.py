"""SNR of reconstructed activations: |signal|^2 / |error|^2 (Eq. 15), in decibels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain, observe
from revtrain.numerics.decibels import EXACT_DB
from revtrain.numerics.probing import inverts, loss_gradients, on_the_side

SNR_CEILING_DB = EXACT_DB


def snr_db(true: Tensor, rebuilt: Tensor) -> float:
    """10 log10(sum true^2 / sum (true - rebuilt)^2), summed in float64 (Eq. 15); at most SNR_CEILING_DB.

    Non-finite values in `rebuilt` give -SNR_CEILING_DB: nothing of the signal is left.
    """
    signal, error = (each.item() for each in _signal_and_error(true, rebuilt))
    if not math.isfinite(error):
        return -SNR_CEILING_DB
    if error == 0:
        return SNR_CEILING_DB
    if signal == 0:
        return -SNR_CEILING_DB
    return max(-SNR_CEILING_DB, min(SNR_CEILING_DB, 10 * math.log10(signal / error)))


def _signal_and_error(true: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
    true, rebuilt = true.double(), rebuilt.double()
    return true.square().sum(), (true - rebuilt).square().sum()


class SnrObserver:
    """Keeps every layer's true input on the host, and compares it with what the backward pass rebuilds.

    `values` maps a layer's name (see `layer_names`) to the SNR in dB of its rebuilt input.
    """

    def __init__(self, model: nn.Module):
        self.values: dict[str, float] = {}
        self._names = layer_names(model)
        self._true: dict[nn.Module, Tensor] = {}

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        self._true[layer] = x.detach().to("cpu", copy=True)

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        self.compare(self._names[layer], self._true.pop(layer), x.detach().cpu())

    def compare(self, name: str, true: Tensor, rebuilt: Tensor) -> None:
        self.values[name] = snr_db(true, rebuilt)


class SnrMemory(SnrObserver):
    """Does what an `SnrObserver` does to tensors without values.

    Args:
        on_host: the model is where the true inputs are kept, so that they take of its memory.
    """

    def __init__(self, model: nn.Module, on_host: bool):
        super().__init__(model)
        self.on_host = on_host

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        if self.on_host:
            super().on_input(layer, x)

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        if self.on_host:
            super().on_reconstructed(layer, x)

    def compare(self, name: str, true: Tensor, rebuilt: Tensor) -> None:
        _signal_and_error(true, rebuilt)


def layer_names(model: nn.Module) -> dict[nn.Module, str]:
    """Readable names of all layers inside chains, in forward order: `trunk/00_AdditiveCoupling/f/02_CouplingConv2d`."""
    names: dict[nn.Module, str] = {}
    for path, chain in model.named_modules():
        if not isinstance(chain, InvertibleChain):
            continue
        digits = len(str(len(chain.layers) - 1))
        prefix = _readable(model, path)
        for index, layer in enumerate(chain.layers):
            name = f"{index:0{max(2, digits)}d}_{type(layer).__name__}"
            names[layer] = f"{prefix}/{name}" if prefix else name
    return names


def _readable(model: nn.Module, path: str) -> str:
    """`trunk.layers.0.f` -> `trunk/00_AdditiveCoupling/f`."""
    parts, module = [], model
    for part in path.split(".") if path else []:
        parent, module = module, getattr(module, part)
        if isinstance(module, nn.ModuleList) and part == "layers":
            continue
        if isinstance(parent, nn.ModuleList):
            part = f"{int(part):0{max(2, len(str(len(parent) - 1)))}d}_{type(module).__name__}"
        parts.append(part)
    return "/".join(parts)


def probe_snr(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """SNR in dB of the input of every layer that the backward pass rebuilds, on one batch in training mode.

    Runs a real forward and backward pass of the cross-entropy under the caller's autocast state, and leaves
    parameters, gradients, running statistics, mode and random numbers as they were.

    Args:
        images: (B, 3, H, W), normalised, on the model's device. labels: (B,) int64.

    Returns layer name -> dB in backward order; empty for a model that rebuilds nothing (`backward=store`).
    """
    if not inverts(model):
        return {}
    observer = SnrObserver(model)
    with on_the_side(model, images.device), observe(model, observer):
        loss_gradients(model, images, labels)
    return observer.values


def stream_overflows(model: nn.Module) -> dict[str, int]:
    """How many values left the range of the streams' grids so far, layer -> count; only layers where some did.

    The name of a chain itself stands for its input.
    """
    names = layer_names(model)
    counts = {}
    for path, module in model.named_modules():
        count = int(getattr(module, "overflows", 0))
        if count:
            counts[names.get(module, f"{path} (input)")] = count
    return counts
