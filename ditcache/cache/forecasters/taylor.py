"""Polynomial extrapolation through the last computed residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Forecaster

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.state import UnitState


@dataclass
class Taylor(Forecaster):
    """Extend the polynomial of degree `order` through the last `order + 1` computed residuals, at
    their true steps.

    The idea of TaylorSeer (arXiv:2503.06923) with Newton's divided differences in place of a ladder
    of finite differences, so that it is exact on polynomials of its degree whatever the gaps.
    Values are kept, not differences: order + 1 tensors, no rounding carried on. With fewer computed
    steps the degree is lower.

    order: degree of the polynomial, 0 (hold) to 3. Order 1 helps over short gaps; higher orders
    amplify noise.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 3:
            raise ValueError(f"order: must be between 0 and 3, got {self.order}")

    @property
    def tensors(self) -> int:
        return self.order + 1

    def forecast(self, state: UnitState, step: int) -> Tensor | None:
        points = state.computed[-self.tensors :]
        steps = [float(at) for at, _ in points]
        values = []
        for _, slot in points:
            value = state.get(slot)
            if value is None:
                return None
            values.append(value)
        if len(points) == 2:  # the common case in one pass over memory
            return values[0].lerp(values[1], (step - steps[0]) / (steps[1] - steps[0]))
        total = values[0].float() * weight(steps, 0, step)
        for index, value in enumerate(values[1:], 1):
            total.add_(value.float(), alpha=weight(steps, index, step))
        return total.to(values[0].dtype)


def weight(steps: list[float], index: int, step: float) -> float:
    """Lagrange's weight at `step` of the value computed at `steps[index]`."""
    product = 1.0
    for other, at in enumerate(steps):
        if other != index:
            product *= (step - at) / (steps[index] - at)
    return product
