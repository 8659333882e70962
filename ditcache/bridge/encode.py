"""Clips -> latents and conditions, by both models' own pipelines."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from PIL import Image
from rich.progress import track
from torch import Tensor

from ditcache.bridge.data.base import SPLITS
from ditcache.bridge.samples import Caption, Samples, stacked, trimmed
from ditcache.clips.edits import DOMAINS, REASONING_FRAMES, Clip, draw_clip
from ditcache.errors import ConfigError, first_line
from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import latent_statistics
from ditcache.pipeline.text import MAX_TOKENS, encode_text

SMALL = 128 * 128  # pixels of a frame


@dataclass
class Encoded:
    """One clip. latents [1, C, T, H, W], condition [1, 20, T, H, W]; sides: text and image."""

    latents: Tensor
    condition: Tensor
    texts: dict[str, Tensor]
    images: dict[str, Tensor | None]


def zoo_samples(bundles: Mapping[str, Bundle], counts: Mapping[str, int], seed: int) -> Samples:
    """Clips of every domain; each clip has a seed of its own."""
    wanted = [
        (split, domain, index)
        for split in SPLITS
        for domain in DOMAINS
        for index in range(counts[split])
    ]
    encoded, domain, split = [], [], []
    for name, kind, index in track(wanted, "encoding clips", transient=True):
        key = [seed, SPLITS.index(name), DOMAINS.index(kind), index]
        clip = draw_clip(kind, np.random.default_rng(key))
        encoded.append(encode_clip(bundles, clip))
        domain.append(DOMAINS.index(kind))
        split.append(SPLITS.index(name))
    return collected(bundles, encoded, domain, split, list(DOMAINS))


def encode_clip(bundles: Mapping[str, Bundle], clip: Clip) -> Encoded:
    captions = dict.fromkeys(bundles, clip.scene.caption)
    ends = None if clip.pair is None else clip.pair
    return encode(bundles, captions, clip.frames, ends, REASONING_FRAMES)


def folder_samples(
    bundles: Mapping[str, Bundle],
    clips: Iterable[tuple[Path, str, str, str]],
    held_out: float,
    size: tuple[int, int, int],
) -> Samples:
    """Within each domain, the last clips are held out. Raises ConfigError for a short video."""
    clips = list(clips)
    domains = sorted({domain for _, domain, _, _ in clips})
    encoded, numbers, split = [], [], []
    for domain in domains:
        own = [clip for clip in clips if clip[1] == domain]
        kept = max(1, round(held_out * len(own) / 2))
        if len(own) < 2 * kept + 1:
            raise ConfigError(f"data.path: domain '{domain}' has {len(own)} clips, needs 3")
        for index, (file, _, text, chrono) in enumerate(track(own, domain, transient=True)):
            frames = read_video(file, *size)
            captions = {"wan": text, "chrono": chrono}
            encoded.append(encode(bundles, captions, frames, None, len(frames)))
            numbers.append(domains.index(domain))
            late = len(own) - index
            split.append(2 if late <= kept else 1 if late <= 2 * kept else 0)
    return collected(bundles, encoded, numbers, split, domains)


def read_video(file: Path, height: int, width: int, num_frames: int) -> np.ndarray:
    """uint8 [num_frames, H, W, 3], scaled. Raises ConfigError."""
    import imageio_ffmpeg

    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ConfigError(f"data.path: cannot read videos: {first_line(error)}") from None
    command = [exe, "-v", "error", "-i", str(file)]
    command += ["-frames:v", str(num_frames), "-s", f"{width}x{height}"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    told = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if told.returncode:
        reason = told.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no video"]
        raise ConfigError(f"data.path: cannot read {file}: {reason[0]}")
    found = np.frombuffer(told.stdout, np.uint8).reshape(-1, height, width, 3)
    if len(found) < num_frames:
        raise ConfigError(f"data.path: {file} has {len(found)} frames, needs {num_frames}")
    return found


@torch.no_grad()
def encode(
    bundles: Mapping[str, Bundle],
    captions: Mapping[str, str],
    frames: np.ndarray,
    pair: np.ndarray | None,
    num_frames: int,
) -> Encoded:
    """frames: uint8 [T, H, W, 3]; the first is the picture that both models are given. pair: see
    `Clip`; its second latent is appended. num_frames: of the latents in all.
    """
    first = next(iter(bundles.values()))
    picture = Image.fromarray(frames[0])
    with fast(first.device):
        latents = encode_frames(first, frames)
        if pair is not None:
            latents = torch.cat([latents, encode_frames(first, pair)[:, :, 1:]], 2)
        condition = condition_of(first, frames[0], num_frames)
    texts: dict[str, Tensor] = {}
    images: dict[str, Tensor | None] = {}
    for side, bundle in bundles.items():
        text = encode_text(bundle, captions[side], negative_prompt="", guidance=1.0).cond
        texts[side], _ = trimmed(text)
        images[side] = None
        if bundle.pipe.transformer.config.image_dim is not None:
            images[side] = bundle.pipe.encode_image(picture, bundle.device)
    return Encoded(latents, condition, texts, images)


@contextmanager
def fast(device: Any) -> Iterator[None]:
    """bf16 for the VAE on a CPU: five times faster, off by 1.5 % of the latents' spread."""
    on_cpu = torch.device(device).type == "cpu"
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=on_cpu):
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def condition_of(bundle: Bundle, picture: np.ndarray, num_frames: int) -> Tensor:
    """uint8 [H, W, 3] -> what Wan and ChronoEdit are given of it, [1, 20, T, H', W']: a mask over
    each latent frame's four frames, and the latents of the picture and grey after it.
    """
    grey = torch.zeros(1, 3, num_frames, *picture.shape[:2])
    grey[:, :, 0] = to_video(picture[None])[:, :, 0]
    latents = encode_video(bundle, grey)
    known = latents.new_zeros(1, 4, *latents.shape[2:])
    known[:, :, 0] = 1
    return torch.cat([known, latents], 1)


