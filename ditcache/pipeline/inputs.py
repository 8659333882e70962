"""Noise and conditioning for one video. Letters: B batch, C channels, T latent frames, H W latent
height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditcache.models.base import Bundle
from ditcache.pipeline.text import TextStates


@dataclass
class Inputs:
    """What the loop starts from.

    latents [B, C, T, H, W] fp32 noise. condition [B, 20, T, H, W]: mask and picture latents beside
    the noisy channels, for image-conditioned models. image [1, 257, D]: CLIP tokens, for those that
    have an image encoder.
    """

    latents: Tensor
    text: TextStates
    condition: Tensor | None = None
    image: Tensor | None = None


@torch.no_grad()
def draw_inputs(
    bundle: Bundle,
    text: TextStates,
    *,
    height: int,
    width: int,
    num_frames: int,
    seed: int,
    picture: Any = None,
) -> Inputs:
    """Seeded noise (its own generator on the CPU, so the same on every device) and, given a
    picture, its conditioning.
    """
    pipe, generator = bundle.pipe, torch.Generator("cpu").manual_seed(seed)
    size = (height, width, num_frames, torch.float32, bundle.device, generator)
    if not bundle.model.needs_image:
        return Inputs(pipe.prepare_latents(1, pipe.transformer.config.in_channels, *size), text)
    tokens = None
    if pipe.transformer.config.image_dim is not None:
        tokens = pipe.encode_image(picture, bundle.device).to(pipe.transformer.dtype)
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width).to(
        bundle.device, torch.float32
    )
    latents, condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.z_dim, *size)
    return Inputs(latents, text, condition, tokens)
