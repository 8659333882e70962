"""DiCache: the first blocks' output, step by step, tells how far the rest has moved."""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.cache.policies.base import Context, Policy


@dataclass
class DiCache(Policy):
    """Add up the relative change of the probe's output from step to step; compute when the sum
    reaches `threshold` (DiCache, arXiv:2508.17356). Meant for the two_anchor forecaster.

    Unlike the paper's code, a reused step keeps what its own probe computed and forecasts only the
    blocks behind it.

    threshold: 0 skips nothing; published at .08 with the first fifth of the steps computed. depth:
    blocks in the probe.
    """

    threshold: float = 0.08
    depth: int = 1

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")
        if self.depth < 1:
            raise ValueError(f"depth: must be >= 1, got {self.depth}")

    @property
    def probe(self) -> int:
        return self.depth

    def should_compute(self, ctx: Context) -> bool:
        from ditcache.cache.signal import change, largest  # torch, which settings do without

        before = ctx.state.get("before")
        if before is None:
            return True
        total = ctx.state.values.get("total", 0.0) + change(ctx.hidden, before)
        ctx.state.values["total"] = total
        ctx.signal = largest(total)
        return not ctx.signal < self.threshold  # NaN computes

    def record(self, ctx: Context, computed: bool) -> None:
        ctx.state.put("before", ctx.hidden.clone())
        if computed:
            ctx.state.values["total"] = 0.0
