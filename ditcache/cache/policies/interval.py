"""Compute every n-th step."""

from dataclasses import dataclass

from ditcache.cache.policies.base import Policy, Schedule


@dataclass
class Interval(Policy):
    """Compute one step in `every`. Static: the whole mask is known before the run.

    With a Taylor forecaster on the stack residual this is TaylorSeer's schedule (arXiv:2503.06923)
    at the granularity that loses least on video.

    every: distance in steps between two computed steps, counted from the last head step; 1 computes
    all of them.
    """

    every: int = 2

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: must be >= 1, got {self.every}")

    def mask(self, schedule: Schedule) -> list[bool]:
        anchor = max(schedule.head - 1, 0)
        return [
            step <= anchor or (step - anchor) % self.every == 0
            for step in range(schedule.num_steps)
        ]
