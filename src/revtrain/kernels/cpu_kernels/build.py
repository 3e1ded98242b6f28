"""passes.c as a library for this very processor: compiled once, in a second or two, and kept.

By the system's C compiler, without torch's headers. torch.compile would make such passes of the specifications, too,
but each process would wait ten seconds for the first of them, even where it is cached (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("passes.c")
SWITCH = "REVTRAIN_CPU_KERNELS"  # environment variable: "off" has plain torch operations run
# gcc's ivopts keeps an address for each of sixteen rows in memory, and moves them all on at each block: half the speed
FLAGS = ("-O3", "-fno-ivopts", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# what a compiler may not know: code for this processor, threads
WISHES = (("-march=native", "-fopenmp"), ("-march=native",), ())
MOST_SECONDS = 60


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler, or it fails: one line says why, and plain torch runs."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        with _folder() as folder:
            known = folder / f"passes-{_fingerprint()}.so"
            if not _is_ours(known):
                compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
                if compiler is None:
                    log.info("kernels    no C compiler was found: plain torch operations run on the CPU, slower")
                    return None
                _compile(compiler, known)
            return _declared(ctypes.CDLL(str(known)))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = next(iter(str(getattr(error, "stderr", "") or error).splitlines()), "")
        log.info("kernels    the C compiler could not serve: %s; plain torch operations run on the CPU, slower", reason)
        return None


def _compile(compiler: str, known: Path) -> None:
    """Write `known`, whole or not at all: several processes may compile at the same time."""
    begin = time.perf_counter()
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=known.parent)
    os.close(descriptor)
    made = Path(name)
    try:
        for wish in WISHES:
            # torch's own threads serve, too: a second set of them would be in their way
            threads = [*map(str, _openmp_of_torch())] if "-fopenmp" in wish else []
            command = [compiler, *FLAGS, *wish, str(SOURCE), "-o", str(made), *threads, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        with suppress(OSError):  # a mount may refuse it
            made.chmod(0o700)
        made.replace(known)
    finally:
        made.unlink(missing_ok=True)
    log.info("kernels    compiled for this CPU in %.1f s", time.perf_counter() - begin)


def _openmp_of_torch() -> list[Path]:
    """The OpenMP library that torch brings along, if it does."""
    packages = Path(torch.__file__).parent
    folders = packages / "lib", packages.parent / "torch.libs"
    return [each for folder in folders for each in sorted(folder.glob("libgomp*.so*"))][:1]


@contextmanager
def _folder() -> Iterator[Path]:
    """Where compiled passes are kept: the user's cache; where that cannot be written, a folder that goes again."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = cache_home / "revtrain" / "kernels"
    if cache_home.is_absolute():  # not so where there is no home directory
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            yield folder
            return
    with tempfile.TemporaryDirectory(prefix="revtrain-") as own:  # what is loaded stays loaded
        yield Path(own)


def _fingerprint() -> str:
    """Of all that the compiled code depends on: a home directory may be shared by unlike machines."""
    cpu = platform.machine()  # platform.processor() would start a program: uname
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass
    parts = (SOURCE.read_bytes(), cpu.encode(), torch.__version__.encode(), repr((FLAGS, WISHES)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether it is there, and nobody else could have written it: it will be run."""
    try:
        status = path.stat()
    except OSError:
        return False
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not (others or (hasattr(os, "getuid") and status.st_uid != os.getuid()))


_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class View(ctypes.Structure):
    """A tensor's first value, and how many values samples, rows and channels lie apart."""

    _fields_ = (("at", _P), ("sample", _I), ("row", _I), ("channel", _I))


_V = ctypes.POINTER(View)
_SHAPE, _IN_ROWS = [_I, _I, _I], [_I, _I, _I, _I]  # B, C, S; B, C, R, S
_ARGUMENTS: dict[str, list[type]] = {
    "read": [_V, _V, _N, *_IN_ROWS, _F, _P, _P, _N],
    "add": [_V, _V, _N, *_IN_ROWS, _F, _F, _F, _F, _F, _N],
    "sums": [_P, _I, *_SHAPE, _P, _P, _N],
    "forward": [_P, *_SHAPE, _P, _P, _P, _F, _P, _N],
    "activation_sums": [_P, _P, _P, *_SHAPE, _P, _P, _F, _P, _N],
    "undo": [_P, _P, _P, *_SHAPE, _P, _P, _P, _P, _F, _P, _N],
    "norm_gradient": [_V, _V, _N, _V, *_IN_ROWS, _P, _P, _P, _I, _N],
    "norm_rest": [_P, _I, _P, _I, *_SHAPE, _P, _P, _N],
    "pool": [_P, _I, _I, _I, _I, _I, _N, _P, _N],
}


def _declared(passes: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _ARGUMENTS.items():
        function = getattr(passes, f"revtrain_{name}")
        function.argtypes, function.restype = arguments, _I if name == "add" else None
    return passes
