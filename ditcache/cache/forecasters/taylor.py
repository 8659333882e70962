"""Polynomial extrapolation through the last computed residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Combination
from ditcache.errors import ConfigError, one_of

if TYPE_CHECKING:
    from ditcache.cache.policies.base import Context
    from ditcache.cache.state import Point

AXES = ("step", "log_snr")


@dataclass
class Taylor(Combination):
    """Extend the polynomial of degree `order` through the last `order + 1` computed residuals, at
    their true positions.

    The idea of TaylorSeer (arXiv:2503.06923) with Newton's divided differences in place of a ladder
    of finite differences, so that it is exact on polynomials of its degree whatever the gaps.
    Values are kept, not differences: order + 1 tensors, no rounding carried on. With fewer computed
    steps the degree is lower.

    order: degree of the polynomial, 0 (hold) to 3. Order 1 helps over short gaps; higher orders
    amplify noise. axis: what residuals are a polynomial of, the step's number or the log
    signal-to-noise ratio of a flow schedule, 2 log((1 - sigma) / sigma).
    """

    order: int = 1
    axis: str = "step"

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 3:
            raise ValueError(f"order: must be between 0 and 3, got {self.order}")
        if self.axis not in AXES:
            raise ValueError(f"axis: no '{self.axis}'. {one_of(self.axis, AXES)}")

    @property
    def tensors(self) -> int:
        return self.order + 1

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        """Lagrange's weights."""
        at = self.position(ctx.step, ctx.sigma)
        places = [self.position(p.step, p.sigma) for p in points]
        if len(set(places)) < len(places):  # too near pure noise to be told apart
            return Taylor(self.order).weights(points, ctx)
        if len(points) == 2:  # adding up to exactly 1
            share = (at - places[0]) / (places[1] - places[0])
            return [1.0 - share, share]
        return [
            math.prod((at - q) / (p - q) for j, q in enumerate(places) if j != i)
            for i, p in enumerate(places)
        ]

    def position(self, step: int, sigma: float | None) -> float:
        if self.axis == "step":
            return float(step)
        if sigma is None:
            raise ConfigError(
                "cache.forecaster.axis: log_snr needs the sigmas of a scheduler; use step"
            )
        sigma = min(max(sigma, 1e-3), 1 - 1e-3)
        return 2 * math.log((1 - sigma) / sigma)
