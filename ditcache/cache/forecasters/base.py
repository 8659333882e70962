"""What a forecaster is: it says *what* stands in for a residual that is not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.state import Point

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.policies.base import Context, Policy


@dataclass
class Forecaster:
    """Base of all forecasters. Keeps its tensors in the unit's state, at most `tensors` of them."""

    @property
    def tensors(self) -> int:
        """Residuals kept per unit and branch."""
        return 1

    @property
    def indicators(self) -> int:
        """Hidden states kept beside them."""
        return 0

    def check(self, policy: Policy | None) -> None:
        """Raises ValueError if it makes no sense beside this policy."""

    def beside(self, policy: Policy) -> Forecaster:
        """This forecaster with what it takes from a policy that knows its constants."""
        return self

    def observe(self, ctx: Context, residual: Tensor) -> None:
        """Take in the residual computed at `ctx.step`; the tensor is given away."""
        state = ctx.state
        slot = str(len(state.computed) % self.tensors)
        state.put(slot, residual)
        state.computed.append(Point(ctx.step, ctx.sigma, slot))

    def forecast(self, ctx: Context) -> Tensor | None:
        """The residual expected at `ctx.step`, or None if what it needs is not there (then the unit
        computes). Asked only after something has been observed.
        """
        raise NotImplementedError


@dataclass
class Combination(Forecaster):
    """Base of forecasters that add up the kept residuals with one number each."""

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        """One weight per point, oldest first."""
        raise NotImplementedError

    def forecast(self, ctx: Context) -> Tensor | None:
        points = ctx.state.computed[-self.tensors :]
        values = []
        for point in points:
            value = ctx.state.get(point.slot)
            if value is None:
                return None
            values.append(value)
        weights = self.weights(points, ctx)
        if len(values) == 1 and weights == [1.0]:
            return values[0]
        if len(values) == 2 and sum(weights) == 1.0:  # the common case in one pass over memory
            return values[0].lerp(values[1], weights[1])
        total = values[0].float() * weights[0]
        for value, weight in zip(values[1:], weights[1:], strict=True):
            total.add_(value.float(), alpha=weight)
        return total.to(values[0].dtype)
