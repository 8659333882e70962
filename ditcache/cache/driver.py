"""Decides, call by call, which units of one expert compute, and puts a forecast in place of the
others.

The rules every policy shares live here: first use, a changed shape, a step that does not follow the
last one, head, tail, the longest run of skips and the budget. Knows nothing of hooks or pipelines.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditcache.cache.ahead import upcoming
from ditcache.cache.policies.base import Context, Policy, Schedule
from ditcache.cache.run import Call, Run
from ditcache.cache.settings import CacheSettings
from ditcache.cache.state import Generation, UnitState
from ditcache.cache.trace import Decision
from ditcache.cache.warm import Warm
from ditcache.errors import ConfigError, DitcacheError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ditcache.cache.streams import Work

DELTA = -1  # the unit under which CFG-delta keeps its difference


class Driver:
    """The step cache of one expert."""

    def __init__(
        self, expert: str, settings: CacheSettings, run: Run, num_units: int, group: Any = None
    ):
        assert settings.policy is not None
        self.expert, self.settings, self.run, self.num_units = expert, settings, run, num_units
        self.group = group  # of processes that share every forward
        self.policy: Policy = settings.policy
        self.whole = settings.granularity == "output"
        self.watches_output = type(self.policy).record_output is not Policy.record_output
        self.call: Call | None = None
        self.warm = Warm(expert, settings, run)

    def begin_call(self, call: Call, schedule_of: Callable[[str, int], Schedule]) -> None:
        """A forward starts. `schedule_of(expert, num_steps)` describes the run if this call is the
        first of a new one.
        """
        generation = self.run.generation
        if generation is None or not generation.continues_with(
            self.expert, call.branch, call.step, call.num_steps
        ):
            generation = self.run.begin(schedule_of(self.expert, call.num_steps))
        if self.expert not in generation.masks:
            self.plan(generation, schedule_of(self.expert, call.num_steps))
        generation.enter(self.expert, call.branch, call.step)
        if call.sigma is None and generation.sigmas:
            call.sigma = generation.sigmas[call.step]
        if self.settings.cfg is not None and call.branch == "uncond":
            call.output = self.cond_plus_delta(call, generation)
        self.call = call

    def end_call(self, output: Tensor | None) -> Tensor | None:
        """The forward is over, with this output [B, C, T, H, W] (None after an exception); returns
        what stands in for it, if anything.
        """
        call, self.call = self.call, None
        generation = self.run.generation
        if output is None or call is None or generation is None:
            return None
        if call.leader is None:
            raise DitcacheError(
                "step cache: the forward went through none of the blocks it replaced, so nothing "
                "can be cached; docs/models.md says how to describe such a model"
            )
        more = call.step < call.num_steps - 1
        if call.computed is not None and self.watches_output and more:
            self.policy.record_output(call.computed, output)
        if call.computed is not None and self.whole and generation.wanted(self.expert, call.step):
            assert call.latents is not None
            self.settings.forecaster.observe(call.computed, output.float() - call.latents.float())
        if call.computed is not None and self.whole and self.warm.takes(call, generation):
            assert call.latents is not None
            residual = output.float() - call.latents.float()
            self.warm.leave(call.computed.state, call, 0, generation, residual)
        result = output if call.output is None else call.output.to(output.dtype)
        if self.settings.cfg is not None:
            self.keep_delta(call, generation, result)
        return None if call.output is None else result

    def plan(self, generation: Generation, schedule: Schedule) -> None:
        """Ask a static policy for its mask and see which residuals a skip can still need."""
        s = self.settings
        own = replace(schedule, head=s.head, tail=s.tail)
        mask = self.policy.mask(own)
        name, steps = type(self.policy).__name__, schedule.num_steps
        if mask is not None and len(mask) != steps:
            raise ConfigError(f"{name}: its mask has {len(mask)} steps, the run has {steps}")
        if mask and own.first == 0 and not mask[0]:
            raise ConfigError(f"{name}: its mask skips the first step, which has nothing to reuse")
        self.warm.begin(generation)
        generation.masks[self.expert] = mask
        generation.ends[self.expert] = steps if schedule.end is None else schedule.end
        generation.sigmas = schedule.sigmas
        certain = [
            step < s.head or step >= steps - s.tail or (mask is not None and mask[step])
            for step in range(steps)
        ]
        kept = certain  # steps sure to compute; CFG-delta may leave out what the mask computes
        if s.cfg is not None:
            kept = [step < s.head or step >= steps - s.tail for step in range(steps)]
        generation.needed[self.expert] = needed(certain, kept, s.forecaster.tensors)

    def cond_plus_delta(self, call: Call, generation: Generation) -> Tensor | None:
        """CFG-delta: cond's output of this step plus the kept difference, where this step may do
        without the uncond branch.
        """
        assert self.settings.cfg is not None and call.latents is not None
        cond, state = generation.cond_output, generation.unit(self.expert, "uncond", DELTA)
        free = self.settings.head <= call.step < call.num_steps - self.settings.tail
        if not free or cond is None or cond[0] != call.step or cond[1].shape != call.latents.shape:
            return None
        if not self.settings.cfg.skips(call.step, state.last_step):
            return None
        if generation.unit(self.expert, "uncond", 0).last_step != call.step - 1:  # a gap
            return None
        delta = state.get("delta")
        if delta is None or delta.shape != cond[1].shape:
            return None
        return cond[1] + delta

    def keep_delta(self, call: Call, generation: Generation, output: Tensor) -> None:
        """CFG-delta: remember cond's output until uncond comes, and their difference after that."""
        if call.branch == "cond":
            generation.cond_output = (call.step, output)
        elif generation.cond_output is not None and (call.leader or (True, ""))[1] != "cfg":
            step, cond = generation.cond_output
            state = generation.unit(self.expert, "uncond", DELTA)
            if step == call.step and step < call.num_steps - 1 and cond.shape == output.shape:
                state.put("delta", output - cond)
                state.last_step = step
            else:
                state.drop()
            generation.cond_output = None

    def run_always(self, work: Work, *, front: bool) -> Tensor:
        """The blocks that always run, at the front (then the policy sees what they added) or at the
        back.
        """
        assert self.call is not None
        self.run.trace.always_blocks += len(work.blocks)
        if self.call.output is not None:  # nobody will look at the result
            return work.joined
        out = work.run()
        self.run.trace.always_computed += len(work.blocks)
        if front:
            added = (out - work.joined).detach()
            self.call.probe_residual = added if work.tokens is None else added[:, : work.tokens]
        return out

    def run_unit(self, index: int, work: Work, names: list[str]) -> Tensor:
        """One cached unit: its blocks, or its input plus a forecast of their residual. names: of
        the blocks' arguments.
        """
        call, generation = self.call, self.run.generation
        assert call is not None and generation is not None
        state = generation.unit(self.expert, call.branch, index)
        if call.output is not None:
            call.leader = (False, "cfg")
            state.last_step = call.step if state.last_step is not None else None
            self.note(call, index, False, "cfg", None, len(work.blocks), state)
            return work.joined
        state, forced = self.forced(state, call, work.joined, generation)
        context = self.context(call, state, index, work, names)
        forecast = None
        if not self.exhausted(state):
            forecast = self.warm.residual(call, state, index, generation)
        computed, reason = False, "warm"
        if forecast is not None:
            if generation.wanted(self.expert, call.step):
                self.settings.forecaster.observe(context, forecast)
        else:
            computed, reason = (True, forced) if forced else self.decide(context, state, generation)
            if not computed:
                forecast = self.settings.forecaster.forecast(context) if state.computed else None
                if forecast is None:
                    computed, reason = True, "missing"
        shared = None
        if forecast is None:
            shared, name = self.warm.recall(call, index, work, generation)
            out = self.computed(work, state) if shared is None else shared
            if name is not None:
                self.run.store.publish(name, out)
        elif self.whole:
            assert call.latents is not None
            out, call.output = work.joined, call.latents.float() + forecast
        else:
            out = work.joined + forecast
        if call.leader is None:
            call.leader = (computed, reason)
            call.computed = context if computed else None
            generation.decided[self.expert] = (call.step, call.branch, computed)
        self.remember(context, state, generation, computed, reason, work.joined, out)
        if computed and not self.whole and self.warm.takes(call, generation):
            self.warm.leave(state, call, index, generation, out - work.joined)
        if shared is not None:  # as if computed in every other respect
            computed, reason = False, "shared"
        self.note(call, index, computed, reason, context.signal, len(work.blocks), state)
        self.run.store.prefetch(
            itertools.chain(
                self.warm.upcoming(call, index, generation),
                upcoming(generation, self.settings, self.policy.per_unit, call, index),
                self.warm.later(call, generation),
            )
        )
        return out

    def exhausted(self, state: UnitState) -> str | None:
        """Which limit on skips a unit has reached, or None."""
        if self.settings.max_skips is not None and state.run >= self.settings.max_skips:
            return "max_skips"
        if self.settings.budget is not None and state.skipped >= self.settings.budget:
            return "budget"
        return None

    def computed(self, work: Work, state: UnitState) -> Tensor:
        """The unit's blocks, timed if the store weighs fetching against computing."""
        if not self.run.store.wants_cost:
            return work.run()
        start = now(work.joined)
        out = work.run()
        self.run.store.note_cost(state.prefix, now(out) - start)
        return out

    def note(
        self,
        call: Call,
        index: int,
        computed: bool,
        reason: str,
        signal: float | None,
        blocks: int,
        state: UnitState,
    ) -> None:
        self.run.trace.decisions.append(
            Decision(
                call.step,
                self.expert,
                call.branch,
                index,
                computed,
                reason,
                signal,
                blocks,
                state.nbytes(),
                self.run.segment or 0,
            )
        )

    def forced(
        self, state: UnitState, call: Call, hidden: Tensor, generation: Generation
    ) -> tuple[UnitState, str | None]:
        """Why this unit must compute whatever the policy says, or None. State that does not fit is
        dropped.
        """
        signature = (hidden.shape, hidden.dtype, hidden.device)
        reason = None
        if state.last_step is None:
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
        policy is per unit; uncond follows cond if the policy says so.
        """
        call, mask = self.call, generation.masks[self.expert]
        assert call is not None
        if call.leader is not None and not self.policy.per_unit:
            return call.leader
        if self.policy.branches_agree and call.branch == "uncond":
            step, branch, computed = generation.decided.get(self.expert, (-1, "", False))
            if step == call.step and branch != "uncond":
                return computed, "cond"
        limit = self.exhausted(state)
        if limit is not None:
            return True, limit
        if mask is not None:
            return mask[call.step], "policy"
        return agreed(self.policy.should_compute(context), context.hidden, self.group), "policy"

    def remember(
        self,
        context: Context,
        state: UnitState,
        generation: Generation,
        computed: bool,
        reason: str,
        joined: Tensor,
        out: Tensor,
    ) -> None:
        """Update what the unit keeps; after the expert's last step, keep nothing. The policy may
        start from a warm residual, which is this step's, as from a computed one.
        """
        if context.unit_index == 0 or self.policy.per_unit:
            self.policy.record(context, computed or reason == "warm")
        state.run = 0 if computed else state.run + 1
        state.skipped += not computed
        if context.step == generation.ends[self.expert] - 1:
            state.drop()
        elif computed and not self.whole and generation.wanted(self.expert, context.step):
            self.settings.forecaster.observe(context, out - joined)

    def context(
        self, call: Call, state: UnitState, index: int, work: Work, names: list[str]
    ) -> Context:
        inputs = work.named(names)
        return Context(
            expert=self.expert,
            branch=call.branch,
            step=call.step,
            num_steps=call.num_steps,
            sigma=call.sigma,
            timestep=call.timestep,
            unit_index=index,
            num_units=self.num_units,
            hidden=work.hidden,
            encoder_hidden=inputs.get("encoder_hidden_states"),
            e0=inputs.get("temb"),
            probe_residual=call.probe_residual,
            latents=call.latents,
            policy=self.policy,
            state=state,
        )


def agreed(computed: bool, like: Tensor, group: Any) -> bool:
    """Whether any rank of a group that shares this forward computes: ranks that decide apart wait
    for each other forever.
    """
    if group is None:
        return computed
    import torch

    vote = torch.tensor([int(computed)], device=like.device)
    torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, group)
    return bool(vote.item())


def now(like: Tensor) -> float:
    """Seconds, once the device of `like` has caught up."""
    if like.device.type == "cuda":
        import torch

        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def needed(certain: list[bool], kept: list[bool], tensors: int) -> list[bool]:
    """Which steps' residuals a later skip can still use.

    certain: steps that no forecast will be asked for. kept: those of them that are sure to compute.
    A residual is of no use once `tensors` newer ones are sure to come before the next skip.
    """
    result, newer = [], None  # residuals sure to come between here and the next skip
    for fixed, computed in zip(reversed(certain), reversed(kept), strict=True):
        result.append(newer is not None and newer < tensors)
        if not fixed:
            newer = 0
        elif newer is not None:
            newer += computed
    return result[::-1]
