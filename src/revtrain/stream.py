"""Former place and name of `revtrain.core.state_format.StateFormat`, for programs that import it from here."""

from revtrain.core.state_format import PLAIN
from revtrain.core.state_format import StateFormat as Stream

__all__ = ["PLAIN", "Stream"]
