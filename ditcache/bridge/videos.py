"""Whole videos of held-out procedural clips, read back: does the object become what the caption
says, move where it says, and how near is the video to the clip it was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ditcache.bridge.data.base import SPLITS
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.generate import texts_of
from ditcache.bridge.nets import Net
from ditcache.bridge.run import Bridge, Source
from ditcache.clips.edits import DOMAINS, REASONING_FRAMES, Clip, draw_clip
from ditcache.clips.judge import judge, read_direction
from ditcache.metrics.psnr import psnr
from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text
from ditcache.store.device import DeviceStore

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN = "composite"


@dataclass
class Seen:
    """One video. right: colour, shape and direction are as the caption says."""

    right: dict[str, bool]
    psnr: float


def judge_videos(
    bundles: Mapping[str, Bundle],
    target: str,
    source: str,
    net: Net,
    fusion: Fusion,
    *,
    count: int,
    seed: int,
    on_video: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Method -> shares of captions obeyed, mean PSNR (dB) to the true clips. The clips are those
    that the losses are judged on. seed: of the clips.
    """
    found: dict[str, list[Seen]] = {}
    for index in range(count):
        key = [seed, SPLITS.index("test"), DOMAINS.index(DOMAIN), index]
        clip = draw_clip(DOMAIN, np.random.default_rng(key))
        frames = {
            f"{target} alone": render(bundles[target], clip, index),
            f"{source} alone": render(bundles[source], clip, index),
            "bridge": render(bundles[target], clip, index, bundles[source], net, fusion),
        }
        for name, video in frames.items():
            found.setdefault(name, []).append(read(clip, video))
            on_video()
    return {
        name: {
            **{
                quality: float(np.mean([seen.right[quality] for seen in videos]))
                for quality in ("colour", "shape", "direction", "all")
            },
            "psnr": float(np.mean([seen.psnr for seen in videos])),
        }
        for name, videos in found.items()
    }


def render(
    bundle: Bundle,
    clip: Clip,
    seed: int,
    other: Bundle | None = None,
    net: Net | None = None,
    fusion: Fusion | None = None,
) -> np.ndarray:
    """Frames [29, H, W, 3] in 0..1 of one model, or of one that reads another."""
    model, picture = bundle.model, Image.fromarray(clip.frames[0])
    text = encode_text(
        bundle,
        clip.scene.caption,
        negative_prompt=model.negative_prompt,
        guidance=model.guidance,
    )
    height, width = clip.frames.shape[1:3]
    size = {"height": height, "width": width, "num_frames": REASONING_FRAMES}
    inputs = draw_inputs(bundle, text, **size, seed=seed, picture=picture)
    sampling: dict[str, Any] = {"steps": model.steps, "guidance": model.guidance}
    sampling["shift"] = model.shift
    if other is None:
        return decoded(bundle, denoise(bundle, inputs, **sampling))
    assert net is not None and fusion is not None
    told = encode_text(
        other,
        clip.scene.caption,
        negative_prompt=other.model.negative_prompt,
        guidance=model.guidance,
    )
    look = other.pipe.encode_image(picture, other.device)
    source = Source(other.pipe.transformer, net, texts_of(told), look)
    bridge = Bridge(bundle.pipe.transformer, {"source": source}, fusion, DeviceStore())
    with bridge.attached(texts_of(text)):
        return decoded(bundle, denoise(bundle, inputs, **sampling))


def decoded(bundle: Bundle, latents: Tensor) -> np.ndarray:
    return decode_latents(bundle, latents)[:REASONING_FRAMES]


def read(clip: Clip, frames: np.ndarray) -> Seen:
    """Colour and shape from the last frame; the direction from where the object is in the first and
    the last quarter, whatever its colour.
    """
    last = judge(np.repeat(frames[-1:], 3, 0))
    backdrop = np.median(frames.reshape(-1, 3), 0)
    inked = np.clip(np.linalg.norm(frames - backdrop, axis=-1) - 0.25, 0, 0.25)
    right = {
        "colour": last.colour == clip.scene.colour,
        "shape": last.shape == clip.scene.shape,
        "direction": read_direction(inked) == clip.scene.direction,
    }
    right["all"] = all(right.values())
    return Seen(right, psnr(clip.frames / 255, frames[: len(clip.frames)]))
