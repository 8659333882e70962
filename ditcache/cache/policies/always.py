"""Always: compute every step. For what saves work beside a policy, such as CFG-delta alone."""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.cache.policies.base import Policy, Schedule


@dataclass
class Always(Policy):
    """Static; nothing is skipped."""

    def mask(self, schedule: Schedule) -> list[bool]:
        return [True] * schedule.num_steps
