"""Which step and branch a forward is, where the pipeline says only a part of it, or nothing.

The step is the scheduler's; the branch is told by the text, which a pipeline encodes once per run.
Never by counting calls: pipelines skip the uncond call, or make it first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditcache.errors import DitcacheError

BRANCHES = ("cond", "uncond")  # without names: in the order in which the first step calls them
ADVICE = (
    "call the transformer inside `transformer.cache_context('cond', step_index=..., "
    "num_inference_steps=...)`"
)


@dataclass(slots=True)
class Where:
    """One forward's place in its run. begins: it is known to be the first of a new run."""

    branch: str
    step: int
    num_steps: int
    sigma: float | None = None
    begins: bool = False


@dataclass
class Finder:
    """Finds the place of every forward of one pipeline's experts.

    timesteps: the scheduler's, of the run under way; it makes new ones for every run, so that
    another object means another run. first: index of the run's first step among them, not 0 where
    a pipeline starts from a noised video. texts: what each branch was called with.
    """

    pipe: Any
    timesteps: Tensor | None = None
    first: int = 0
    texts: list[Tensor] = field(default_factory=list)
    seen: tuple[int, set[str]] = (-1, set())  # step, and the branches called at it

    def find(self, context: Any, inputs: dict[str, Any]) -> Where:
        """context: diffusers' `CacheContext`, or None. inputs: the transformer's, by name.

        Raises DitcacheError where step or branch cannot be known.
        """
        if context and None not in (context.step_index, context.num_inference_steps):
            return Where(
                context.name, context.step_index, context.num_inference_steps, context.sigma
            )
        begins = self.follow(inputs.get("timestep"))
        assert self.timesteps is not None
        index = getattr(self.pipe.scheduler, "step_index", None)
        step = 0 if index is None else index - self.first
        num_steps = len(self.timesteps) - self.first
        if not 0 <= step < num_steps:
            raise DitcacheError(
                f"step cache: the scheduler is at step {step} of {num_steps}, so this forward is "
                f"none of its run's; {ADVICE}"
            )
        if self.seen[0] != step:
            self.seen = (step, set())
        branch = context.name if context else self.branch_of(step, inputs)
        if branch in self.seen[1]:
            raise DitcacheError(
                f"step cache: the branch {branch} was there already at step {step} of the "
                f"pipeline's scheduler, which does not seem to be this run's; {ADVICE}"
            )
        self.seen[1].add(branch)
        return Where(branch, step, num_steps, begins=begins)

    def follow(self, timestep: Tensor | None) -> bool:
        """Whether the scheduler has begun another run; then its first step is looked up."""
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or not hasattr(scheduler, "step_index"):
            raise DitcacheError(
                "step cache: neither the pipeline nor a scheduler says which step and branch this "
                f"forward is; {ADVICE}"
            )
        if timesteps is self.timesteps:
            return False
        self.timesteps, self.texts, self.seen = timesteps, [], (-1, set())
        self.first = first_step(scheduler, timesteps, timestep)
        return True

    def branch_of(self, step: int, inputs: dict[str, Any]) -> str:
        """By the text alone."""
        text = inputs.get("encoder_hidden_states")
        if text is None:
            raise DitcacheError(
                f"step cache: the pipeline does not name its branches, and there is no text to "
                f"tell them by; {ADVICE}"
            )
        known = [i for i, kept in enumerate(self.texts) if kept is text]
        if not known and step == 0 and len(self.texts) < len(BRANCHES):
            known = [len(self.texts)]
            self.texts.append(text)
        if not known:  # made anew for this call: compare what it says, which waits for the device
            known = [i for i, kept in enumerate(self.texts) if same(kept, text)]
        free = [BRANCHES[i] for i in known if BRANCHES[i] not in self.seen[1]]
        if not free:
            why = "was there already" if known else "is none of the first step's"
            raise DitcacheError(
                f"step cache: the pipeline does not name its branches, and this forward's text "
                f"{why}, at step {step}; {ADVICE}"
            )
        return free[0]

    def forget(self) -> None:
        """Let go of the texts once a run is over."""
        self.texts = []


def first_step(scheduler: Any, timesteps: Tensor, timestep: Tensor | None) -> int:
    """Index of a run's first timestep among the scheduler's. Waits for the device once per run.

    Some transformers take the timestep as a share of the training range.
    """
    if scheduler.begin_index is not None:
        return int(scheduler.begin_index)
    if timestep is None:
        return 0
    value = float(timestep.float().max())  # one per token: those that are noisy
    train = float(scheduler.config.num_train_timesteps)
    precision = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    for scale in (1.0, train):
        near = (timesteps.float().cpu() - value * scale).abs()
        found = (near == near.min()).nonzero().flatten().tolist()
        index = found[min(1, len(found) - 1)]  # of two alike the second, as schedulers count
        if float(near[index]) <= max(1e-3, precision) * max(1.0, value * scale):
            return index
    raise DitcacheError(
        f"step cache: timestep {value:g} is none of the scheduler's, so the step is not known; "
        f"{ADVICE}"
    )


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))
