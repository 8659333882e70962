"""EasyCache: learns while running how much the output moves per change of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ditcache.cache.policies.base import Context, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class EasyCache(Policy):
    """Add up k times the latents' change, relative to the last output; compute when the sum reaches
    `threshold` (EasyCache, arXiv:2507.02860).

    k is the output's change over the input's between the last two computed steps. Looks at latents
    only, so it is at its cheapest with granularity=output, where latent-sized tensors are all that
    is kept. Decided on cond; uncond follows.

    threshold: 0 skips nothing; published at .05 with head=10.
    """

    branches_agree: ClassVar[bool] = True

    threshold: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")

    def should_compute(self, ctx: Context) -> bool:
        from ditcache.cache.signal import largest

        before, output = ctx.state.get("input"), ctx.state.get("last_output")
        slope: Tensor | None = ctx.state.values.get("slope")
        if before is None or output is None or slope is None:
            return True
        assert ctx.latents is not None
        moved = size(ctx.latents - before) / size(output)
        total = ctx.state.values.get("total", 0.0) + slope * moved
        ctx.state.values["total"] = total
        ctx.signal = largest(total)
        return not ctx.signal < self.threshold  # NaN computes

    def record(self, ctx: Context, computed: bool) -> None:
        if computed:
            ctx.state.values["total"] = 0.0
        if ctx.latents is not None and ctx.branch != "uncond":
            ctx.state.put("input", ctx.latents.clone())

    def record_output(self, ctx: Context, output: Tensor) -> None:
        if ctx.branch == "uncond":
            return
        assert ctx.latents is not None
        last, before = ctx.state.get("last_output"), ctx.state.get("last_input")
        if last is not None and before is not None:
            ctx.state.values["slope"] = size(output - last) / size(ctx.latents - before)
        ctx.state.put("last_output", output.clone())
        ctx.state.put("last_input", ctx.latents.clone())


def size(value: Tensor) -> Tensor:
    """mean|value| per sample, [B] fp32."""
    return value.float().abs().mean(tuple(range(1, value.ndim)))
