"""A policy of your own. From this folder: python custom_policy.py, or
ditcache generate compare=true cache._target_=custom_policy.Restless +cache.policy.limit=0.05
"""

from dataclasses import dataclass

import ditcache
from ditcache.cache.policies.base import Context, Policy


@ditcache.register_policy("restless")
@dataclass
class Restless(Policy):
    """Compute when the blocks' input moved more than `limit` since the last computed step."""

    limit: float = 0.05

    def should_compute(self, ctx: Context) -> bool:
        last = ctx.state.get("last")
        ctx.signal = 1.0 if last is None else float((ctx.hidden - last).norm() / last.norm())
        return ctx.signal > self.limit

    def record(self, ctx: Context, computed: bool) -> None:
        if computed:
            ctx.state.put("last", ctx.hidden.clone())


if __name__ == "__main__":
    pipe = ditcache.load("tiny").pipe
    cache = ditcache.enable_cache(pipe, "restless", limit=0.05, max_skips=2)
    pipe("a red star moves left", height=64, width=64, num_frames=17, num_inference_steps=24)
    print(cache.stats["units"]["transformer/cond/0"])
