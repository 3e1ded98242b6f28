"""Former place of `revtrain.core.chain`, for programs that import it from here."""

from revtrain.core.chain import BACKWARDS, InvertibleChain, observe

__all__ = ["BACKWARDS", "InvertibleChain", "observe"]
