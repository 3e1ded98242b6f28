"""How an operator is registered, and which of its forms a call runs.

    specification   plain torch; runs on any device, piece by piece of the batch
    kernel          Triton, one launch or two; on CUDA
    fake            shapes only, for planning; the counters see one operation

The specification is called as it is, not through the dispatcher: whoever counts live tensors sees its temporaries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("revtrain", "DEF")
LAUNCHES: dict[str, int] = {}  # operator -> launches of its kernel
LEAST_CAPABILITY = (7, 0)  # of GPUs that Triton serves

_planned_for: ContextVar[str | None] = ContextVar("planned_for", default=None)


@contextmanager
def planning_for(device_type: str | None) -> Iterator[None]:
    """Inside, fake tensors stand for tensors on a device of this type, wherever they say they are.

    torch cannot take gradients of fake CUDA tensors on a machine without CUDA; those of fake CPU tensors it can.
    """
    token = _planned_for.set(device_type)
    try:
        yield
    finally:
        _planned_for.reset(token)


def device_type(x: Tensor) -> str:
    """The type of the device that x is on, or that it stands for (see `planning_for`)."""
    return _planned_for.get() or x.device.type


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled here; if not, one line says that the plain form runs."""
    try:
        import triton  # noqa: F401  # only whether it is there
    except ImportError:
        log.warning("kernels    Triton is not installed: plain torch operations run in place of fused kernels, slower")
        return False
    return True


@cache
def serves(device: torch.device) -> bool:
    """Whether kernels run on this GPU; if not, one line says why. Found out once, without a wait for the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        reason = f"the GPU's compute capability is {major}.{minor}, and Triton serves {least} and above"
    else:
        from revtrain.kernels.triton_kernels.probe import probe

        try:
            probe(device)
            return True
        except Exception as error:  # of many kinds: no C compiler, no assembler for this GPU, no driver
            first_line = next(iter(str(error).splitlines()), "")
            reason = f"Triton cannot compile for it ({type(error).__name__}: {first_line})"
    log.warning("kernels    %s: plain torch operations run in place of fused kernels on %s, slower", reason, device)
    return False


def runs_kernel(x: Tensor) -> bool:
    """Whether an operator on x is one launch of a kernel rather than its specification."""
    if _planned_for.get() is not None:
        return _planned_for.get() == "cuda"
    # a fake tensor stands for one on a GPU that may not be here
    return x.is_cuda and has_triton() and (isinstance(x, FakeTensor) or serves(x.device))


def is_real(x: Tensor) -> bool:
    """Whether x has values on the CPU, and no mode watches single operations, as one that counts live tensors does."""
    watched = _get_current_dispatch_mode() is not None or torch.compiler.is_compiling()
    return x.is_cpu and not watched and not isinstance(x, FakeTensor)


def register(
    schema: str, fake: Callable[..., Any], kernel: Callable[..., Any], launches: int = 1
) -> Callable[..., Any]:
    """The operator revtrain::`schema`, to be called on CUDA tensors and on fake ones.

    Args:
        schema: name(arguments) -> results, in torch's notation.
        fake: the same arguments -> results of the right shapes, without values.
        kernel: the implementation on CUDA.
        launches: of kernels, for the count of a step's operations.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"revtrain::{name}", fake, lib=_LIBRARY)
    LAUNCHES[name] = launches
    return getattr(torch.ops.revtrain, name)
