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
    difficulty = (clutter + small + noise) / 3
    return Images.of(images, labels, difficulty)


def _draw(labels, clutter, small, noise, rng, size) -> np.ndarray:
    count = len(labels)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    across = axis[None, None, :]
    down = axis[None, :, None]

    def number(low, high):
        """One for each image, to go with its pixels."""
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def colours(low, high):
        return rng.uniform(low, high, (count, 3, 1, 1)).astype(np.float32)

    # Shape coordinates u, v: the grid moved, turned and scaled, one unit = radius of the shape.
    radius = (0.75 - 0.45 * small)[:, None, None]
    room = 0.95 - radius
    x = across - number(-1, 1) * room
    y = down - number(-1, 1) * room
    angle = number(-0.6, 0.6)
    cosine = np.cos(angle)
    sine = np.sin(angle)
    turned_x = x * cosine + y * sine
    turned_y = y * cosine - x * sine
    u = turned_x / radius
    v = turned_y / radius
    inside = np.empty((count, size, size), bool)
    for label, name in enumerate(SHAPES):
        of = labels == label
        inside[of] = _shape(name, u[of], v[of])

    background = colours(0.1, 0.9)
    colour = colours(0, 1)
    # A shape must differ from its background in brightness, or its difficulty would be unknown.
    dark = colour * 0.5
    colour = np.where(background > 0.5, dark, 0.5 + dark)
    image = np.broadcast_to(background, (count, 3, size, size)).copy()
    for stroke in range(6):
        turn = number(0, np.pi)
        offset = number(-0.9, 0.9)
        along = across * np.cos(turn) + down * np.sin(turn)
        is_drawn = (clutter * 6 > stroke)[:, None, None]
        is_near = np.abs(along - offset) < 0.05
        on = is_near & is_drawn
        image = np.where(on[:, None], colours(0, 1), image)
    image = np.where(inside[:, None], colour, image)
    spread = (0.25 * noise)[:, None, None, None]
    image += rng.standard_normal(image.shape, np.float32) * spread
    levels = image.clip(0, 1) * 255
    return levels.astype(np.uint8)


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie inside the shape: r is a circle's distance, box a square's."""
    r = np.hypot(u, v)
    wide = np.abs(u)
    high = np.abs(v)
    box = np.maximum(wide, high)
    if name == "disc":
        return r < 0.9
    if name == "square":
        return box < 0.75
    if name == "triangle":
        return (v < 0.6) & (v > 2 * wide - 0.9)
    if name == "plus":
        return (np.minimum(wide, high) < 0.28) & (box < 0.95)
    if name == "ring":
        return (r < 0.95) & (r > 0.55)
    if name == "star":
        return r < 0.62 + 0.35 * np.cos(5 * np.arctan2(u, -v))
    if name == "crescent":
        return (r < 0.95) & (np.hypot(u - 0.45, v) > 0.75)
    if name == "bar":
        return (wide < 0.95) & (high < 0.3)
    if name == "corner":
        return (box < 0.85) & ((u < -0.3) | (v > 0.3))
    return np.hypot(wide - 0.5, high - 0.5) < 0.38
