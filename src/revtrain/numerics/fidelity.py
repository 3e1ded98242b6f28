"""Whether gradients can still be trusted: a summary of the probes, and one warning that helps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from revtrain.config import Network
from revtrain.models import advise, less_noisy, traits
from revtrain.numerics.decibels import snr_text

log = logging.getLogger(__name__)

# Beyond this, noise makes up half of a gradient: sqrt(1 / 0.9^2 - 1) = 0.48.
TRUSTED_COSINE = 0.9
# Above this, what differs is not the reconstruction's doing but ordinary rounding, of 16 bit in a bias of few channels.
REBUILT_WELL_DB = 40.0


def summarise_gradients(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The `gradients` of a line of metrics.jsonl, from `probe_gradients`; None where nothing was compared.

    {"minimum_cosine", "minimum_cosine_parameter", "maximum_relative_error", "maximum_relative_error_parameter",
    "parameters": {name: {"cosine", "relative_error"}}}
    """
    if not parameters:
        return None
    least = min(parameters, key=lambda name: parameters[name].cosine)
    most = max(parameters, key=lambda name: parameters[name].relative_error)
    return {
        "minimum_cosine": parameters[least].cosine,
        "minimum_cosine_parameter": least,
        "maximum_relative_error": parameters[most].relative_error,
        "maximum_relative_error_parameter": most,
        "parameters": {name: each._asdict() for name, each in parameters.items()},
    }


def trusted(line: Mapping[str, Any]) -> bool | None:
    """Whether every parameter's gradient is there and points where the true one does.

    The latter as far as reconstruction decides it.

    Args:
        line: of metrics.jsonl. None is returned where gradients were not compared.
    """
    gradients, snr = line.get("gradients"), line.get("snr_db")
    if gradients is None:
        return None
    if any(each["cosine"] == 0 and each["relative_error"] == 1 for each in gradients["parameters"].values()):
        return False  # missing
    return gradients["minimum_cosine"] >= TRUSTED_COSINE or (snr is not None and snr["minimum"] >= REBUILT_WELL_DB)


class FidelityWatch:
    """Says once, and clearly, when rounding has taken the gradients over."""

    def __init__(self, network: Network[Any]):
        self.network, self.warned = network, False

    def look(self, line: Mapping[str, Any]) -> None:
        """`line`: of metrics.jsonl."""
        gradients, snr = line["gradients"], line["snr_db"]
        if self.warned or trusted(line) is not False:
            return
        self.warned = True
        where = f"rebuilt {_how(snr['minimum'])} in {snr['minimum_layer']}" if snr else "not rebuilt well enough"
        log.warning(
            "fidelity   gradients are no longer to be trusted at epoch %d: that of %s has a cosine of %.2f to\n"
            "           the true one, since activations are %s.\n"
            "           Try %s.",
            line["epoch"], gradients["minimum_cosine_parameter"], gradients["minimum_cosine"], where,
            ", ".join(remedies(self.network)),
        )  # fmt: skip


def _how(db: float) -> str:
    text = snr_text(db)
    return {"exact": "exactly", "nothing left": "to nothing"}.get(text, f"at {text}")


def remedies(network: Network[Any]) -> list[str]:
    """What to change on the command line for less noise of reconstruction, the best first; never empty."""
    ways = advise(network)
    if network.precision != "fp32":
        ways.append("precision=fp32")
    if traits(network.arch).noise != "nowhere":
        ways.append(f"a smaller depth (now {network.depth})")
        ways += [f"arch={name}" for name in less_noisy(network.arch)]
    return ways or ["backward=store"]
