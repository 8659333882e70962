"""DiCache: along the line through the last two computed residuals, as far as the input has gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.state import Point

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.policies.base import Context


@dataclass
class TwoAnchor(Forecaster):
    """R2 + gamma (R1 - R2) with gamma = mean|q - q2| / mean|q1 - q2|, clipped to [1, `limit`]
    (DiCache, arXiv:2508.17356); 1 is the newer computed step, 2 the older.

    q is what the probe blocks added or, under a policy without a probe, the unit's input. gamma
    stays on the device, one per sample. Four tensors per unit and branch: two residuals, two q.

    limit: largest gamma; 1 is hold.
    """

    limit: float = 2.0

    def __post_init__(self) -> None:
        if not self.limit >= 1:
            raise ValueError(f"limit: must be >= 1, got {self.limit}")

    @property
    def tensors(self) -> int:
        return 2

    @property
    def indicators(self) -> int:
        return 2

    def observe(self, ctx: Context, residual: Tensor) -> None:
        super().observe(ctx, residual)
        ctx.state.put(f"q{ctx.state.computed[-1].slot}", indicator(ctx).clone())

    def forecast(self, ctx: Context) -> Tensor | None:
        newer = ctx.state.get(ctx.state.computed[-1].slot)
        if newer is None or len(ctx.state.computed) < 2:
            return newer
        points: list[Point] = ctx.state.computed[-2:]
        older = ctx.state.get(points[0].slot)
        q2, q1 = (ctx.state.get(f"q{point.slot}") for point in points)
        if older is None or q1 is None or q2 is None:
            return None
        axes = tuple(range(1, q1.ndim))
        gone = (indicator(ctx) - q2).abs().mean(axes).float()
        gap = (q1 - q2).abs().mean(axes).float()
        gamma = (gone / gap).nan_to_num(1.0).clamp(1.0, self.limit).to(newer.dtype)
        return older + gamma.view(-1, *[1] * (newer.ndim - 1)) * (newer - older)


def indicator(ctx: Context) -> Tensor:
    return ctx.hidden if ctx.probe_residual is None else ctx.probe_residual
