"""Reads colour, shape, background and direction back from frames. Plain image arithmetic, no
learned parts.

Calibrated first on true clips (`scripts/eval_zoo.py`), where it must be right, before it judges any
model.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ditcache.clips import world

QUALITIES = ("background", "colour", "direction", "shape")


@dataclass(frozen=True)
class Verdict:
    background: str
    colour: str
    direction: str  # "none" when the object moves less than 6 pixels or in no clear direction
    shape: str


def judge(frames: np.ndarray) -> Verdict:
    """frames float [T, H, W, 3] in 0..1."""
    backdrop, ink, alpha = separate(frames)
    return Verdict(
        background=nearest(backdrop, world.BACKGROUNDS),
        colour=nearest(ink + backdrop, world.OBJECT_COLOURS),
        direction=read_direction(alpha),
        shape=read_shape(alpha),
    )


def separate(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour of the background [3], the object's minus that [3], and its soft mask [T, H, W]."""
    ring = np.ones(frames.shape[1:3], bool)
    ring[3:-3, 3:-3] = False
    backdrop = np.median(frames[:, ring].reshape(-1, 3), axis=0)
    offset = frames - backdrop
    distance = np.linalg.norm(offset, axis=-1)
    strong = distance > 0.6 * np.quantile(distance, 0.97)
    ink = np.median(frames[strong], axis=0) - backdrop
    alpha = np.clip(offset @ ink / max(float(ink @ ink), 1e-6), 0, 1)
    return backdrop, ink, np.clip((alpha - 0.25) / 0.5, 0, 1)  # texture below, shading above


def nearest(rgb: np.ndarray, named: dict[str, tuple[float, float, float]]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(rgb - np.array(named[name]))))


def centroids(alpha: np.ndarray) -> np.ndarray:
    """soft masks [T, H, W] -> (x, y) [T, 2] in pixels."""
    ys, xs = np.mgrid[0 : alpha.shape[1], 0 : alpha.shape[2]] + 0.5
    weight = alpha.sum((1, 2)) + 1e-6
    return np.stack([(alpha * xs).sum((1, 2)) / weight, (alpha * ys).sum((1, 2)) / weight], 1)


def read_direction(alpha: np.ndarray) -> str:
    track = centroids(alpha)
    dx, dy = track[-3:].mean(0) - track[:3].mean(0)
    if max(abs(dx), abs(dy)) < 6 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return "none"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


@cache
def unit_shape(shape: str) -> tuple[float, float, float]:
    """Area / radius^2 and centroid / radius of a shape, measured once on a large drawing."""
    ys, xs = np.mgrid[-60:60, -60:60] + 0.5
    cover = world.coverage(shape, xs, ys, 40.0)
    return (
        cover.sum() / 1600,
        (cover * xs).sum() / cover.sum() / 40,
        (cover * ys).sum() / cover.sum() / 40,
    )


def read_shape(alpha: np.ndarray) -> str:
    """The shape whose drawing of equal area at the mask's centroid differs least, summed over every
    second frame.
    """
    ys, xs = np.mgrid[0 : alpha.shape[1], 0 : alpha.shape[2]] + 0.5
    track, error = centroids(alpha), dict.fromkeys(world.SHAPES, 0.0)
    for frame in range(0, len(alpha), 2):
        area = alpha[frame].sum()
        if area < 20:
            continue
        for shape in world.SHAPES:
            unit_area, cx, cy = unit_shape(shape)
            radius = np.sqrt(area / unit_area)
            x, y = xs - track[frame, 0] + cx * radius, ys - track[frame, 1] + cy * radius
            error[shape] += float(
                np.abs(world.coverage(shape, x, y, radius) - alpha[frame]).sum() / area
            )
    return min(error, key=lambda shape: error[shape])


def score(pairs: list[tuple["world.Scene", Verdict]]) -> dict[str, tuple[int, int]]:
    """(right, asked) per quality; a background the caption does not mention is not asked for."""
    result = {}
    for quality in QUALITIES:
        asked = [(s, v) for s, v in pairs if quality != "background" or "background" in s.caption]
        right = sum(getattr(s, quality) == getattr(v, quality) for s, v in asked)
        result[quality] = (right, len(asked))
    return result
