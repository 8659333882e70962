"""Pairs of models that cannot be bridged, and why. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditcache.errors import DitcacheError

if TYPE_CHECKING:
    from torch import nn

    from ditcache.bridge.fusion import Fusion
    from ditcache.models.base import Bundle

CHRONO_FRAMES = (2, 8)  # latent frames that ChronoEdit was trained on
JOINT = {
    "QwenImageTransformer2DModel": "Qwen-Image runs one joint stream of image and text tokens over "
    "images only, with packed latents of another VAE: tokens, layers, heads, positions and latents "
    "do not correspond to a video model's",
}


def is_chrono(transformer: nn.Module) -> bool:
    """ChronoEdit's class, or Wan's with its extra key: published checkpoints name either."""
    return "ChronoEdit" in type(transformer).__name__


def check_pair(target: nn.Module, source: nn.Module) -> None:
    """Raises DitcacheError for transformers whose tokens do not correspond."""
    for transformer in (target, source):
        reason = JOINT.get(type(transformer).__name__)
        if reason is not None:
            raise DitcacheError(f"bridge: {reason}; there is nothing to fuse")
    here, there = ({**dict(x.config)} for x in (target, source))  # type: ignore[arg-type]
    for key, what in (
        ("in_channels", "take other inputs"),
        ("out_channels", "denoise other latents"),
        ("patch_size", "cut latents into other tokens"),
    ):
        if _plain(here.get(key)) != _plain(there.get(key)):
            raise DitcacheError(
                f"bridge: source and target {what} ({key} {there.get(key)} and {here.get(key)}); "
                "both must see the same latents"
            )


def check_bundles(target: Bundle, source: Bundle) -> None:
    """`check_pair`, and that both mean the same by a latent and by a noise level."""
    for bundle in (target, source):
        if len(bundle.experts) > 1:
            raise DitcacheError(
                f"bridge: {bundle.model.path} has two experts; bridges have one target and sources "
                "of one transformer each"
            )
        if bundle.pipe.config.get("expand_timesteps", False):
            raise DitcacheError(
                f"bridge: {bundle.model.path} gives every token a timestep of its own, and its "
                "latents are of another VAE"
            )
    check_pair(target.pipe.transformer, source.pipe.transformer)
    ours, theirs = (
        {key: _plain(bundle.pipe.vae.config.get(key)) for key in VAE_KEYS}
        for bundle in (target, source)
    )
    different = [key for key in VAE_KEYS if ours[key] != theirs[key]]
    if different:
        raise DitcacheError(
            f"bridge: {source.model.path} and {target.model.path} have different VAEs "
            f"({different[0]}), so that the same latents mean other pictures"
        )


VAE_KEYS = (
    "z_dim",
    "scale_factor_spatial",
    "scale_factor_temporal",
    "latents_mean",
    "latents_std",
)


def check_frames(latent_frames: int, fusion: Fusion, *transformers: Any) -> None:
    """ChronoEdit has only ever seen 2 or 8 latent frames. transformers: every one that will run on
    so many; with `source_frames=ends` a source sees 2.
    """
    if fusion.allow_out_of_range or latent_frames in CHRONO_FRAMES:
        return
    if any(is_chrono(transformer) for transformer in transformers):
        raise DitcacheError(
            f"bridge: ChronoEdit was trained on {CHRONO_FRAMES[0]} or {CHRONO_FRAMES[1]} latent "
            f"frames and would see {latent_frames}; use 5 or 29 frames, or set "
            "fusion.allow_out_of_range=true"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
