"""The one exception that a user is meant to read, and how it shows names."""

from __future__ import annotations

from typing import Any


class RevtrainError(Exception):
    """A mistake that the user can mend.

    The message says, in two to five lines, what was given, what was expected and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class ImageError(RevtrainError):
    """An image that cannot be used, met in the middle of training: no step has begun with it."""


def printable(name: Any) -> str:
    """A name as a message shows it: what is no letter of a line (a break, an escape, bytes that are no UTF-8) is
    written as an escape."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in str(name)
    )
