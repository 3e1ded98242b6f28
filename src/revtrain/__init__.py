"""Reversible CNN training: activations are recomputed from the layer above instead of stored."""

from revtrain.errors import RevtrainError

__version__ = "0.1.0"
__all__ = ["RevtrainError", "__version__"]
