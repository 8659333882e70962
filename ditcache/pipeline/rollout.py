"""Video chunk by chunk: every chunk is denoised in a few steps while its self-attention reads the
keys and values of those before it from a rolling cache.

Letters: C channels, F latent frames of a chunk, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditcache.cache.settings import CacheSettings
from ditcache.cache.trace import Trace
from ditcache.errors import ConfigError
from ditcache.kv.attach import kv_attention
from ditcache.kv.make import make_cache
from ditcache.kv.settings import KVSettings
from ditcache.models.base import Bundle
from ditcache.pipeline.chunks import Noise
from ditcache.pipeline.denoise import run_branch
from ditcache.pipeline.render import Clock
from ditcache.pipeline.stepping import step_cache

if TYPE_CHECKING:
    from ditcache.kv.rolling import RollingKVCache
    from ditcache.pipeline.text import TextStates
    from ditcache.store.base import Store

HIGH, LOW = "transformer", "transformer_2"


@dataclass(frozen=True)
class Recipe:
    """How to roll out.

    lengths: latent frames of each chunk, see `partition`. timesteps: of a chunk's steps, already
    warped. recache: at a change of prompt, encode anew what the window holds.
    context: `clean` encodes a finished chunk at `context_noise`; `recompute` encodes the whole
    window before each chunk instead. cache: a step cache for the steps in between.
    """

    lengths: Sequence[int]
    timesteps: Sequence[float]
    guidance: float = 1.0
    guidance_low: float | None = None
    kv: KVSettings = field(default_factory=KVSettings)
    recache: bool = True
    context: str = "clean"
    context_noise: float = 0.0
    cache: CacheSettings = field(default_factory=CacheSettings)
    seed: int = 0


@dataclass
class Chunk:
    """One finished chunk.

    latents: fp32 [1, C, F, H, W], clean. start: its first latent frame. given: it was there before.
    seconds: denoise, context (all encoding of clean latents). evicted: latent frames that left the
    window. kv_bytes: of all caches. forwards: of any transformer, those of the context included.
    trace: the step cache's decisions. recached: latent frames encoded anew under a new prompt.
    """

    index: int
    start: int
    latents: Tensor
    given: bool
    seconds: dict[str, float]
    kv_bytes: int
    evicted: int
    forwards: int
    recached: int
    trace: Trace | None


@torch.no_grad()
def rollout(
    bundle: Bundle,
    recipe: Recipe,
    texts: dict[int, TextStates],
    *,
    height: int,
    width: int,
    start: Tensor | None = None,
    store: Store | None = None,
) -> Generator[Chunk, None, None]:
    """Chunks of a video of any length, in memory that does not grow with it.

    texts: chunk -> the prompt from there on; 0 must be there. height, width: pixels. start: clean
    latents [1, C, F, H, W] to go on from, whole chunks of the partition; they come first. store:
    where offloaded keys and values live. Between two chunks the transformers are as the rollout
    needs them; they are put back when it ends or is closed.
    """
    with ExitStack() as stack:
        run = Run(bundle, recipe, (height, width), stack, store)
        known = 0 if start is None else start.shape[2]
        begin, text = 0, texts[0]
        for index, length in enumerate(recipe.lengths):
            changed = index > 0 and index in texts
            text = texts.get(index, text)
            if begin < known:
                assert start is not None
                if begin + length > known:
                    raise ConfigError(
                        f"start: {known} latent frames end within chunk {index}, which is "
                        f"{begin} to {begin + length}; give whole chunks"
                    )
                own = start[:, :, begin : begin + length]
                yield run.take(index, begin, own, text)
            else:
                last = index == len(recipe.lengths) - 1
                yield run.make(index, begin, length, text, changed=changed, last=last)
            begin += length


class Run:
    """One rollout: its caches, per expert and branch, and the clean latents the window holds."""

    def __init__(
        self,
        bundle: Bundle,
        recipe: Recipe,
        size: tuple[int, int],
        stack: ExitStack,
        store: Store | None,
    ):
        self.bundle, self.recipe = bundle, recipe
        vae, config = bundle.pipe.vae.config, bundle.pipe.transformer.config
        height, width = (pixels // vae.scale_factor_spatial for pixels in size)
        shape = (config.in_channels, height, width)
        self.noise = Noise(recipe.seed, len(recipe.timesteps), shape)
        self.unit = (height // config.patch_size[1]) * (width // config.patch_size[2])
        branches = ("cond", "uncond") if recipe.guidance > 1 else ("cond",)
        self.attached = {
            name: stack.enter_context(kv_attention(expert, positions=recipe.kv.positions))
            for name, expert in bundle.experts.items()
        }
        self.caches: dict[tuple[str, str], RollingKVCache] = {
            (name, branch): make_cache(
                len(expert.blocks), recipe.kv, self.unit, sum(recipe.lengths), store, (name, branch)
            )
            for name, expert in bundle.experts.items()
            for branch in branches
        }
        stack.callback(self.free)
        self.held: list[tuple[int, Tensor]] = []  # (first frame, clean latents) in the window
        self.begun: set[tuple[str, str]] = set()  # caches that have seen the chunk at hand
        self.forwards = 0

    def free(self) -> None:
        for cache in self.caches.values():
            cache.reset()

    def take(self, index: int, begin: int, latents: Tensor, text: TextStates) -> Chunk:
        """A chunk that is given: only encoded."""
        clock, before = Clock(self.bundle.device), self.forwards
        latents = latents.to(self.bundle.device, torch.float64)
        for step in range(len(self.recipe.timesteps)):  # those after it get their own
            self.noise.draw(step, latents.shape[2])
        held, self.begun = self.frames_held, set()
        self.encode(begin, latents, text)
        clock.lap("context")
        self.hold(begin, latents)
        return self.finished(index, begin, latents, True, clock, before, held, 0, None)

    def make(
        self, index: int, begin: int, length: int, text: TextStates, *, changed: bool, last: bool
    ) -> Chunk:
        """A chunk that is generated, and encoded for those after it."""
        recipe, clock, before = self.recipe, Clock(self.bundle.device), self.forwards
        recached, held = 0, self.frames_held
        if recipe.context == "recompute":
            self.encode_window(text, room=length)
        elif changed and recipe.recache:
            recached = self.encode_window(text, room=0)
        clock.lap("recache")
        self.begun = set()

        # 1) Noise to clean latents: every step guesses them, all but the last add noise again.
        latents = self.noise.draw(0, length).to(self.bundle.device, torch.float64)
        clean = latents
        with step_cache(self.bundle, recipe.cache, recipe.timesteps) as trace:
            for step, timestep in enumerate(recipe.timesteps):
                sigma = timestep / 1000
                velocity = self.velocity(step, begin, latents, timestep, text)
                clean = latents - sigma * velocity.double()
                if step + 1 < len(recipe.timesteps):
                    sigma = recipe.timesteps[step + 1] / 1000
                    fresh = self.noise.draw(step + 1, length).to(latents)
                    latents = (1 - sigma) * clean + sigma * fresh
        clock.lap("denoise")

        # 2) The clean pass: keys and values of noisy latents give way to those of clean ones.
        if recipe.context == "clean" and not last:
            self.encode(begin, clean, text)
        clock.lap("context")
        clock.seconds["context"] += clock.seconds.pop("recache")
        self.hold(begin, clean)
        return self.finished(index, begin, clean, False, clock, before, held, recached, trace)

    def velocity(
        self, step: int, begin: int, latents: Tensor, timestep: float, text: TextStates
    ) -> Tensor:
        """Of the expert that works at this noise level, guided if asked."""
        recipe, boundary = self.recipe, self.bundle.boundary
        low = boundary is not None and timestep < boundary * 1000
        expert = LOW if low else HIGH
        where = {
            "step_index": step,
            "sigma": timestep / 1000,
            "num_inference_steps": len(recipe.timesteps),
        }
        velocity = self.forward(expert, "cond", begin, latents, timestep, text.cond, where)
        if recipe.guidance <= 1:
            return velocity
        assert text.uncond is not None
        uncond = self.forward(expert, "uncond", begin, latents, timestep, text.uncond, where)
        strength = (low and recipe.guidance_low) or recipe.guidance
        return uncond + strength * (velocity - uncond)

    def encode(self, begin: int, latents: Tensor, text: TextStates) -> None:
        """The clean pass of every expert and branch, with the prompt: only keys and values of it
        are kept.
        """
        for expert, branch in self.caches:
            states = text.cond if branch == "cond" else text.uncond
            self.forward(expert, branch, begin, latents, self.recipe.context_noise, states, {})

    def encode_window(self, text: TextStates, *, room: int) -> int:
        """Encode what the window holds anew, chunk by chunk, leaving `room` frames for the next
        one; returns how many frames that were.
        """
        for cache in self.caches.values():
            cache.reset()
        self.trim(room)
        for begin, latents in self.held:
            self.begun = set()
            self.encode(begin, latents, text)
        return self.frames_held

    def forward(
        self,
        expert: str,
        branch: str,
        begin: int,
        latents: Tensor,
        timestep: float,
        states: Tensor | None,
        where: dict[str, Any],
    ) -> Tensor:
        """One forward of one branch at its place in the video. The first of a chunk appends to the
        branch's cache, whatever step that is; later ones overwrite.
        """
        assert states is not None
        transformer, cache = self.bundle.experts[expert], self.caches[expert, branch]
        kv = self.attached[expert]
        kv.cache, kv.frame_offset = cache, begin
        if (expert, branch) in self.begun:
            cache.enable_overwrite_mode()
        else:
            cache.enable_append_mode()
            self.begun.add((expert, branch))
        self.forwards += 1
        when = torch.tensor([timestep], device=latents.device)
        return run_branch(
            branch, transformer, latents.to(transformer.dtype), when, states, None, where
        )

    def hold(self, begin: int, latents: Tensor) -> None:
        """Remember the chunk's clean latents for as long as its keys and values."""
        self.held.append((begin, latents))
        self.trim(0)

    def trim(self, room: int) -> None:
        """Forget latents that are neither sink nor in the window, should `room` frames follow."""
        window, sink = self.recipe.kv.window, self.recipe.kv.sink
        if window is None or not self.held:
            return
        end = self.held[-1][0] + self.held[-1][1].shape[2]
        if end + room <= window:
            return
        oldest, kept = end + room - (window - sink), []
        for begin, latents in self.held:
            stop = begin + latents.shape[2]
            for low, high in ((begin, min(stop, sink)), (max(begin, sink, oldest), stop)):
                if low < high:
                    kept.append((low, latents[:, :, low - begin : high - begin]))
        self.held = kept

    @property
    def frames_held(self) -> int:
        return sum(latents.shape[2] for _, latents in self.held)

    def finished(
        self,
        index: int,
        begin: int,
        latents: Tensor,
        given: bool,
        clock: Clock,
        before: int,
        held: int,
        recached: int,
        trace: Trace | None,
    ) -> Chunk:
        return Chunk(
            index,
            begin,
            latents.float(),
            given,
            {"denoise": 0.0, **clock.seconds},
            sum(cache.nbytes for cache in self.caches.values()),
            held + latents.shape[2] - self.frames_held,
            self.forwards - before,
            recached,
            trace,
        )
