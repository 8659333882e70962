"""A step cache within the chunks of a rollout.

Of a chunk's forwards the first (it appends keys and values) and the clean pass always run; any
between may be skipped, as their keys and values give way to the clean pass's. Each chunk is a
generation of its own, so that nothing is remembered across chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ditcache.cache.attach import attach_settings, disable_cache
from ditcache.cache.policies.base import Schedule
from ditcache.cache.schedule import calibration_of, time_embeddings
from ditcache.cache.settings import CacheSettings
from ditcache.cache.trace import Trace
from ditcache.errors import ConfigError
from ditcache.models.base import Bundle
from ditcache.store.device import DeviceStore


@contextmanager
def step_cache(
    bundle: Bundle, cache: CacheSettings, timesteps: Sequence[float]
) -> Iterator[Trace | None]:
    """Attached for one chunk's steps -> its decisions, complete at the end; None without one."""
    if cache.policy is None:
        yield None
        return
    attached = attach_settings(bundle, cache, DeviceStore())
    attached.schedule_of = schedule_of(bundle, timesteps)
    trace = Trace()
    try:
        yield trace
        trace.__dict__.update(attached.trace.__dict__)
    finally:
        disable_cache(bundle)


def schedule_of(bundle: Bundle, timesteps: Sequence[float]) -> Callable[[str, int], Schedule]:
    """(expert, number of steps) -> what is known of a chunk's steps."""
    boundary, count = bundle.boundary, len(timesteps)
    high = count if boundary is None else sum(t >= boundary * 1000 for t in timesteps)

    def read(expert: str, num_steps: int) -> Schedule:
        first, end = (0, high) if expert == "transformer" else (high, count)
        transformer = bundle.experts[expert]
        return Schedule(
            num_steps,
            sigmas=tuple(t / 1000 for t in timesteps),
            first=first,
            end=end,
            embed=time_embeddings(transformer, torch.tensor(timesteps)),
        )

    return read


def check_step_cache(bundle: Bundle, cache: CacheSettings, timesteps: Sequence[float]) -> None:
    """Raises ConfigError for a step cache that cannot work in a rollout or would never skip."""
    if cache.policy is None:
        return
    count, read = len(timesteps), schedule_of(bundle, timesteps)
    for name in bundle.experts:
        own = cache.of(name)
        assert own.policy is not None
        policy = own.policy.fitted(calibration_of(bundle))
        schedule = read(name, count)
        span = range(schedule.first, schedule.end or count)
        free = [s for s in span[1:] if own.head <= s < count - own.tail]
        mask = policy.mask(Schedule(count, own.head, own.tail, schedule.sigmas))
        if free and (mask is None or not all(mask[step] for step in free)):
            return
    raise ConfigError(
        f"cache: {cache.name} computes all {count} steps of a chunk, so it has no effect (the "
        f"first always computes, head={cache.head} and tail={cache.tail} count steps of a chunk); "
        "set cache.head=1, cache.tail=0 or a policy that skips, or cache=none"
    )
