"""CFG-delta: do without the uncond branch on some steps."""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.cache.policies.base import Policy, Schedule


@dataclass
class CfgDelta:
    """On chosen steps uncond is cond plus the difference seen when both last ran, so that the
    guided output is cond - (guidance - 1) * difference. Stands beside any policy and forecaster.

    One tensor of the latents' size per expert. Head and tail steps always run both branches; so
    does a step whose cond output has another shape, and a pipeline that runs uncond first.

    every: distance in steps between two runs of the uncond branch; 1 skips nothing.
    """

    every: int = 2

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: must be >= 1, got {self.every}")

    def skips(self, step: int, last: int | None) -> bool:
        """Whether uncond is left out at `step` when it last ran at `last`."""
        return last is not None and step - last < self.every


@dataclass
class Always(Policy):
    """Computes every step: the policy of CFG-delta alone. Static."""

    def mask(self, schedule: Schedule) -> list[bool]:
        return [True] * schedule.num_steps
