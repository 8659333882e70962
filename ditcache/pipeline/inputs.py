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
    the noisy channels, for image-conditioned models; where `noisy` is given, [B, C, 1, H, W]: what
    stands in place of what is not noisy. image [1, 257, D]: CLIP tokens, for those that have an
    image encoder. noisy [1, 1, T, H, W]: 1 where latents are noisy, 0 where they are known, for
    models that take a timestep per token. held [B, C, O, H, W]: clean latents that the first O
    frames keep, which a video goes on from; at every step they are as noisy as the others.
    """

    latents: Tensor
    text: TextStates
    condition: Tensor | None = None
    image: Tensor | None = None
    noisy: Tensor | None = None
    held: Tensor | None = None

    def hold(self, latents: Tensor, sigma: float) -> Tensor:
        """The latents with what is held in its place, noised to `sigma` with its own noise."""
        if self.held is None:
            return latents
        count = self.held.shape[2]
        noised = (1 - sigma) * self.held + sigma * self.latents[:, :, :count]
        return torch.cat([noised, latents[:, :, count:]], dim=2)

    def at(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The transformer's input and timesteps at a step: [B], or [B, N] with one per token."""
        if self.noisy is None:
            condition = [] if self.condition is None else [self.condition]
            return torch.cat([latents, *condition], dim=1), timestep.expand(len(latents))
        per_token = (self.noisy[0][0][:, ::2, ::2] * timestep).flatten()
        return self.known(latents), per_token.unsqueeze(0).expand(len(latents), -1)

    def known(self, latents: Tensor) -> Tensor:
        """The latents with what is known in its place."""
        if self.noisy is None or self.condition is None:
            return latents
        return (1 - self.noisy) * self.condition + self.noisy * latents


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
    per_token = pipe.config.get("expand_timesteps", False)
    if not bundle.model.needs_image:
        latents = pipe.prepare_latents(1, pipe.transformer.config.in_channels, *size)
        noisy = torch.ones(latents.shape, device=bundle.device) if per_token else None
        return Inputs(latents, text, noisy=noisy)
    tokens = None
    if pipe.transformer.config.image_dim is not None:
        tokens = pipe.encode_image(picture, bundle.device).to(pipe.transformer.dtype)
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width).to(
        bundle.device, torch.float32
    )
    latents, condition, *noisy = pipe.prepare_latents(pixels, 1, pipe.vae.config.z_dim, *size)
    return Inputs(latents, text, condition, tokens, *noisy)
