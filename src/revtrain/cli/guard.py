"""What the small commands share: exit codes, and the ends that need no traceback."""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable

from revtrain.errors import RevtrainError

DONE, MENDABLE, INTERRUPTED = 0, 2, 130


def guarded(command: Callable[[Namespace], int], args: Namespace) -> int:
    """The exit code of `command`; an error that the user can mend is told in its own words."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        return command(args)
    except RevtrainError as error:
        print(error, file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # as in `revtrain-report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
