"""The number format of a chain's states, the activations between its layers (configuration key `stream`).

    plain      floating point, as the paper has it: the inverse of a sum is off by its rounding
    float32    floating point on a grid: values and residuals are multiples of 2^-16, and sums of such numbers are
               exact below 2^8
    int32      fixed point: multiples of 2^-16 as 32-bit integers; sums are exact below 2^15
    int16      fixed point in half of the bytes: multiples of 2^-8; sums are exact below 2^7

On a grid, y1 = x1 + round(F(x2)) is undone to the last bit at any depth. A sum can leave the range.
Integers then wrap round, which is still undone exactly, but the network has computed with a wrong value. Floating point
rounds it, which is a good value, but is not undone exactly. Either way it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revtrain.core.precision import current_pass
from revtrain.errors import RevtrainError
from revtrain.kernels import add_to_part_, read_part

# name -> (dtype of the state, None: as the input comes; bits after the point, None: no grid)
_KINDS: dict[str, tuple[torch.dtype | None, int | None]] = {
    "plain": (None, None),
    "float32": (None, 16),
    "int32": (torch.int32, 16),
    "int16": (torch.int16, 8),
}
STATE_FORMATS = tuple(_KINDS)


@dataclass(frozen=True)
class StateFormat:
    """The number format of a chain's states.

    Args:
        name: one of `STATE_FORMATS`.
        grid_bits: b, values are multiples of 2^-b; None: what the format is made for.

    Raises `RevtrainError` for an unknown name, or a grid that the format cannot have.
    """

    name: str = "plain"
    grid_bits: int | None = None

    def __post_init__(self):
        if self.name not in _KINDS:
            raise RevtrainError(f"stream={self.name} is unknown.\nExpected one of: {', '.join(STATE_FORMATS)}.")
        most = {"plain": 0, "float32": 23, "int32": 30, "int16": 14}[self.name]
        if self.grid_bits is not None and not 1 <= self.grid_bits <= most:
            wish = f"a whole number from 1 to {most}" if most else "null: a plain stream has no grid"
            raise RevtrainError(f"grid_bits={self.grid_bits} was given with stream={self.name}.\nExpected {wish}.")

    @property
    def bits(self) -> int | None:
        return _KINDS[self.name][1] if self.grid_bits is None else self.grid_bits

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the state; None: that of the chain's input, at least float32."""
        return _KINDS[self.name][0]

    @property
    def is_integer(self) -> bool:
        return self.dtype is not None

    @property
    def range(self) -> float:
        """Below this magnitude all sums are exact."""
        if self.bits is None:
            return 0.0
        return 2.0 ** ((24 if self.dtype is None else torch.iinfo(self.dtype).bits - 1) - self.bits)

    @property
    def step(self) -> float:
        """The distance between two numbers of the grid, 2^-b. Raises `ValueError` where there is none."""
        if self.bits is None:
            raise ValueError(f"state format {self.name} has no grid")
        return 2.0**-self.bits

    def rounds(self, x: Tensor) -> bool:
        """Whether values in the precision of x are rounded to the grid. Those in float64 are not, unless they stand for
        the states of an integer format (backward=store)."""
        return self.bits is not None and (x.dtype == torch.float32 or (self.is_integer and x.dtype == torch.float64))

    def snap(self, x: Tensor) -> Tensor:
        """Floating-point x on the grid, exactly; its gradient passes as if nothing had been rounded. A grid needs
        float32 at least."""
        x = x if self.bits is None else x.to(_at_least_float32(x.dtype))
        if not self.rounds(x):
            return x
        snapped = (x.detach() * (1 / self.step)).round_().mul_(self.step)
        return snapped + (x - x.detach()) if x.requires_grad else snapped

    def encode(self, x: Tensor, piece_bytes: int, overflows: Tensor | None = None) -> Tensor:
        """x (B, ...) as a state; `overflows` () int64 counts the values out of range (see `add_`).

        The state is a contiguous copy that the chain may overwrite: the caller's graph may need x (a ReLU saves
        it). It holds float32 at least: its sums are what the inverse has to undo, under autocast, too.
        """
        dtype = self.dtype or _at_least_float32(x.dtype)
        if not (self.is_integer or self.rounds(x.new_empty(0, dtype=dtype))):
            return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        state = torch.zeros(x.shape, dtype=dtype, device=x.device)
        self.add_(state, x, 1.0, piece_bytes, overflows)
        return state

    def decode(self, state: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of (a part of) a state in floating point: a dense copy.

        `dtype` is for integer states; those in floating point keep theirs.
        """
        if state.is_floating_point():
            return read_part(state, state.dtype)
        return read_part(state, dtype, unit=self.unit)

    @property
    def unit(self) -> float:
        """What one of a state's units is worth: the step of the grid for integers, else 1."""
        return self.step if self.is_integer else 1.0

    def add_(
        self, state: Tensor, residual: Tensor, factor: float, piece_bytes: int, overflows: Tensor | None = None
    ) -> None:
        """state += factor residual, in place, on the grid, over pieces of the batch.

        `overflows` () int64 counts the values that leave the range of the grid.
        """
        current = current_pass()
        step = self.step if not state.is_floating_point() or self.rounds(state) else 0.0
        add_to_part_(
            state,
            residual,
            factor,
            step=step,
            limit=self.range,
            overflows=overflows,
            no_numbers=current.no_numbers if current is not None and self.is_integer else None,
            piece_bytes=piece_bytes,
        )


PLAIN = StateFormat()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
