"""The smallest kernel: whether this machine can compile, load and start one at all."""

import torch
import triton
import triton.language as tl

from revtrain.kernels.triton_kernels.tiling import launch


def probe(device: torch.device) -> None:
    """Raises whatever goes wrong: no C compiler, a GPU or driver that the assembler does not know."""
    launch(kernel, (1,), device, dict(x=torch.empty(1, dtype=torch.uint8, device=device)))


@triton.jit
def kernel(x):
    tl.store(x, 1)