def encode_frames(bundle: Bundle, frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> normalised latents [1, C, T', H', W']."""
    return encode_video(bundle, to_video(frames))


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> [1, 3, T, H, W] in -1..1"""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1


def encode_video(bundle: Bundle, video: Tensor) -> Tensor:
    """[1, 3, T, H, W] -> latents of mean 0 and standard deviation 1."""
    vae = bundle.pipe.vae
    video = video.to(bundle.device, vae.dtype)
    small = video[0, 0, 0].numel() <= SMALL
    latents = encode_small(vae, video) if small else vae.encode(video).latent_dist.mode()
    mean, spread = latent_statistics(vae, latents)
    return (latents - mean) / spread


def encode_small(vae: Any, video: Tensor) -> Tensor:
    """As `vae.encode`, with all frames after the first in one chunk, where memory allows."""
    vae.clear_cache()
    if vae.config.patch_size is not None:
        video = patchify(video, vae.config.patch_size)
    moments = []
    for chunk in (video[:, :, :1], video[:, :, 1:]):
        vae._enc_conv_idx = [0]
        moments.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    return vae.quant_conv(torch.cat(moments, 2)).chunk(2, 1)[0]


@torch.no_grad()
def collected(
    bundles: Mapping[str, Bundle],
    encoded: list[Encoded],
    domain: list[int],
    split: list[int],
    domains: list[str],
) -> Samples:
    sides, empty = {}, {}
    for side, bundle in bundles.items():
        texts = [one.texts[side].half().cpu() for one in encoded]
        images = [one.images[side] for one in encoded]
        known = [image.half().cpu() for image in images if image is not None]
        lengths = torch.tensor([len(text) for text in texts])
        sides[side] = Caption(
            stacked(texts), lengths, torch.cat(known) if known else None, MAX_TOKENS
        )
        text = encode_text(bundle, "", negative_prompt="", guidance=1.0).cond
        rows, length = trimmed(text.half().cpu())
        empty[side] = Caption(rows[None], torch.tensor([length]), None, MAX_TOKENS)
    return Samples(
        torch.cat([one.latents.half().cpu() for one in encoded]),
        torch.cat([one.condition.half().cpu() for one in encoded]),
        torch.tensor(domain),
        torch.tensor(split),
        domains,
        sides,
        empty,
    )
