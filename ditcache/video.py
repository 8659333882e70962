"""Frames -> mp4 and PNG, to look at. Numbers never come from these files. Knows nothing of
models.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def to_uint8(frames: np.ndarray, upscale: int = 1) -> np.ndarray:
    """float [..., H, W, 3] in 0..1 -> uint8, rounded, enlarged by repeating pixels."""
    pixels = (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels.repeat(upscale, axis=-3).repeat(upscale, axis=-2) if upscale > 1 else pixels


def write_mp4(path: Path, frames: np.ndarray, *, fps: int = 16, upscale: int = 1) -> None:
    """H.264 at near-visual losslessness; the file appears under its name only when complete.

    frames: float [T, H, W, 3] in 0..1. Odd sides lose their last row or column (a rule of 4:2:0
    colour).
    """
    import imageio.v2 as imageio

    writer: Any

    pixels = to_uint8(frames, upscale)
    pixels = pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]
    partial = path.with_name(f".{path.stem}.partial.mp4")
    try:
        with imageio.get_writer(
            partial,
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,
            output_params=["-crf", "15", "-movflags", "+faststart"],
        ) as writer:
            for frame in pixels:
                writer.append_data(frame)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_png(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 3] -> PNG, complete or not at all."""
    from PIL import Image

    partial = path.with_name(f".{path.stem}.partial.png")
    Image.fromarray(image).save(partial)
    os.replace(partial, path)
