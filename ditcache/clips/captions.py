"""What a caption of the procedural world asks for, and whether a video shows it."""

from __future__ import annotations

import re

import numpy as np

from ditcache.clips import world
from ditcache.clips.judge import judge, read_direction

BACKGROUND = re.compile(r"\b(on|over) (a|an) (\w+ ){0,2}background\b")


def asked(caption: str) -> dict[str, str]:
    """Colour, shape and direction that the object is to have in the end; what the caption does not
    say is left out.
    """
    words = re.findall(r"[a-z]+", BACKGROUND.sub("", caption.lower()))
    found = {}
    for name, known in (
        ("colour", world.OBJECT_COLOURS),
        ("shape", world.SHAPES),
        ("direction", world.DIRECTIONS),
    ):
        said = [word for word in words if word in known]
        if said:
            found[name] = said[-1]  # "the star becomes a circle": a circle in the end
    return found


def shown(frames: np.ndarray) -> dict[str, str]:
    """Colour and shape in the last frame; the direction from where the object is in the first and
    the last frames, whatever its colour. frames [T, H, W, 3] in 0..1.
    """
    last = judge(np.repeat(frames[-1:], 3, 0))
    backdrop = np.median(frames.reshape(-1, 3), 0)
    inked = np.clip(np.linalg.norm(frames - backdrop, axis=-1) - 0.25, 0, 0.25)
    return {"colour": last.colour, "shape": last.shape, "direction": read_direction(inked)}


def obeyed(caption: str, frames: np.ndarray) -> bool | None:
    """Whether all that the caption asks for is shown; None where it asks for nothing of this."""
    wanted = asked(caption)
    if not wanted:
        return None
    found = shown(frames)
    return all(found[name] == word for name, word in wanted.items())
