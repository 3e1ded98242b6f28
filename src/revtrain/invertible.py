"""Former place of `revtrain.core.layer`, for programs that import it from here."""

from revtrain.core.gradients import Gradients
from revtrain.core.layer import InvertibleLayer

__all__ = ["Gradients", "InvertibleLayer"]
