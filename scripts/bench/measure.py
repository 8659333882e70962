"""One video per arm, and the figures of a video against its reference."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bench.arms import Arm
from bench.counter import BlockCounter, shares_of_parts
from torch import Tensor

from ditcache.cache.schedule import span_of
from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim
from ditcache.pipeline.denoise import denoise, make_scheduler
from ditcache.pipeline.inputs import Inputs, draw_inputs
from ditcache.pipeline.text import encode_text

GUIDANCE, BRANCHES = 4.0, 2
IDENTICAL = 100.0
TOGETHER = 4


@dataclass
class Video:
    """seconds: of denoising. blocks: run. steps: whole computed ones, per branch. kept: most bytes
    of state seen between two steps (None: not looked at or not known).
    """

    latents: Tensor
    seconds: float
    blocks: float
    steps: float
    kept: int | None = None


class Bench:
    """The embedded model with a counter on its blocks, and the uncached run to compare with."""

    def __init__(self, bundle: Any, num_steps: int = 24):
        self.bundle, self.num_steps = bundle, num_steps
        self.transformer = bundle.pipe.transformer
        one = self.inputs("a", 0)
        run = partial(denoise, bundle, one, steps=1, guidance=GUIDANCE)
        shares = shares_of_parts(self.transformer, run)
        self.counter = BlockCounter(list(bundle.experts.values()), shares)
        self.spans = spans_of(bundle, num_steps)

    def inputs(self, prompt: str, seed: int) -> Inputs:
        text = encode_text(self.bundle, prompt, negative_prompt="", guidance=GUIDANCE)
        return draw_inputs(self.bundle, text, height=64, width=64, num_frames=17, seed=seed)

    @property
    def all_blocks(self) -> int:
        """Blocks of one uncached video."""
        return self.counter.num_blocks * BRANCHES * self.num_steps

    def run(self, arm: Arm, inputs: Inputs, *, watch: bool = False) -> Video:
        """Denoise with the arm attached. watch: also look at the state after every step, which
        takes time.
        """
        control = arm.settings if arm.who == "control" else {}
        steps = control.get("steps", self.num_steps)
        if "moved" in control:
            noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
            inputs = Inputs(inputs.latents + control["moved"] * noise, inputs.text)
        most: list[int | None] = []
        with arm.attached(self.bundle, self.spans) as kept:
            callbacks = [lambda step: most.append(kept())] if watch else []
            self.counter.reset()
            started = time.perf_counter()
            latents = denoise(
                self.bundle, inputs, steps=steps, guidance=GUIDANCE, callbacks=callbacks
            )
            seconds = time.perf_counter() - started
            known = [value for value in most if value is not None]
            full = self.counter.full / BRANCHES
            return Video(latents, seconds, self.counter.blocks, full, max(known, default=None))

    @torch.no_grad()
    def frames(self, videos: list[Video]) -> list[np.ndarray]:
        """Float frames [T, H, W, 3] in 0..1 of every video; decoded a few at a time, which on two
        cores is twice as fast as one by one.
        """
        vae, processor = self.bundle.pipe.vae, self.bundle.pipe.video_processor
        mean, spread = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        found: list[np.ndarray] = []
        for start in range(0, len(videos), TOGETHER):
            latents = torch.cat([video.latents for video in videos[start : start + TOGETHER]])
            decoded = vae.decode(latents * spread + mean, return_dict=False)[0]
            found += list(processor.postprocess_video(decoded, output_type="np"))
        return found

    def close(self) -> None:
        self.counter.remove()


def spans_of(bundle: Any, num_steps: int) -> list[range]:
    """The steps of each expert."""
    scheduler = make_scheduler(bundle.pipe.scheduler, None)
    scheduler.set_timesteps(num_steps)
    spans = [span_of(bundle, expert, scheduler.timesteps) for expert in bundle.experts]
    return [range(*span) for span in spans]


def compared(reference: np.ndarray, frames: np.ndarray) -> dict[str, float]:
    return {
        "psnr": finite(psnr(reference, frames)),
        "worst_frame": finite(min(psnr_per_frame(reference, frames))),
        "ssim": ssim(reference, frames),
    }


def finite(decibel: float) -> float:
    """For means: identical counts as `IDENTICAL` dB, not a number as none."""
    return 0.0 if math.isnan(decibel) else min(decibel, IDENTICAL)
