"""Which dimension of a tensor holds the channels, and how it is cut in two: for layers of any number of dimensions.

(B, C), (B, C, L), (B, C, H, W) and (B, C, D, H, W) have their channels at dim=1, tokens (B, T, C) at dim=-1.
"""

from __future__ import annotations

from torch import Tensor, nn

from revtrain.errors import RevtrainError

Split = int | tuple[int, int]


def check_dim(dim: int, layer: nn.Module) -> int:
    """`dim`, unless it is that of the batch. Raises `RevtrainError`."""
    if dim == 0:
        raise RevtrainError(
            f"{type(layer).__name__}: dim=0 is the batch.\n"
            "Expected the dimension of the channels: 1 for (B, C, ...), -1 for tokens (B, T, C)."
        )
    return dim


def part_sizes(channels: Split, layer: nn.Module) -> tuple[int, int]:
    """Sizes of the two parts: halves of an even number, or the pair itself. Raises `RevtrainError`."""
    sizes = (channels // 2, channels - channels // 2) if isinstance(channels, int) else channels
    are_sizes = isinstance(sizes, tuple | list) and len(sizes) == 2 and all(isinstance(each, int) for each in sizes)
    if not are_sizes or min(sizes) < 1 or (isinstance(channels, int) and sizes[0] != sizes[1]):
        raise RevtrainError(
            f"{type(layer).__name__}: channels={channels} was given; {channels} channels cannot be cut in two.\n"
            "Expected an even number, cut into two equal halves, or the sizes of both parts, such as (3, 5)."
        )
    return sizes[0], sizes[1]


def channel_dim(x: Tensor, dim: int, channels: int, layer: nn.Module) -> int:
    """`dim` counted from the front, once x is known to have `channels` channels there. Raises `RevtrainError`."""
    if not dim % max(1, x.dim()) > 0 or not -x.dim() <= dim < x.dim() or x.shape[dim] != channels:
        raise RevtrainError(
            f"{type(layer).__name__} of {channels} channels was given a tensor of shape {tuple(x.shape)}.\n"
            f"Expected {channels} channels in dimension {dim}, behind the batch. For tokens (B, T, C) use dim=-1."
        )
    return dim % x.dim()


def two_parts(x: Tensor, dim: int, sizes: tuple[int, int], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The two parts of x along `dim`, as views. Raises `RevtrainError` where the sizes do not add up."""
    at = channel_dim(x, dim, sum(sizes), layer)
    return x.narrow(at, 0, sizes[0]), x.narrow(at, sizes[0], sizes[1])


def per_channel(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """`values` (C,), shaped so that they meet the channels of x at `dim` >= 0."""
    return values.view(-1, *[1] * (x.dim() - dim - 1))


def check_result(result: Tensor, expected: tuple[int, ...], function: nn.Module, layer: nn.Module) -> None:
    """Raise `RevtrainError` unless what f returned has exactly the shape `expected`: nothing is broadcast."""
    if tuple(result.shape) != expected:
        raise RevtrainError(
            f"{type(layer).__name__}: f, a {type(function).__name__}, returned the shape {tuple(result.shape)}.\n"
            f"Expected {expected}; a result is not broadcast. Change what f returns, or `channels`."
        )
