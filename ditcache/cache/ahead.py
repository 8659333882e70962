"""What the next forwards will ask the store for, so that it can bring it near while blocks compute.

Knows which steps may skip, not which store there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ditcache.store.base import Key

if TYPE_CHECKING:
    from ditcache.cache.run import Call
    from ditcache.cache.settings import CacheSettings
    from ditcache.cache.state import Generation, UnitState


def upcoming(
    generation: Generation, settings: CacheSettings, per_unit: bool, call: Call, index: int
) -> Iterator[Key]:
    """Keys in the order of their next use after unit `index` of `call`: the rest of this forward,
    then every branch's next step that skips (by the mask) or may skip (without one).
    """
    states = [s for s in generation.units.values() if s.prefix[1] == generation.expert]
    branches = list(dict.fromkeys(s.prefix[2] for s in states))  # in the order of their calls
    here = branches.index(call.branch)
    skipping = call.leader is None or per_unit or not call.leader[0]
    uses = []  # (step, branch, unit), the unit's state, how often it computes before
    for state in states:
        branch, unit = branches.index(state.prefix[2]), state.prefix[3]
        open_now = branch > here or (branch == here and unit > index)  # its turn at this step
        if open_now and branch == here and skipping:
            uses.append(((call.step, branch, unit), state, 0))
            continue
        following = call.step if open_now and branch > here else call.step + 1
        step = next_skip(generation, settings, following)
        if step is not None:
            computes = step - following + (open_now and branch == here)
            uses.append(((step, branch, unit), state, computes))
    for _, state, computes in sorted(uses, key=lambda use: use[0]):
        yield from keys_of(state, settings.forecaster.tensors, computes)


def next_skip(generation: Generation, settings: CacheSettings, step: int) -> int | None:
    """The first step from `step` on that skips or may skip, or None."""
    assert generation.expert is not None
    mask = generation.masks[generation.expert]
    end = min(generation.ends[generation.expert], generation.num_steps - settings.tail)
    allowed = range(max(step, settings.head), end)
    return next((at for at in allowed if mask is None or not mask[at]), None)


def keys_of(state: UnitState, tensors: int, computes: int) -> Iterator[Key]:
    """What a unit keeps, without the residuals that it will write over if it computes that often
    before.
    """
    points = state.computed[-tensors:]
    lost = {point.slot for point in points[: max(0, len(points) + computes - tensors)]}
    for slot in state.sizes:
        if slot not in lost:
            yield Key(*state.prefix, slot)
