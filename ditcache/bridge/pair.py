"""Two frozen models over one set of clips: draws batches, and what a source says of them.

Letters: B batch, C channels, T latent frames, H W latent sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditcache.bridge.capture import Seen, capture, ends
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.samples import Caption, Samples
from ditcache.bridge.short_text import ShortText, short_text
from ditcache.bridge.students import Batch

FEEDS = ("source", "self", "shuffled")
SHUFFLED = 1  # a shuffled source belongs to the next clip of the batch


@dataclass
class Draw:
    """Which clips, and how they are noised. rows [B]; noise [B, C, T, H, W]; sigma, lag [B]: the
    source sees the state at sigma + lag. uncond [B]: read the empty caption. present [B]: False
    where the source is dropped (None: nowhere).
    """

    rows: Tensor
    noise: Tensor
    sigma: Tensor
    lag: Tensor
    uncond: Tensor
    present: Tensor | None = None


class Pair:
    """Target and source of one direction, within `opened()`. Both stay frozen."""

    def __init__(
        self, samples: Samples, transformers: dict[str, nn.Module], target: str, source: str
    ):
        self.samples, self.sides = samples, {"target": target, "source": source}
        self.target, self.source = transformers[target], transformers[source]
        self.texts: dict[str, ShortText] = {}
        for transformer in (self.target, self.source):
            transformer.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.target.parameters()).device

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Both transformers take captions without their padding."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())  # of autocast around an fp32 norm
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            self.texts["target"] = stack.enter_context(short_text(self.target))
            self.texts["source"] = (
                self.texts["target"]
                if self.source is self.target
                else stack.enter_context(short_text(self.source))
            )
            yield

    def read(self, role: str, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Text and image embeddings; sets the transformer to these captions."""
        samples, side = self.samples, self.sides[role]
        caption, empty = samples.sides[side].at(draw.rows), samples.empty[side]
        text, lengths = caption.text.clone(), caption.lengths.clone()
        count = min(empty.text.shape[1], text.shape[1])
        text[draw.uncond] = 0
        text[draw.uncond, :count] = empty.text[0, :count]
        lengths[draw.uncond] = empty.lengths[0].clamp_max(count)
        text, lengths = text.to(self.device).float(), lengths.to(self.device)
        image = None if caption.image is None else caption.image.to(self.device).float()
        return self.texts[role].read(Caption(text, lengths, None, caption.padded_to)), image

    def seen(self, role: str, draw: Draw, latents: Tensor, sigma: Tensor) -> Seen:
        condition = self.samples.condition[draw.rows].to(self.device).float()
        text, image = self.read(role, draw)
        return Seen(torch.cat([latents, condition], 1), 1000 * sigma, text, image)

    @torch.no_grad()
    def batch(
        self, draw: Draw, feeds: Iterable[str | None], *, outputs: bool, fusion: Fusion
    ) -> Batch:
        """Everything students need of a draw. feeds: which sources. outputs: the source's velocity
        as well.

        The source sees what the target's own Euler step makes of the noisy latents: it knows
        nothing of the clip but these. A second view of it on the data's path would give it away.
        """
        device = self.device
        clean = self.samples.latents[draw.rows].to(device).float()
        noise, sigma = draw.noise.to(device), draw.sigma.to(device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        return self.look(draw, noisy, noise - clean, feeds, outputs=outputs, fusion=fusion)

    @torch.no_grad()
    def look(
        self,
        draw: Draw,
        noisy: Tensor,
        wanted: Tensor,
        feeds: Iterable[str | None],
        *,
        outputs: bool,
        fusion: Fusion,
    ) -> Batch:
        """What the frozen models make of latents at the draw's noise level, wherever they came
        from.
        """
        feeds, device = {feed for feed in feeds if feed}, self.device
        sigma, lag = draw.sigma.to(device), draw.lag.to(device)
        seen = self.seen("target", draw, noisy, sigma)
        alone, own = capture(self.target, seen)
        batch = Batch(seen, wanted, alone.float(), {}, None, draw.present)
        later, lagged = lagged_state(noisy, sigma, lag, alone.float())
        if "self" in feeds:
            if lag.any():
                own = capture(self.target, self.seen("target", draw, lagged, later))[1]
            batch.sources["self"] = own
        if outputs or feeds - {"self"}:
            theirs = self.seen("source", draw, lagged, later)
            few = replace(theirs, latents=theirs.latents[:, :, [0, -1]]) if ends(fusion) else theirs
            velocity, keys_values = capture(self.source, few)
            if outputs:  # of all frames, also where only some are read
                whole = velocity if few is theirs else theirs.call(self.source)
                batch.source_velocity = whole.float()
            batch.sources["source"] = keys_values
            batch.sources["shuffled"] = [
                (key.roll(SHUFFLED, 0), value.roll(SHUFFLED, 0)) for key, value in keys_values
            ]
        batch.seen = self.seen("target", draw, noisy, sigma)  # its captions are set again
        return batch


def lagged_state(
    noisy: Tensor, sigma: Tensor, lag: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """sigma + lag [B], and the latents there [B, C, T, H, W] by one Euler step of the model's own
    velocity.
    """
    later = (sigma + lag).clamp_max(1.0)
    return later, noisy + (later - sigma).view(-1, 1, 1, 1, 1) * velocity


def draw_sigma(generator: torch.Generator, count: int, shift: float) -> Tensor:
    """[B], logit-normal, shifted as the sampler's schedule is."""
    plain = torch.sigmoid(torch.randn(count, generator=generator))
    return shift * plain / (1 + (shift - 1) * plain)


def even_draw(samples: Samples, rows: Tensor, sigma: float, seed: int) -> Draw:
    """For judging: given clips at one noise level, each with noise of its own that depends on the
    clip and the level alone.
    """
    shape = samples.latents.shape[1:]
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(row)))
            for row in rows
        ]
    )
    count = len(rows)
    nothing = torch.zeros(count, dtype=torch.bool)
    return Draw(rows, noise, torch.full((count,), sigma), torch.zeros(count), nothing)


def shift_of(scheduler: Any) -> float:
    """The flow shift of a diffusers scheduler."""
    return float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)) or 1.0)
