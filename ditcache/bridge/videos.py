"""Held-out clips rendered whole by every method: how near is a video to the clip it was noised
from, and, of procedural clips, does the object become what the caption says and move where it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ditcache.bridge.data.base import SPLITS, Data
from ditcache.bridge.data.zoo import ZooData
from ditcache.bridge.evaluate import SOURCE, TARGET
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.pair import Pair
from ditcache.bridge.sampling import Sampling, sampled
from ditcache.bridge.students import Student
from ditcache.clips.captions import shown
from ditcache.clips.edits import DOMAINS, Clip, draw_clip
from ditcache.metrics.psnr import psnr
from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import decode_latents
from ditcache.report.pictures import sample

if TYPE_CHECKING:
    from torch import Tensor

COMPOSITE = "composite"
QUALITIES = ("colour", "shape", "direction")
FEW = 4  # clips to look at
SHOWN = (TARGET, SOURCE, "0|bridge", "0|router", "0|lora")
Strips = tuple[str, list[tuple[str, np.ndarray]]]


@dataclass
class Score:
    """One video. latent: root mean square distance to the clip's latents; psnr: dB, of the decoded
    video to the decoded clip. right: which QUALITIES are as the caption says, where that can be
    read.
    """

    latent: float
    psnr: float
    right: dict[str, bool] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        shares = {name: float(value) for name, value in self.right.items()}
        if shares:
            shares["all"] = float(all(self.right.values()))
        return {**shares, "psnr": self.psnr, "latent": self.latent}


def judge_videos(
    pair: Pair,
    bundle: Bundle,
    students: Mapping[str, Student],
    data: Data,
    fusion: Fusion,
    sampling: Sampling,
    *,
    count: int,
    autocast: Any,
    on_part: Callable[[], None],
) -> tuple[dict[str, list[Score]], list[Strips]]:
    """Student -> one entry per clip, of composite clips where there are two or more; empty where
    there are fewer than two clips in all. The clips are those that the losses are judged on; all
    students start from the same noise. bundle: the target's. And some frames to look at, of the
    first few clips: their caption, and by student those of SHOWN.
    """
    rows = pair.samples.rows("test")
    if COMPOSITE in pair.samples.domains:
        both = pair.samples.rows("test", COMPOSITE)
        rows = both if len(both) > 1 else rows
    rows = rows[:count]
    if len(rows) < 2:  # a shuffled source would be the clip's own
        return {}, []
    latents = sampled(pair, students, rows, fusion, sampling, autocast, on_part)
    truth = [pair.samples.latents[row][None].float() for row in rows.tolist()]
    clips = [decode_latents(bundle, one) for one in truth]
    scenes: list[Clip | None] = [None] * len(rows)
    if isinstance(data, ZooData):
        scenes = [zoo_clip(data, index) for index in range(len(rows))]
    found: dict[str, list[Score]] = {}
    sheet: list[Strips] = [
        (f"clip {n}" if scene is None else scene.scene.caption, [("the clip", sample(clip))])
        for n, (scene, clip) in enumerate(zip(scenes[:FEW], clips[:FEW], strict=True))
    ]
    for name, made in latents.items():
        videos = [decode_latents(bundle, one[None]) for one in made]
        found[name] = [
            Score(rms(one, true[0]), psnr(clip, video), {} if scene is None else read(scene, video))
            for one, true, clip, video, scene in zip(
                made, truth, clips, videos, scenes, strict=True
            )
        ]
        if name in SHOWN:
            for (_, strips), video in zip(sheet, videos[:FEW], strict=True):
                strips.append((name, sample(video)))
    return found, sheet


def zoo_clip(data: ZooData, index: int) -> Clip:
    """The composite test clip of this number, as it was drawn to be encoded."""
    key = [data.seed, SPLITS.index("test"), DOMAINS.index(COMPOSITE), index]
    return draw_clip(COMPOSITE, np.random.default_rng(key))


def rms(made: Tensor, true: Tensor) -> float:
    return float((made - true.to(made)).square().mean().sqrt())


def read(clip: Clip, frames: np.ndarray) -> dict[str, bool]:
    """Which QUALITIES are as in the clip's scene."""
    found = shown(frames)
    return {name: found[name] == getattr(clip.scene, name) for name in QUALITIES}
