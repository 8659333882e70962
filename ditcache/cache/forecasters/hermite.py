"""HiCache: extrapolation on scaled Hermite polynomials."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Combination

if TYPE_CHECKING:
    from ditcache.cache.policies.base import Context
    from ditcache.cache.state import Point


@dataclass
class Hermite(Combination):
    """A ladder of finite differences on Hermite polynomials in place of Taylor's monomials
    (HiCache, arXiv:2508.16984).

    The forecast after e steps is D0 + sum over k of D_k / k! * scale^k * H_k(scale * e), H the
    physicists' Hermite polynomials. A scale below 1 damps the extrapolation; from order 2 on the
    last computed value itself is not reproduced at e = 0, by design. The ladder divides by the
    latest gap only, as published, so it is exact on lines for scale 1/sqrt(2) and on little else.

    order: 1 to 3. scale: sigma of the paper, .5 to .75.
    """

    order: int = 2
    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ValueError(f"order: must be between 1 and 3, got {self.order}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale: must be > 0 and <= 1, got {self.scale}")

    @property
    def tensors(self) -> int:
        return self.order + 1

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        elapsed = ctx.step - points[-1].step
        total = [0.0] * len(points)
        for k, row in enumerate(ladder([p.step for p in points])):
            basis = self.scale**k * hermite(k, self.scale * elapsed) / math.factorial(k)
            total = [t + basis * weight for t, weight in zip(total, row, strict=True)]
        return total


def ladder(steps: list[int]) -> list[list[float]]:
    """D_0, D_1, ... at the last of `steps`, each as weights of the values, oldest first.

    D_0 is the value; D_{k+1} = (D_k - D_k at the computed step before) / (gap between the two).
    """
    count = len(steps)
    columns = [[[float(i == j) for j in range(count)]] for i in range(count)]  # per step: its D_k
    for i in range(1, count):
        for k in range(i):
            newer, older = columns[i][k], columns[i - 1][k]
            gap = steps[i] - steps[i - 1]
            columns[i].append([(a - b) / gap for a, b in zip(newer, older, strict=True)])
    return columns[-1]


def hermite(k: int, z: float) -> float:
    """The physicists' Hermite polynomial H_k."""
    before, now = 0.0, 1.0
    for n in range(k):
        before, now = now, 2 * z * now - 2 * n * before
    return now
