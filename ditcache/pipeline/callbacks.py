"""What a callback gets at each step. Ours only watch; a user's may edit `step.latents`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass
class Step:
    """One denoising step, after the scheduler has moved.

    latents, velocity: [B, C, T, H, W]; assigning `latents` changes what the next step starts from.
    sigma: noise level the step started at, 1 to 0. expert: the transformer that ran.
    """

    index: int
    num_steps: int
    timestep: float
    sigma: float
    expert: str
    latents: Tensor
    velocity: Tensor


Callback: TypeAlias = Callable[[Step], None]
