"""Decides, call by call, which units of one expert compute, and puts a forecast in place of the
others.

The rules every policy shares live here: first use, a changed shape, a step that does not follow the
last one, head, tail, the longest run of skips and the budget. Knows nothing of hooks or pipelines.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditcache.cache.policies.base import Context, Schedule
from ditcache.cache.settings import CacheSettings
from ditcache.cache.state import Generation, UnitState
from ditcache.cache.trace import Decision, Trace
from ditcache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ditcache.cache.policies.base import Policy
    from ditcache.store.base import Store


GENERATIONS = itertools.count(1)  # unique in the process, so that caches may share a store


class Run:
    """What all experts of one pipeline share: the store, the trace and the generation under way."""

    def __init__(self, store: Store):
        self.store, self.trace = store, Trace()
        self.generation: Generation | None = None

    def begin(self, schedule: Schedule) -> Generation:
        """Start a new generation with nothing remembered."""
        self.end()
        self.trace = Trace()
        self.generation = Generation(next(GENERATIONS), schedule, self.store)
        return self.generation

    def end(self) -> None:
        """Free everything the generation kept; the trace stays readable."""
        if self.generation is not None:
            self.generation.free()
            self.generation = None


class Call:
    """One forward of the expert: where it is in the run, and what has been decided for all of its
    units.
    """

    __slots__ = ("branch", "leader", "num_steps", "probe_residual", "sigma", "step", "timestep")

    def __init__(
        self, branch: str, step: int, num_steps: int, sigma: float | None, timestep: Tensor | None
    ):
        self.branch, self.step, self.num_steps = branch, step, num_steps
        self.sigma, self.timestep = sigma, timestep
        self.probe_residual: Tensor | None = None
        # What the first unit did and why; the others follow it.
        self.leader: tuple[bool, str] | None = None


class Driver:
    """The step cache of one expert."""

    def __init__(self, expert: str, settings: CacheSettings, run: Run, num_units: int):
        assert settings.policy is not None
        self.expert, self.settings, self.run, self.num_units = expert, settings, run, num_units
        self.policy: Policy = settings.policy
        self.call: Call | None = None

    def begin_call(self, call: Call, schedule_of: Callable[[int], Schedule]) -> None:
        """A forward starts. `schedule_of(num_steps)` describes the run if this call is the first of
        a new one.
        """
        generation = self.run.generation
        if generation is None or not generation.continues_with(
            self.expert, call.branch, call.step, call.num_steps
        ):
            generation = self.run.begin(schedule_of(call.num_steps))
        if self.expert not in generation.masks:
            generation.masks[self.expert] = self.checked_mask(generation.schedule)
        generation.enter(self.expert, call.branch, call.step)
        self.call = call

    def end_call(self) -> None:
        self.call = None

    def checked_mask(self, schedule: Schedule) -> list[bool] | None:
        """The static policy's mask for this run; a wrong one is refused before anything is
        skipped.
        """
        own = replace(schedule, head=self.settings.head, tail=self.settings.tail)
        mask = self.policy.mask(own)
        if mask is None:
            return None
        name = type(self.policy).__name__
        if len(mask) != schedule.num_steps:
            raise ConfigError(
                f"{name}: its mask has {len(mask)} steps, the run has {schedule.num_steps}"
            )
        if mask and not mask[0]:
            raise ConfigError(f"{name}: its mask skips the first step, which has nothing to reuse")
        return mask

    def run_probe(
        self, blocks: list, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """The blocks that always run; keeps what they added for the policy."""
        assert self.call is not None
        out = run_blocks(blocks, hidden, args, kwargs)
        self.run.trace.probe_blocks += len(blocks)
        self.call.probe_residual = (out - hidden).detach()
        return out

    def run_unit(
        self, index: int, blocks: list, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """One cached unit: its blocks, or its input plus a forecast of their residual."""
        call, generation = self.call, self.run.generation
        assert call is not None and generation is not None
        state, forced = self.forced(
            generation.unit(self.expert, call.branch, index), call, hidden, generation
        )
        context = self.context(call, state, index, hidden, args, kwargs)
        computed, reason = (True, forced) if forced else self.decide(context, state, generation)
        forecast = None
        if not computed:
            forecast = self.settings.forecaster.forecast(state, call.step)
            if forecast is None:
                computed, reason = True, "missing"
        out = run_blocks(blocks, hidden, args, kwargs) if forecast is None else hidden + forecast
        if call.leader is None:
            call.leader = (computed, reason)
        self.remember(context, state, computed, out)
        self.run.trace.decisions.append(
            Decision(
                call.step,
                self.expert,
                call.branch,
                index,
                computed,
                reason,
                context.signal,
                len(blocks),
                state.nbytes(),
            )
        )
        return out

    def forced(
        self, state: UnitState, call: Call, hidden: Tensor, generation: Generation
    ) -> tuple[UnitState, str | None]:
        """Why this unit must compute whatever the policy says, or None. State that does not fit is
        dropped.
        """
        signature = (hidden.shape, hidden.dtype, hidden.device)
        reason = None
        if not state.computed:
            reason = "first"
        elif state.signature != signature:
            state, reason = generation.restart(state), "shape"
        elif state.last_step != call.step - 1:
            state, reason = generation.restart(state), "gap"
        state.signature, state.last_step = signature, call.step
        if reason is None and call.step < self.settings.head:
            reason = "head"
        if reason is None and call.step >= call.num_steps - self.settings.tail:
            reason = "tail"
        return state, reason

    def decide(
        self, context: Context, state: UnitState, generation: Generation
    ) -> tuple[bool, str]:
        """Limits first, then the mask or the policy. Units after the first follow it unless the
        policy is per unit.
        """
        call, mask = self.call, generation.masks[self.expert]
        assert call is not None
        if call.leader is not None and not self.policy.per_unit:
            return call.leader
        if self.settings.max_skips is not None and state.run >= self.settings.max_skips:
            return True, "max_skips"
        if self.settings.budget is not None and state.skipped >= self.settings.budget:
            return True, "budget"
        return (self.policy.should_compute(context) if mask is None else mask[call.step]), "policy"

    def remember(self, context: Context, state: UnitState, computed: bool, out: Tensor) -> None:
        """Update what the unit keeps; after the last step, keep nothing."""
        if context.unit_index == 0 or self.policy.per_unit:
            self.policy.record(context, computed)
        if context.step == context.num_steps - 1:
            state.drop()
        elif computed:
            state.run = 0
            self.settings.forecaster.observe(state, context.step, out - context.hidden)
        else:
            state.run += 1
            state.skipped += 1

    def context(
        self,
        call: Call,
        state: UnitState,
        index: int,
        hidden: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Context:
        """Blocks of the Wan family take (hidden, encoder_hidden, e0, rotary)."""
        return Context(
            expert=self.expert,
            branch=call.branch,
            step=call.step,
            num_steps=call.num_steps,
            sigma=call.sigma,
            timestep=call.timestep,
            unit_index=index,
            num_units=self.num_units,
            hidden=hidden,
            encoder_hidden=args[0] if args else kwargs.get("encoder_hidden_states"),
            e0=args[1] if len(args) > 1 else kwargs.get("temb"),
            probe_residual=call.probe_residual,
            state=state,
        )


def run_blocks(blocks: list, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    for block in blocks:
        hidden = block(hidden, *args, **kwargs)
    return hidden
