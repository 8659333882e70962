"""How a long rollout keeps to its caption, chunk by chunk. Reads frames with `judge`; motion by
matching the object's mask with itself a few frames later, because the object may be half out of the
picture.
"""

from dataclasses import dataclass

import numpy as np

from ditcache.clips import judge, world

LATER, REACH = 4, 14  # frames between two masks; pixels searched


@dataclass(frozen=True)
class ChunkVerdict:
    """speed: pixels per frame along `direction`, which is "none" if nothing moves."""

    background: str
    colour: str
    direction: str
    speed: float


def read_chunks(frames: np.ndarray, frames_per_chunk: int = 12) -> list[ChunkVerdict]:
    """frames float [T, H, W, 3] in 0..1; the first chunk is three frames shorter, as Wan's latents
    have it.
    """
    starts = [0, *range(frames_per_chunk - 3, len(frames), frames_per_chunk)]
    return [
        read_chunk(frames[start:end])
        for start, end in zip(starts, [*starts[1:], len(frames)], strict=True)
    ]


def read_chunk(frames: np.ndarray) -> ChunkVerdict:
    backdrop, ink, mask = judge.separate(frames)
    background = judge.nearest(backdrop, world.BACKGROUNDS)
    colour = judge.nearest(ink + backdrop, world.OBJECT_COLOURS)
    shifts = [shift_of(mask[i], mask[i + LATER]) for i in range(len(mask) - LATER)]
    dx, dy = np.median(np.array(shifts), axis=0) / LATER
    if max(abs(dx), abs(dy)) < 0.5:
        return ChunkVerdict(background, colour, "none", 0.0)
    sideways, upright = ("right" if dx > 0 else "left"), ("down" if dy > 0 else "up")
    direction = sideways if abs(dx) > abs(dy) else upright
    return ChunkVerdict(background, colour, direction, float(max(abs(dx), abs(dy))))


def shift_of(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(dx, dy) along one axis that makes the masks [H, W] agree best where both can be seen."""
    best, found = np.inf, (0.0, 0.0)
    for axis in (1, 0):
        for shift in range(-REACH, REACH + 1):
            size = before.shape[axis] - abs(shift)
            old = before.take(range(max(-shift, 0), max(-shift, 0) + size), axis)
            new = after.take(range(max(shift, 0), max(shift, 0) + size), axis)
            error = float(np.square(new - old).mean())
            if error < best:
                best, found = error, (float(shift), 0.0) if axis else (0.0, float(shift))
    return found


def share_right(
    scenes: list[world.Scene], verdicts: list[list[ChunkVerdict]], quality: str
) -> np.ndarray:
    """Share of videos [chunks] that show what their caption says; a background that it does not
    mention is not asked for.
    """
    asked = [
        [getattr(v, quality) == getattr(scene, quality) for v in chunks]
        for scene, chunks in zip(scenes, verdicts, strict=True)
        if quality != "background" or "background" in scene.caption
    ]
    return np.array(asked, float).mean(0)
