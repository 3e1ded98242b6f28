"""A process that runs the commands in odd surroundings: it forks for each case, since a fresh start takes seconds.

It reads a JSON line for each case (command, words, surroundings, folder), and answers with the exit code. Standard
output and error of a case go to FOLDER/out and FOLDER/err where the surroundings leave them there.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pwd
import sys

import torch.utils.tensorboard  # noqa: F401  all of these once for all children

import revtrain.data
import revtrain.inference.evaluate
import revtrain.inference.export
import revtrain.inference.predict
import revtrain.models
import revtrain.planning.plan
import revtrain.report.page
import revtrain.training.run  # noqa: F401
from revtrain import figures
from revtrain.cli import inference, report, train

if figures.available():
    import matplotlib.font_manager  # noqa: F401  which looks at all fonts of the machine

COMMANDS = {
    "revtrain": train.main,
    "revtrain-report": report.main,
    "revtrain-eval": inference.evaluate_main,
    "revtrain-export": inference.export_main,
}


def refusing(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


def unknown(*args):
    raise KeyError("uid not found")


def reopen(number, target):
    opened = os.open(target, os.O_WRONLY)
    os.dup2(opened, number)
    os.close(opened)


def enter(name, folder):
    """Change this process as `name` says."""
    if name == "ascii":
        os.environ |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(stream.buffer, "ascii", "strict", line_buffering=True)
            for stream in (sys.stdout, sys.stderr)
        )
    elif name.startswith("closed"):
        if "stdout" in name:
            os.close(1)
            sys.stdout = sys.__stdout__ = None
        if "stderr" in name:
            os.close(2)
            sys.stderr = sys.__stderr__ = None
    elif name == "a pipe that nobody reads":
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
        os.close(writing)
    elif name == "a full device":
        reopen(1, "/dev/full")
    elif name == "no home":
        for key in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
            os.environ.pop(key, None)
        pwd.getpwuid = pwd.getpwnam = unknown
    elif name == "read-only home":
        os.environ["HOME"] = "/proc"
        os.environ.pop("XDG_CACHE_HOME", None)
    elif name.startswith("umask"):
        os.umask(int(name.split()[1], 8))
    elif name == "no chmod, fsync, flock, link":
        os.chmod = os.fchmod = refusing(errno.EPERM)
        os.fsync = refusing(errno.EINVAL)
        os.link = refusing(errno.EOPNOTSUPP)
        fcntl.flock = refusing(errno.ENOLCK)
    elif name == "a folder whose name is no UTF-8":
        os.mkdir(b"caf\xe9 \xff")
        os.chdir(b"caf\xe9 \xff")
    elif name == "a deleted folder":
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir(os.path.join(folder, "gone"))
    else:
        assert name == "plain", name


def child(command, words, surroundings, folder):
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
    enter(surroundings, folder)
    try:
        code = COMMANDS[command](words)
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            return 120  # as the interpreter ends
    return code


def main():
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(**case)
            except BaseException:
                import traceback

                with open(os.path.join(case["folder"], "escaped"), "w") as file:
                    traceback.print_exc(file=file)
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
