"""Segments of a long video that start warm: with the residuals of segments before them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WarmStart:
    """In the first steps of every segment but the first, a unit takes the residual that the newest
    of the last few segments computed at the same step. Goes around any policy, which decides about
    all other steps and about those for which there is no such residual.

    It works because segments start from the same noise: at high noise their units see nearly the
    same (docs/long-video.md has figures). It goes before `head`; `tail`, `max_skips` and `budget`
    hold. Forecaster and policy take what was reused for computed.

    steps: at the start of a segment; 0 reuses nothing. window: how many segments back a residual
    may come from; after that many in a row have reused it, one computes its own.
    """

    steps: int = 3
    window: int = 4

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: must be >= 0, got {self.steps}")
        if self.window < 1:
            raise ValueError(f"window: must be >= 1, got {self.window}")
