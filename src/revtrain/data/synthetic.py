"""Embedded images: ten shapes, drawn by signed distance functions over random textures.

Each image has one shape of random place, size and rotation before a textured background with distractors (a
stroke and specks), under noise. The class survives a flip, a crop and a cutout. The shape's colour leans, more or
less, towards a colour of its class: a hint that speeds the first epochs up and that alone is not enough. So no
linear model of the pixels gets half of the images right, while a small CNN learns them in a few epochs.

Coordinates: the image spans -1..1 in both directions; a shape, in its own frame (u, v), fits the unit disc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from revtrain.config import DataConfig, key
from revtrain.data import Facts
from revtrain.errors import RevtrainError

if TYPE_CHECKING:
    from revtrain.data import Split

IMAGE_SIZE = 32
HINT = (0.0, 0.7)  # least and greatest share of the class's colour in the colour of a shape
PALETTE = np.array(
    [
        *([r, g, b] for r in (0.05, 0.95) for g in (0.05, 0.95) for b in (0.05, 0.95)),
        [0.95, 0.5, 0.05],
        [0.5, 0.05, 0.5],
    ],
    np.float32,
)  # (10, 3) in 0..1
CHUNK = 512  # images drawn at a time: temporaries of a few MB


# ---- signed distances of arrays u, v: below 0 within the shape ------------------------------------------


def _sector(u: np.ndarray, v: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Fold the plane into one of `folds` equal sectors, mirrored about its axis u."""
    radius, step = np.hypot(u, v), np.float32(2 * np.pi / folds)
    angle = np.abs((np.arctan2(v, u) + step / 2) % step - step / 2)
    return radius * np.cos(angle), radius * np.sin(angle)


def disc(u, v):
    return np.hypot(u, v) - 0.85


def ring(u, v):
    return np.abs(np.hypot(u, v) - 0.75) - 0.2


def square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.72


def triangle(u, v):
    return _sector(-u, v, 3)[0] - 0.5


def star(u, v):
    u, v = _sector(u, v, 5)  # the edge runs from the tip (1, 0) to a notch at radius 0.4
    notch_u, notch_v = 0.4 * np.cos(np.pi / 5), 0.4 * np.sin(np.pi / 5)
    return ((u - 1) * notch_v + v * (1 - notch_u)) / np.hypot(notch_v, 1 - notch_u)


def cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.92, np.minimum(u, v) - 0.26)


def moon(u, v):
    return np.maximum(np.hypot(u, v) - 0.92, 0.8 - np.hypot(u - 0.5, v))


def bars(u, v):
    return np.maximum(np.abs(np.abs(v) - 0.5) - 0.22, np.abs(u) - 0.85)


def dots(u, v):
    u, v = _sector(u, v, 3)
    return np.hypot(u - 0.62, v) - 0.34


def checker(u, v):
    """Two opposite quarters of a square."""
    within_quarters = -np.sign(u * v) * np.minimum(np.abs(u), np.abs(v))
    return np.maximum(np.maximum(np.abs(u), np.abs(v)) - 0.85, within_quarters)


SHAPES = (disc, ring, square, triangle, star, cross, moon, bars, dots, checker)


# ---- drawing ---------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """How many images are drawn, and which."""

    train_images: int = key(10_000, "how many training images are drawn", at_least=1)
    test_images: int = key(2_000, "how many test images are drawn", at_least=1)
    seed: int = key(0, "of the images", at_least=0, at_most=2**63 - 1)


def facts(cfg: DataConfig[Settings]) -> Facts:
    """All of them."""
    return Facts(len(SHAPES), cfg.image_size or IMAGE_SIZE, cfg.own.train_images)


