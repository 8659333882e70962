"""A long video, segment by segment: what one takes over from the one before, how they are joined.

Text-to-video models go on from latent frames: the last ones of a segment are held in place of the
first ones of the next, noised at every step like the others with the segment's own noise (a
timestep of 0 for models that take one per token). All latents are joined and decoded in one go, so
no frame is decoded twice. Image-to-video models go on from the last picture, rounded to 8 bits as a
file would hold it; that picture is in the video once.

Every segment starts from the same noise. Where things are and what colour they have is decided at
high noise, so it stays the same from segment to segment; with noise of their own it drifts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import decode_latents
from ditcache.pipeline.inputs import Inputs
from ditcache.video import to_uint8


def hold(inputs: Inputs, latents: Tensor, overlap: int) -> Inputs:
    """The same noise and text, with the last `overlap` of these latent frames [B, C, T, H, W] in
    place of the first.
    """
    known = latents[:, :, -overlap:]
    if inputs.noisy is None:
        return replace(inputs, held=known)
    noisy, condition = inputs.noisy.clone(), torch.zeros_like(inputs.latents)
    noisy[:, :, :overlap], condition[:, :, :overlap] = 0, known
    return replace(inputs, noisy=noisy, condition=condition)


def last_picture(frames: np.ndarray) -> Any:
    """float frames [T, H, W, 3] -> the last one, as PIL's picture."""
    return Image.fromarray(to_uint8(frames[-1]))


def join_latents(bundle: Bundle, segments: list[Tensor], overlap: int) -> Tensor:
    """Latents of all segments one after the other along the frames, none of them twice."""
    start = overlap if bundle.model.goes_on == "overlap" else 0
    return torch.cat([segments[0], *(latents[:, :, start:] for latents in segments[1:])], dim=2)


def join_frames(segments: list[np.ndarray]) -> np.ndarray:
    """Frames of segments that each start with the picture the one before ends with."""
    return np.concatenate([segments[0], *(frames[1:] for frames in segments[1:])])


def decode_segments(bundle: Bundle, latents: Tensor, segments: int) -> np.ndarray:
    """What `join_latents` gave -> float frames [T, H, W, 3] in 0..1."""
    if segments == 1 or bundle.model.goes_on == "overlap":
        return decode_latents(bundle, latents)
    return join_frames([decode_latents(bundle, part) for part in latents.chunk(segments, dim=2)])
