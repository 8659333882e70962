"""First Block Cache: the first block tells whether the rest may be reused."""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.cache.policies.base import Context, Policy


@dataclass
class FBCache(Policy):
    """Reuse while the first block's residual stays near the one seen at the last computed step.

    The reference moves only when the unit computes, so drift is measured against what is reused and
    needs no accumulator. The idea is ParaAttention's; diffusers ships it as FirstBlockCache.

    threshold: largest relative L1 change that is still reused; 0 reuses nothing. Useful values lie
    at .04-.12.
    """

    threshold: float = 0.08

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")

    @property
    def probe(self) -> int:
        return 1

    def should_compute(self, ctx: Context) -> bool:
        from ditcache.cache.signal import relative_l1  # torch, which settings do without

        reference = ctx.state.get("reference")
        if reference is None or self.threshold == 0:
            return True
        assert ctx.probe_residual is not None
        ctx.signal = relative_l1(ctx.probe_residual, reference)
        return not ctx.signal < self.threshold  # NaN computes

    def record(self, ctx: Context, computed: bool) -> None:
        if computed and ctx.probe_residual is not None:
            ctx.state.put("reference", ctx.probe_residual)
