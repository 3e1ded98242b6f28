"""The number format of a chain's states, the activations between its layers (configuration key `stream`).

    plain      floating point, as the paper has it: the inverse of a sum is off by its rounding
    float32    floating point on a grid: values and residuals are multiples of 2^-16, and sums of such numbers are
               exact below 2^8
    int32      fixed point: multiples of 2^-16 as 32-bit integers; sums are exact below 2^15
    int16      fixed point in half of the bytes: multiples of 2^-8; sums are exact below 2^7

On a grid, y1 = x1 + round(F(x2)) is undone to the last bit at any depth (Eqs. 8, 9). A sum can leave the range.
Integers then wrap round, which is still undone exactly, but the network has computed with a wrong value. Floating point
rounds it, which is a good value, but is not undone exactly. Either way it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revtrain.core.pieces import batch_pieces
from revtrain.core.precision import NARROW, current_pass
from revtrain.errors import RevtrainError

# name -> (dtype of the state, None: as the input comes; bits after the point, None: no grid)
_KINDS: dict[str, tuple[torch.dtype | None, int | None]] = {
    "plain": (None, None),
    "float32": (None, 16),
    "int32": (torch.int32, 16),
    "int16": (torch.int16, 8),
}
STATE_FORMATS = tuple(_KINDS)
_WIDER = {torch.int16: torch.int32, torch.int32: torch.int64}


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

    def encode(self, x: Tensor, piece_bytes: int) -> tuple[Tensor, Tensor | None]:
        """x (B, ...) as a state, and how many of its values were out of range, as a tensor () (see `add_`).

        The state is a contiguous copy that the chain may overwrite: the caller's graph may need x (a ReLU saves
        it). It holds float32 at least: its sums are what the inverse has to undo, under autocast, too.
        """
        if not self.is_integer:
            state = x.to(_at_least_float32(x.dtype), copy=True, memory_format=torch.contiguous_format)
            if self.rounds(state):
                lost = []
                for sl in batch_pieces(state, piece_bytes):
                    state[sl].copy_(self.snap(state[sl]))
                    lost.append(self.beyond(state[sl]))
                return state, torch.stack(lost).sum()
            return state, None
        state = torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        lost = [
            self._add_integers_(state[sl], x[sl].to(_at_least_float32(x.dtype))) for sl in batch_pieces(x, piece_bytes)
        ]
        return state, torch.stack(lost).sum()

    def decode(
        self,
        state: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """The values of (a part of) a state in floating point: a dense copy. `dtype` is for integer states."""
        if state.is_floating_point():
            return state.clone(memory_format=memory_format)
        if dtype in NARROW and state.dtype == torch.int32:  # its whole numbers have no place in 16 bit
            return self.decode(state, torch.float32, memory_format).to(dtype)
        values = torch.empty(state.shape, dtype=dtype, device=state.device, memory_format=memory_format)
        return values.copy_(state).mul_(self.step)

    def add_(self, state: Tensor, residual: Tensor, sign: int = 1) -> Tensor | None:
        """state += sign * residual, in place, on the grid. Integers: how many values left the range, as a tensor ()."""
        if state.is_floating_point():
            state.add_(self.snap(residual), alpha=sign)
            return None
        return self._add_integers_(state, residual, sign)

    def _add_integers_(self, state: Tensor, residual: Tensor, sign: int = 1) -> Tensor:
        scaled = (residual * (1 / self.step)).round_()
        wider = _WIDER[state.dtype]
        beyond = ~(scaled.abs() < torch.iinfo(wider).max / 2)  # or not a number: adds nothing, but counts
        current = current_pass()
        if current is not None and current.no_numbers is not None:
            current.no_numbers.append(beyond.any())
        total = scaled.masked_fill_(beyond, 0).to(wider).mul_(sign).add_(state)
        state.copy_(total)
        return beyond.logical_or_(total != state).sum()

    def beyond(self, state: Tensor) -> Tensor:
        """How many values of a floating-point state lie outside the range (or are not numbers), as a tensor ()."""
        return torch.logical_not(state.abs() < self.range).sum()


PLAIN = StateFormat()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
