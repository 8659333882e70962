"""All metrics of one pair of videos. Imports torch only if LPIPS is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ditcache.metrics.latent import latent
from ditcache.metrics.psnr import decibel, squared_errors
from ditcache.metrics.ssim import ssim_per_frame
from ditcache.metrics.temporal import flicker, temporal
from ditcache.metrics.vmaf import find_ffmpeg, vmaf

# Which direction is closer to the reference. That is not the same as looking better.
GOOD = {
    "psnr": "higher",
    "worst_frame": "higher",
    "ssim": "higher",
    "ssim_worst_frame": "higher",
    "temporal": "lower",
    "flicker": "lower",
    "latent": "lower",
    "lpips": "lower",
    "vmaf": "higher",
}


@dataclass
class MetricSettings:
    """The metrics that need something beyond numpy; the others are always there.

    lpips: file or folder with AlexNet's weights and the linear heads, or null.
    vmaf: needs an ffmpeg with libvmaf.
    Both are tried when this is made, before anything is rendered.
    """

    lpips: str | None = None
    vmaf: bool = False

    def __post_init__(self) -> None:
        if self.lpips is not None:
            from ditcache.metrics.lpips import load_weights

            load_weights(self.lpips)
        if self.vmaf:
            find_ffmpeg()


def measure(
    reference_frames: np.ndarray,
    candidate_frames: np.ndarray,
    reference_latents: Any,
    candidate_latents: Any,
    settings: MetricSettings,
) -> dict[str, Any]:
    """Values as they are: PSNR of equal videos is infinite, which JSON cannot say.

    frames: [T, H, W, 3] in 0..1; latents: arrays or torch tensors of any one shape. `lpips` and
    `vmaf` are None where not asked for, `temporal` below two frames, `flicker` below three. NaN in
    a frame gives NaN. Raises ValueError if shapes differ.
    """
    videos = (reference_frames, candidate_frames)
    errors, similarities = squared_errors(*videos), ssim_per_frame(*videos)
    per_frame = [decibel(error) for error in errors]
    return {
        "psnr": decibel(errors.mean()),
        "psnr_per_frame": per_frame,
        "worst_frame": float(np.min(per_frame)),
        "ssim": float(np.mean(similarities)),
        "ssim_worst_frame": float(np.min(similarities)),
        "temporal": temporal(*videos) if len(per_frame) > 1 else None,
        "flicker": flicker(*videos) if len(per_frame) > 2 else None,
        "latent": latent(reference_latents, candidate_latents),
        "identical": bool(np.array_equal(*videos)),
        "lpips": perceptual(*videos, settings.lpips),
        "vmaf": vmaf(*videos) if settings.vmaf else None,
    }


def perceptual(reference: np.ndarray, candidate: np.ndarray, weights: str | None) -> float | None:
    if weights is None:
        return None
    from ditcache.metrics.lpips import lpips

    return lpips(reference, candidate, weights)
