"""The zoo's video autoencoder: an `AutoencoderKLWan` of the Wan2.2 layout, 4x8x8 compression to 16
channels.

Letters: B batch, C channels, T frames, H and W pixels; latents are [B, 16, 1 + (T-1)/4, H/8, W/8].
Videos are in -1..1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, patchify, unpatchify

CHANNELS = 16


def make_vae() -> AutoencoderKLWan:
    """Random weights, 0.70 M parameters."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


class TrainingNorm(WanRMS_norm):
    """The same norm without `F.normalize`, whose channel-dimension reduction is a quarter of a CPU
    training step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * self.scale
        return x * scale * self.gamma + self.bias


def use_training_norm(vae: AutoencoderKLWan) -> None:
    for module in vae.modules():
        if type(module) is WanRMS_norm:
            module.__class__ = TrainingNorm


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """video [B, 3, T, H, W] -> posterior mean and log-variance, the frames after the first in one
    chunk.
    """
    vae.clear_cache()
    patches, moments = patchify(video, vae.config.patch_size), []
    for chunk in (patches[:, :, :1], patches[:, :, 1:]):
        vae._enc_conv_idx = [0]
        moments.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    mean, log_variance = vae.quant_conv(torch.cat(moments, 2)).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """latents -> video, not clamped, the frames after the first in one chunk."""
    vae.clear_cache()
    hidden, parts = vae.post_quant_conv(latents), []
    for index, chunk in enumerate((hidden[:, :, :1], hidden[:, :, 1:])):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(
                chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


def reconstruction_loss(decoded: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + half the L1 of spatial differences: blur is what caps shape recognition."""
    error = decoded - video
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def draw_crops(clips: np.ndarray, rng: np.random.Generator, *, full: bool) -> torch.Tensor:
    """A training batch [B, 3, T, H, W] in -1..1 from uint8 clips [N, T, H, W, 3].

    Either three whole clips, or 32x32 crops of 5 or 9 frames, each the one of three candidates that
    moves most.
    """
    if full:
        batch = clips[rng.integers(len(clips), size=3)]
    else:
        frames, side, crops = int(rng.choice([5, 9])), 32, []
        for _ in range(24 if frames == 5 else 13):
            clip, best, most = clips[rng.integers(len(clips))], None, -1.0
            for _ in range(3):
                t, y, x = (
                    rng.integers(size - part + 1)
                    for size, part in zip(clip.shape[:3], (frames, side, side), strict=True)
                )
                crop = clip[t : t + frames, y : y + side, x : x + side]
                motion = np.abs(crop[0, ::2, ::2].astype(np.int16) - crop[-1, ::2, ::2]).mean()
                if motion > most:
                    best, most = crop, motion
            crops.append(best)
        batch = np.stack(crops)
    return to_video(batch)


def to_video(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: np.ndarray) -> float:
    """Mean over clips of the PSNR (dB, from each clip's MSE) of encode-decode by posterior mean."""
    values = []
    for clip in clips:
        video = to_video(clip[None]).to(vae.device)
        decoded = decode(vae, encode(vae, video)[0]).clamp(-1, 1)
        values.append(10 * torch.log10(4 / F.mse_loss(decoded, video)))
    return float(torch.stack(values).mean())
