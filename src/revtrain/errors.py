"""The one exception that a user is meant to read."""


class RevtrainError(Exception):
    """A mistake that the user can mend.

    The message says, in two to five lines, what was given, what was expected and what to do. The command
    line prints it without a traceback and exits with code 2.
    """
