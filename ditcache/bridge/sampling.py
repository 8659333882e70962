"""Whole denoisings with every student, side by side from the same noise: what better or worse
velocities come to in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ditcache.bridge.fusion import Fusion
from ditcache.bridge.pair import Draw, Pair, even_draw
from ditcache.bridge.students import Student

BATCH = 16
STREAM = 99  # of noise, apart from that of single steps


@dataclass(frozen=True)
class Sampling:
    """How to denoise. shift: of the flow schedule. guidance > 1 takes an uncond branch."""

    steps: int
    shift: float
    guidance: float

    @property
    def sigmas(self) -> list[float]:
        """1 to 0, one more than steps."""
        plain = (1 - step / self.steps for step in range(self.steps + 1))
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in plain]


@torch.no_grad()
def sampled(
    pair: Pair,
    students: Mapping[str, Student],
    rows: Tensor,
    fusion: Fusion,
    sampling: Sampling,
    autocast: Any,
    on_part: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Student -> final latents [N, C, T, H, W] of clips `rows` [N], by Euler steps. A source is
    asked at every step; a shuffled one belongs to another of the clips, and sees its latents.
    """
    parts = [list(part) for part in rows.split(BATCH)]
    if len(parts) > 1 and len(parts[-1]) == 1:  # it would be its own shuffled source
        parts[-2] += parts.pop()
    found = {}
    for name, student in students.items():
        ends = []
        for part in map(torch.stack, parts):
            latents = even_draw(pair.samples, part, 1.0, STREAM).noise.to(pair.device)
            for sigma, after in pairwise(sampling.sigmas):
                with autocast():
                    velocity = guided(
                        pair, student, part, latents, sigma, fusion, sampling.guidance
                    )
                latents = latents + (after - sigma) * velocity
            ends.append(latents)
            on_part()
        found[name] = torch.cat(ends)
    return found


def guided(
    pair: Pair,
    student: Student,
    rows: Tensor,
    latents: Tensor,
    sigma: float,
    fusion: Fusion,
    guidance: float,
) -> Tensor:
    """A student's velocity with classifier-free guidance, [N, C, T, H, W]."""

    def branch(uncond: bool) -> Tensor:
        count = len(rows)
        level, empty = torch.full((count,), sigma), torch.full((count,), uncond)
        draw = Draw(rows, latents, level, torch.zeros(count), empty)
        feeds, mixes = {student.feed}, student.mixes_outputs
        batch = pair.look(draw, latents, latents, feeds, outputs=mixes, fusion=fusion)
        with student.attached(batch, pair.target):
            return student(batch, pair.target).float()

    cond = branch(False)
    if guidance <= 1:
        return cond
    uncond = branch(True)
    return uncond + guidance * (cond - uncond)
