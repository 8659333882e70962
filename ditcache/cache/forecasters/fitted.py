"""What stands in comes from a plan: a damped line, or weights of the last computed residuals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Combination

if TYPE_CHECKING:
    from ditcache.cache.forecasters.base import Forecaster
    from ditcache.cache.policies.base import Context, Policy
    from ditcache.cache.state import Point


@dataclass
class Fitted(Combination):
    """Adds up the last computed residuals as the plan of `ditcache calibrate` says for this step:
    with the weights of a refined plan, else between hold (damping 0) and a straight line (damping
    1). Two tensors per unit and branch, or as many as the longest list of weights.
    """

    kept: int = field(default=2, init=False)

    @property
    def tensors(self) -> int:
        return self.kept

    def check(self, policy: Policy | None) -> None:
        if not hasattr(policy, "damping"):
            raise ValueError("forecaster: fitted takes its numbers from a plan; use cache=planned")

    def beside(self, policy: Policy) -> Forecaster:
        chosen = replace(self)
        chosen.kept = getattr(policy, "reach", 2)
        return chosen

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        policy, behind = ctx.policy, [point.step for point in reversed(points)]
        weights = policy.weights(ctx.step, behind) if hasattr(policy, "weights") else None
        if weights is not None:
            return [*weights, *[0.0] * (len(points) - len(weights))][::-1]
        if len(points) == 1:
            return [1.0]
        newer, older = behind[:2]
        damping = policy.damping(ctx.step)  # type: ignore[attr-defined]
        share = damping * (ctx.step - newer) / (newer - older)
        return [*[0.0] * (len(points) - 2), -share, 1.0 + share]
