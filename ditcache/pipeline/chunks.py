"""How a rollout is divided and stepped: chunks, timesteps, noise. Imports torch only to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def partition(frames: int, chunk: int, first: int | None = None) -> list[int]:
    """Latent frames of a video -> of its chunks: `first` (None: `chunk`), then `chunk` each; the
    last one is what remains.
    """
    lengths: list[int] = []
    left = frames
    while left > 0:
        length = min(left, chunk if lengths or first is None else first)
        lengths.append(length)
        left -= length
    return lengths


def warped(timesteps: Sequence[float], shift: float) -> list[float]:
    """Timesteps of an even schedule -> of the one that flow shift leads to: u = t / 1000,
    sigma = shift u / (1 + (shift - 1) u).
    """
    shares = [t / 1000 for t in timesteps]
    return [1000 * shift * u / (1 + (shift - 1) * u) for u in shares]


def ceiling(steps: int) -> float:
    """How much faster a step cache can make a chunk at most: of its steps + 1 forwards the first,
    which appends keys and values, and the clean pass always run.
    """
    return (steps + 1) / 2


class Noise:
    """A rollout's noise: fp32 [1, C, F, H, W], always the same for a seed, latent frame and step,
    however the frames are divided into chunks and on whatever device they are used.

    step 0 starts a chunk; step k is added again after step k - 1. Each has its own generator, on
    the CPU, and draws frame by frame in the video's order.
    """

    def __init__(self, seed: int, steps: int, shape: tuple[int, int, int]):
        import numpy as np
        import torch

        self.shape = shape  # C, H, W
        seeds = [
            int(
                np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)
            )
            for step in range(steps)
        ]
        self.generators = [torch.Generator().manual_seed(own) for own in seeds]

    def draw(self, step: int, frames: int) -> Tensor:
        import torch

        generator = self.generators[step]
        drawn = [torch.randn(self.shape, generator=generator) for _ in range(frames)]
        return torch.stack(drawn, dim=1)[None]
