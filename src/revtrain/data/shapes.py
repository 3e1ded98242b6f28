"""The synthetic images: ten shapes over random textures, drawn in numpy by signed distance functions.

Coordinates: the image spans -1..1 along its smaller side; a shape, in its own frame (u, v), fits the unit disc.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from revtrain.config import ImageSize
from revtrain.data.dataset import Split

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


def draw(count: int, image_size: int | Sequence[int], rng: np.random.Generator, masks: bool = False) -> Split:
    """`count` images (count, 3, H, W) of a side or of [H, W], the classes balanced and in random order.

    Args:
        masks: labels are those of pixels, (count, H, W) uint8: 0 the background, i + 1 a shape of class i.
    """
    size = ImageSize.of(image_size)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images, inside = np.empty((count, 3, *size), np.uint8), np.empty((count, *size), bool)
    for start in range(0, count, CHUNK):
        own = slice(start, start + CHUNK)
        images[own], inside[own] = _draw_chunk(labels[own], size, rng)
    of_pixels = inside * (labels + 1).astype(np.uint8)[:, None, None]
    return Split(torch.from_numpy(images), torch.from_numpy(of_pixels if masks else labels))


def _draw_chunk(labels: np.ndarray, size: ImageSize, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 3, H, W), and which of their pixels are of the shape, (count, H, W)."""
    count, smaller = len(labels), min(size)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:
        """Lay a colour (count, 3, 1, 1) over the canvas where the distance is negative, edges smoothed."""
        cover = np.clip(0.5 - distance * (smaller / 2), 0, 1)[:, None]
        canvas[...] += cover * (colour - canvas)

    # the smaller side spans -1..1
    rows, columns = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / smaller) - side / smaller for side in size)
    y, x = rows[None, :, None], columns[None, None, :]

    # background: two colours mixed by two crossed waves
    ground, tint = uniform(0, 1, 3, 1, 1), uniform(-0.2, 0.2, 3, 1, 1)
    wave = np.zeros((count, *size), np.float32)
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
    distance = np.empty((count, *size), np.float32)
    for label, shape in enumerate(SHAPES):
        own = labels == label
        distance[own] = shape(u[own], v[own])
    away = uniform(0.4, 0.7, 3, 1, 1)
    contrast = np.where(ground < 0.5, ground + away, ground - away)
    share = uniform(*HINT, 1, 1, 1)
    paint(distance * scale, (1 - share) * contrast + share * PALETTE[labels][:, :, None, None])

    canvas += 0.04 * rng.standard_normal(canvas.shape, np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), distance < 0
