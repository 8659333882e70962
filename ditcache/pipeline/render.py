"""One prompt -> one video, timed part by part, with or without a step cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ditcache.bridge.generate import Bridging, record_of, texts_of
from ditcache.bridge.run import Bridge
from ditcache.cache.attach import attach_settings, blocks_of, disable_cache
from ditcache.cache.settings import CacheSettings
from ditcache.cache.trace import Trace
from ditcache.errors import ConfigError, first_line
from ditcache.models.base import Bundle
from ditcache.pipeline.callbacks import Step
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import Inputs, draw_inputs
from ditcache.pipeline.segments import hold, join_frames, join_latents, last_picture
from ditcache.pipeline.text import encode_text

if TYPE_CHECKING:
    from ditcache.ab.settings import AbTestSettings
    from ditcache.commands.generate import GenerateSettings
    from ditcache.pipeline.settings import SamplingSettings


@dataclass
class Video:
    """A finished video and its record.

    frames: float [T, H, W, 3] in 0..1. latents [1, C, T', H', W'], of several segments as
    `join_latents` joins them. seconds: text, denoise, decode; segment_seconds: denoise, of each
    segment. trace: the cache's decisions; without a cache, one computed unit per forward. bridge:
    what its sources cost, where there are some.
    """

    index: int
    prompt: str
    cache: str
    frames: np.ndarray
    latents: Tensor
    seconds: dict[str, float]
    trace: Trace
    state_bytes_peak: int
    store: dict[str, Any] = field(default_factory=dict)
    segment_seconds: list[float] = field(default_factory=list)
    bridge: dict[str, Any] = field(default_factory=dict)


OnStep = Callable[[str, int, Step, Trace | None], None]


class Renderer:
    """Renders prompts on one bundle with one set of sampling settings."""

    def __init__(
        self, bundle: Bundle, settings: GenerateSettings | AbTestSettings, on_step: OnStep
    ):
        self.bundle, self.settings, self.on_step = bundle, settings, on_step
        self.pictures = {path: open_picture(path) for path in set(settings.pictures)}
        self.bridging: Bridging | None = None

    def render(
        self,
        index: int,
        prompt: str,
        cache: CacheSettings,
        picture: Path | None,
        *,
        seed: int,
        steps: int | None = None,
        moved: float = 0.0,
        arm: str | None = None,
        other: tuple[str, Path | None] | None = None,
    ) -> Video:
        """One video of `settings.segments`. The cache is attached for this video only, so nothing
        can leak into the next. moved: that much of other noise is added to the initial noise.
        arm: which of `bridging`'s is at work (None: none). other: prompt and picture of another
        video, for a source that is given the wrong one.
        """
        s, clock = self.settings, Clock(self.bundle.device)
        inputs = prepare(self.bundle, s, prompt, self.pictures[picture], seed=seed)
        if moved:
            inputs.latents = inputs.latents + moved * other_noise(inputs.latents, seed)
        given = (inputs, prompt, self.pictures[picture])
        work, start = None, 0
        if arm is not None:
            assert self.bridging is not None
            wrong = None if other is None else (other[0], self.pictures[other[1]])
            work = self.bridging.arm(
                arm, *given, guidance=s.guidance, store=s.store, size=size(s), other=wrong
            )
        clock.lap("text")
        s.store.reset_counters()
        attached = attach_settings(self.bundle, cache, s.store)
        watched = Trace() if cache.policy is None else None

        def watch(step: Step) -> None:
            if watched is not None:
                guided = s.guidance > 1
                watched.note_forwards(
                    step.index,
                    step.expert,
                    guided=guided,
                    blocks=self.num_blocks,
                    segment=len(segments),
                )
            self.on_step(cache.name, index, step, watched or attached.trace)

        sampling: dict[str, Any] = {
            "steps": steps or s.steps,
            "guidance": s.guidance,
            "guidance_low": s.guidance_low,
            "shift": s.shift,
        }
        segments: list[Tensor] = []
        decoded: list[np.ndarray] = []  # segments whose last picture the next one starts from
        times: list[float] = []
        try:
            with ExitStack() as stack:
                stack.enter_context(attached.one_video())
                if work is not None:
                    assert self.bridging is not None
                    if isinstance(work, Bridge) and self.bridging.settings.draft_steps is not None:
                        inputs, start, work.drafted = self.bridging.draft(
                            *given, seed=seed, size=size(s), sampling=sampling
                        )
                    stack.enter_context(work.attached(texts_of(inputs.text)))
                for number in range(s.segments):
                    if number:
                        inputs = self.go_on(inputs, segments[-1], decoded, seed, clock)
                    latents = denoise(
                        self.bundle, inputs, **sampling, start=start, callbacks=[watch]
                    )
                    times.append(clock.lap("denoise"))
                    segments.append(latents)
        finally:
            disable_cache(self.bundle)
        latents = join_latents(self.bundle, segments, s.held)
        if decoded:
            frames = join_frames([*decoded, decode_latents(self.bundle, segments[-1])])
        else:
            frames = decode_latents(self.bundle, latents)
        clock.lap("decode")
        counters = s.store.stats()
        trace = watched or attached.trace
        report = {}
        if work is not None:
            forwards = sum(d.computed and d.unit == 0 for d in trace.decisions)
            report = record_of(work, forwards, clock.seconds["denoise"])
        return Video(
            index,
            prompt,
            cache.name,
            frames,
            latents.cpu(),
            clock.seconds,
            trace,
            counters["bytes_peak"],
            counters,
            times,
            report,
        )

    def go_on(
        self,
        inputs: Inputs,
        latents: Tensor,
        decoded: list[np.ndarray],
        seed: int,
        clock: Clock,
    ) -> Inputs:
        """Inputs of the segment after the one with these latents, from the same noise; appends to
        `decoded` where the model goes on from a picture.
        """
        if self.bundle.model.goes_on == "picture":
            decoded.append(decode_latents(self.bundle, latents))
            clock.lap("decode")
            picture, shape = last_picture(decoded[-1]), size(self.settings)
            fresh = draw_inputs(self.bundle, inputs.text, **shape, seed=seed, picture=picture)
            inputs = replace(fresh, latents=inputs.latents)
        else:
            inputs = hold(inputs, latents, self.settings.held)
        clock.lap("text")
        return inputs

    @property
    def num_blocks(self) -> int:
        return len(blocks_of(self.bundle.pipe.transformer))

    def warm_up(self) -> None:
        """Two untimed steps and a decode, so that the first timed video does not pay for the
        process's start.
        """
        s = self.settings
        inputs = prepare(self.bundle, s, "warm-up", self.pictures[s.pictures[0]], seed=s.seed)
        latents = denoise(self.bundle, inputs, steps=2, guidance=s.guidance, shift=s.shift)
        decode_latents(self.bundle, latents)


def prepare(
    bundle: Bundle, settings: SamplingSettings, prompt: str, picture: Any, *, seed: int
) -> Inputs:
    """Text, noise and picture of one video."""
    s = settings
    text = encode_text(bundle, prompt, negative_prompt=s.negative_prompt, guidance=s.guidance)
    return draw_inputs(bundle, text, **size(s), seed=seed, picture=picture)


def size(settings: SamplingSettings) -> dict[str, int]:
    """Of one segment."""
    return {name: getattr(settings, name) for name in ("height", "width", "num_frames")}


def other_noise(latents: Tensor, seed: int) -> Tensor:
    """Like the initial noise, but none of it."""
    generator = torch.Generator("cpu").manual_seed(2**40 + seed)
    return torch.randn(latents.shape, generator=generator).to(latents)


class Clock:
    """Wall-clock laps that wait for the device first."""

    def __init__(self, device: Any):
        self.device, self.seconds = torch.device(device), {}  # type: ignore[var-annotated]
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> float:
        """Seconds since the last lap, which are added to those of this name."""
        now = self.now()
        seconds, self.last = now - self.last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return seconds


def open_picture(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"image: {path} is not a picture") from None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ConfigError(f"image: cannot read {path}: {reason}") from None
