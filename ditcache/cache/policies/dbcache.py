"""Dual Block Cache: blocks at the front tell whether the middle may be reused, blocks at the back
mend what that cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.cache.policies.base import Context, Policy, Schedule
from ditcache.errors import ConfigError


@dataclass
class DBCache(Policy):
    """Reuse the middle blocks while the front ones' residual stays near the one seen at the last
    computed step (cache-dit's DBCache). `front=1 back=0` is First Block Cache.

    Gates in this order: the driver's (first use, shape, gap, head, tail, longest run, budget), then
    `pattern`, the accumulated cap, the threshold. All count steps of one branch.

    threshold: largest relative L1 change that is still reused; 0 reuses nothing. front, back:
    blocks that always run (Fn, Bn). cap: most change to add up over a run of reused steps before
    the unit computes; null for no cap. pattern: one digit per step, `1` computes without asking;
    null for none.
    """

    threshold: float = 0.08
    front: int = 1
    back: int = 0
    cap: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")
        for name, low in (("front", 1), ("back", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be >= {low}, got {getattr(self, name)}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap: must be > 0, got {self.cap}")
        if self.pattern is not None and set(self.pattern) - {"0", "1"}:
            raise ValueError(f"pattern: must consist of 0 and 1, got '{self.pattern}'")

    @property
    def probe(self) -> int:
        return self.front

    def mask(self, schedule: Schedule) -> None:
        """Not static; looks whether the pattern fits before anything is skipped."""
        if self.pattern is None:
            return
        count, steps = len(self.pattern), schedule.num_steps
        if count != steps:
            raise ConfigError(f"cache.policy.pattern: has {count} steps, the run has {steps}")
        if self.pattern[0] == "0":
            raise ConfigError("cache.policy.pattern: the first step has nothing to reuse")

    def should_compute(self, ctx: Context) -> bool:
        from ditcache.cache.signal import relative_l1  # torch, which settings do without

        reference = ctx.state.get("reference")
        if reference is None or self.threshold == 0:
            return True
        if self.pattern is not None and self.pattern[ctx.step] == "1":
            return True
        assert ctx.probe_residual is not None
        ctx.signal = relative_l1(ctx.probe_residual, reference)
        total = ctx.state.values.get("total", 0.0) + ctx.signal
        ctx.state.values["total"] = total
        if self.cap is not None and not total < self.cap:
            return True
        return not ctx.signal < self.threshold  # NaN computes

    def record(self, ctx: Context, computed: bool) -> None:
        if computed and ctx.probe_residual is not None:
            ctx.state.put("reference", ctx.probe_residual)
            ctx.state.values["total"] = 0.0
