"""Wan's VAE, latent frame by latent frame: the same pixels as decoding everything at once, in the
memory of one frame.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import latent_statistics


class StreamDecoder:
    """Decodes one video as its latents come. Keeps the decoder's own memory of past frames to
    itself, so that other use of the VAE in between does no harm.
    """

    def __init__(self, bundle: Bundle):
        self.vae, self.device = bundle.pipe.vae, bundle.device
        self.processor = bundle.pipe.video_processor
        self.vae.clear_cache()
        self.features: list[Any] = [None] * len(self.vae._feat_map)
        self.started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The next latents [1, C, F, H, W] -> float frames [T, H, W, 3] in 0..1: four for each
        latent frame, one for the video's first.
        """
        hook: Any = getattr(
            self.vae, "_hf_hook", None
        )  # of offloading, which sits on `decode` alone
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self.vae)
        latents = latents.to(self.device, self.vae.dtype)
        mean, spread = latent_statistics(self.vae, latents)
        latents = self.vae.post_quant_conv(latents / (1.0 / spread) + mean)
        frames = [self.one(latents[:, :, i : i + 1]) for i in range(latents.shape[2])]
        video = torch.cat(frames, dim=2)
        return self.processor.postprocess_video(video, output_type="np")[0]

    def one(self, latent: Tensor) -> Tensor:
        first = {} if self.started else {"first_chunk": True}
        self.started = True
        out = self.vae.decoder(latent, feat_cache=self.features, feat_idx=[0], **first)
        if self.vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=self.vae.config.patch_size)
        return out.clamp(-1.0, 1.0)


@torch.no_grad()
def encode_picture(bundle: Bundle, picture: Any, height: int, width: int) -> Tensor:
    """A picture -> the latents [1, C, 1, h, w] of a video's first frame."""
    vae = bundle.pipe.vae
    pixels = bundle.pipe.video_processor.preprocess(picture, height=height, width=width)
    pixels = pixels.to(bundle.device, vae.dtype)[:, :, None]
    latents = vae.encode(pixels).latent_dist.mode()
    mean, spread = latent_statistics(vae, latents)
    return ((latents - mean) / spread).float()
