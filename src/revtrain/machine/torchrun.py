"""How this process was started: alone, or by torchrun as one of several that train one network together.

torchrun tells each process its place in environment variables. They are read here, without torch, since the command
line asks before torch is needed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from revtrain.errors import RevtrainError

# all of them are set, or the process is alone: clusters set some of them for reasons of their own
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A process other than the first makes no run directory and no log.
SILENT = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


def size() -> int:
    """How many processes train together; 1: this one alone."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def rank() -> int:
    """The place of this process, 0 to `size()` - 1. The first alone prints and writes."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """The place of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def command() -> list[str]:
    """The words that start a run as this one was started."""
    if size() == 1:
        return ["revtrain"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    machines = [f"--nnodes={size() // here}"] if here < size() else []
    return ["torchrun", *machines, f"--nproc-per-node={here}", "-m", "revtrain"]


def silenced(argv: Sequence[str]) -> list[str]:
    """The command line for a process that leaves nothing behind."""
    names = tuple(word.partition("=")[0] + "=" for word in SILENT)
    return [*(word for word in argv if not word.startswith(names)), *SILENT]


def refuse_sweep() -> None:
    """Raises `RevtrainError` where several processes train together: they would have to share every job."""
    if size() > 1:
        raise RevtrainError(
            f"A sweep (-m) was asked for in each of {size()} processes of torchrun; one torchrun takes one run.\n"
            "Start the sweep without torchrun, or torchrun once for every run."
        )


def leave(code: int) -> NoReturn:
    """End this process. One of several ends without the interpreter's cleaning up, in which threads of torch's
    connections abort a process now and then, after complete work."""
    if size() > 1:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
