"""The line through the last two computed residuals, damped at each step as a plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Combination

if TYPE_CHECKING:
    from ditcache.cache.policies.base import Context, Policy
    from ditcache.cache.state import Point


@dataclass
class Fitted(Combination):
    """Between hold (damping 0) and a straight line (damping 1), chosen step by step: the damping
    that `ditcache calibrate` found for this step by least squares. Two tensors per unit and branch.
    """

    @property
    def tensors(self) -> int:
        return 2

    def check(self, policy: Policy | None) -> None:
        if not hasattr(policy, "damping"):
            raise ValueError("forecaster: fitted takes its numbers from a plan; use cache=planned")

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        if len(points) == 1:
            return [1.0]
        older, newer = (point.step for point in points)
        damping = ctx.policy.damping(ctx.step)  # type: ignore[attr-defined]
        share = damping * (ctx.step - newer) / (newer - older)
        return [-share, 1.0 + share]