def load(cfg: DataConfig[Settings]) -> tuple[Split, Split, list[str]]:
    """`train_images` and `test_images` images of `image_size` (default 32), from disjoint random streams.

    Raises:
        RevtrainError: too few images, a negative seed, or a size below 16 pixels.
    """

    from revtrain.data import check_room

    size = cfg.image_size or IMAGE_SIZE
    if size < 16:
        raise RevtrainError(f"data.image_size={size} is too small for the synthetic shapes.\nGive 16 or more.")
    if cfg.own.seed < 0:
        raise RevtrainError(f"data.seed={cfg.own.seed} is negative.\nGive 0 or more.")
    for name in ("train_images", "test_images"):
        if getattr(cfg.own, name) < len(SHAPES):
            raise RevtrainError(
                f"data.{name}={getattr(cfg.own, name)} leaves a class empty.\nGive {len(SHAPES)} or more."
            )
    check_room(cfg.own.train_images + cfg.own.test_images, size, "data.train_images and data.test_images")
    train_stream, test_stream = np.random.default_rng(cfg.own.seed).spawn(2)
    train, test = draw(cfg.own.train_images, size, train_stream), draw(cfg.own.test_images, size, test_stream)
    return train, test, [shape.__name__ for shape in SHAPES]


def draw(count: int, size: int, rng: np.random.Generator) -> Split:
    """`count` images (count, 3, size, size), the classes balanced and in random order."""
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, 3, size, size), np.uint8)
    for start in range(0, count, CHUNK):
        images[start : start + CHUNK] = _draw_chunk(labels[start : start + CHUNK], size, rng)
    import torch

    from revtrain.data import Split

    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _draw_chunk(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:
        """Lay a colour (count, 3, 1, 1) over the canvas where the distance is negative, edges smoothed."""
        cover = np.clip(0.5 - distance * (size / 2), 0, 1)[:, None]
        canvas[...] += cover * (colour - canvas)

    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    y, x = axis[None, :, None], axis[None, None, :]

    # background: two colours mixed by two crossed waves
    ground, tint = uniform(0, 1, 3, 1, 1), uniform(-0.2, 0.2, 3, 1, 1)
    wave = np.zeros((count, size, size), np.float32)
    for _ in range(2):
        angle, frequency, phase = uniform(0, np.pi, 1, 1), uniform(2, 12, 1, 1), uniform(0, 2 * np.pi, 1, 1)
        wave += np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    canvas = ground + 0.5 * tint * wave[:, None]

    # distractors: a thin stroke across the image, and specks smaller than any shape
    angle, shift = uniform(0, np.pi, 1, 1), uniform(-0.9, 0.9, 1, 1)
    paint(np.abs(np.cos(angle) * x + np.sin(angle) * y - shift) - 0.03, uniform(0, 1, 3, 1, 1))
    for _ in range(3):
        distance = np.hypot(x - uniform(-1, 1, 1, 1), y - uniform(-1, 1, 1, 1))
        paint(distance - uniform(0.06, 0.12, 1, 1), uniform(0, 1, 3, 1, 1))

    # the shape: turned by up to 45 degrees, scaled and placed; its colour keeps clear of the ground's
    scale, angle = uniform(0.6, 0.85, 1, 1), uniform(-np.pi / 4, np.pi / 4, 1, 1)
    left, top = x - uniform(-0.2, 0.2, 1, 1), y - uniform(-0.2, 0.2, 1, 1)
    u = (np.cos(angle) * left + np.sin(angle) * top) / scale
    v = (np.cos(angle) * top - np.sin(angle) * left) / scale
    distance = np.empty((count, size, size), np.float32)
    for label, shape in enumerate(SHAPES):
        own = labels == label
        distance[own] = shape(u[own], v[own])
    away = uniform(0.4, 0.7, 3, 1, 1)
    contrast = np.where(ground < 0.5, ground + away, ground - away)
    share = uniform(*HINT, 1, 1, 1)
    paint(distance * scale, (1 - share) * contrast + share * PALETTE[labels][:, :, None, None])

    canvas += 0.04 * rng.standard_normal(canvas.shape, np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
