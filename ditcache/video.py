"""Frames -> mp4 and PNG, to look at; numbers never come from them. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ditcache.files import complete_file


def to_uint8(frames: np.ndarray, upscale: int = 1) -> np.ndarray:
    """float [..., H, W, 3] in 0..1 -> uint8, rounded, enlarged by repeating pixels; uint8 stays."""
    if frames.dtype != np.uint8:
        frames = (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)
    return frames.repeat(upscale, axis=-3).repeat(upscale, axis=-2) if upscale > 1 else frames


def write_mp4(path: Path, frames: np.ndarray, *, fps: int = 16, upscale: int = 1) -> None:
    """H.264 near visual losslessness.

    frames: [T, H, W, 3], float in 0..1 or uint8. Odd sides lose their last row or column (a rule of
    4:2:0 colour).
    """
    with mp4_writer(path, fps=fps, upscale=upscale) as add:
        add(frames)


@contextmanager
def mp4_writer(
    path: Path, *, fps: int = 16, upscale: int = 1
) -> Iterator[Callable[[np.ndarray], None]]:
    """Likewise, with a function to add frames as they come; `path` is there once all are."""
    import imageio.v2 as imageio

    settings: dict[str, Any] = {
        "codec": "libx264",
        "quality": None,
        "macro_block_size": 2,
        "output_params": ["-crf", "15", "-movflags", "+faststart"],
    }
    writer: Any
    with complete_file(path) as partial, imageio.get_writer(partial, fps=fps, **settings) as writer:

        def add(frames: np.ndarray) -> None:
            pixels = to_uint8(frames, upscale)
            for frame in pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]:
                writer.append_data(frame)

        yield add


def write_png(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 3] -> PNG."""
    from PIL import Image

    with complete_file(path) as partial:
        Image.fromarray(image).save(partial)
