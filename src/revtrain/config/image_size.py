"""Height and width of images, which a configuration writes as one number where they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ImageSize(NamedTuple):
    """In pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, size: int | Sequence[int]) -> ImageSize:
        """Of the side of a square, or of [height, width]."""
        return cls(size, size) if isinstance(size, int) else cls(*map(int, size))

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def plain(self) -> int | list[int]:
        """As the configuration has it."""
        return self.height if self.height == self.width else [self.height, self.width]

    def nearest(self, divisor: int) -> ImageSize:
        """The sides that are next to these, of those that `divisor` divides."""
        return ImageSize(*(max(divisor, round(side / divisor) * divisor) for side in self))

    def covering(self, divisor: int) -> ImageSize:
        """The next larger sides, or these, that `divisor` divides."""
        return ImageSize(*(-(-side // divisor) * divisor for side in self))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
