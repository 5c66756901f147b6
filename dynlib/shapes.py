"""The generated set: shapes on noisy ground, for machines without data or network."""

import numpy as np

from dynlib.images import Images

SHAPES = ["disc", "square", "triangle", "plus", "ring", "star", "crescent", "bar", "corner", "dots"]


def generate(count: int, rng: np.random.Generator, size: int = 32) -> Images:
    """Draw `count` images of ten shapes whose difficulty is known.

    Difficulty, 0 (easy) to 1 (hard), is the mean of three independent uniform draws: clutter (how
    many strokes cross the image), scale (how small the shape is) and noise (standard deviation of
    the pixels). It lets a policy that spends less on easy inputs be checked against the truth.
    """
    labels = rng.integers(len(SHAPES), size=count)
    clutter, small, noise = rng.random((3, count)).astype(np.float32)
    images = np.empty((count, 3, size, size), np.uint8)
    for start in range(0, count, 1000):
        part = slice(start, start + 1000)
        images[part] = _draw(labels[part], clutter[part], small[part], noise[part], rng, size)
    return Images.of(images, labels, (clutter + small + noise) / 3)


def _draw(labels, clutter, small, noise, rng, size) -> np.ndarray:
    count = len(labels)
    axis = np.linspace(-1, 1, size, dtype=np.float32)

    def column(low, high, *shape):
        return rng.uniform(low, high, (count, *(shape or (1, 1)))).astype(np.float32)

    # Shape coordinates u, v: the grid moved, turned and scaled, one unit = radius of the shape.
    radius = (0.75 - 0.45 * small)[:, None, None]
    x = axis[None, None, :] - column(-1, 1) * (0.95 - radius)
    y = axis[None, :, None] - column(-1, 1) * (0.95 - radius)
    angle = column(-0.6, 0.6)
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    inside = np.empty((count, size, size), bool)
    for label in range(len(SHAPES)):
        of = labels == label
        inside[of] = _shape(SHAPES[label], u[of], v[of])

    background, colour = column(0.1, 0.9, 3, 1, 1), column(0, 1, 3, 1, 1)
    # A shape must differ from its background in brightness, or its difficulty would be unknown.
    colour = np.where(background > 0.5, colour * 0.5, 0.5 + colour * 0.5)
    image = np.broadcast_to(background, (count, 3, size, size)).copy()
    for stroke in range(6):
        turn, offset = column(0, np.pi), column(-0.9, 0.9)
        along = axis[None, None, :] * np.cos(turn) + axis[None, :, None] * np.sin(turn)
        on = (np.abs(along - offset) < 0.05) & (clutter * 6 > stroke)[:, None, None]
        image = np.where(on[:, None], column(0, 1, 3, 1, 1), image)
    image = np.where(inside[:, None], colour, image)
    image += rng.standard_normal(image.shape, np.float32) * (0.25 * noise)[:, None, None, None]
    return (image.clip(0, 1) * 255).astype(np.uint8)


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    r, box = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    if name == "disc":
        return r < 0.9
    if name == "square":
        return box < 0.75
    if name == "triangle":
        return (v < 0.6) & (v > 2 * np.abs(u) - 0.9)
    if name == "plus":
        return (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (box < 0.95)
    if name == "ring":
        return (r < 0.95) & (r > 0.55)
    if name == "star":
        return r < 0.62 + 0.35 * np.cos(5 * np.arctan2(u, -v))
    if name == "crescent":
        return (r < 0.95) & (np.hypot(u - 0.45, v) > 0.75)
    if name == "bar":
        return (np.abs(u) < 0.95) & (np.abs(v) < 0.3)
    if name == "corner":
        return (box < 0.85) & ((u < -0.3) | (v > 0.3))
    return (np.hypot(np.abs(u) - 0.5, np.abs(v) - 0.5)) < 0.38
