"""What a few uncached runs tell of a model. Letters: T steps, W distances back to an earlier step.

Runs go through the denoising loop as it is. Torch hooks look at what enters and leaves the blocks,
and the layers behind them run again on residuals of earlier steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditcache.cache.attach import attach_settings, blocks_of, disable_cache, replace_blocks
from ditcache.cache.forecasters.fitted import Fitted
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.cache.policies.planned import Planned
from ditcache.cache.settings import CacheSettings
from ditcache.models.base import Bundle, layout_of
from ditcache.pipeline.callbacks import Callback, Step
from ditcache.pipeline.denoise import denoise
from ditcache.pipeline.inputs import Inputs
from ditcache.store.device import DeviceStore

BRANCHES = ("cond", "uncond")  # in the order in which the loop runs them


@dataclass
class Measured:
    """One uncached run.

    latents: the final ones. sigmas [T]. starts: first step of each expert, and of a new shape.
    change, ratio: per branch, [T]: relative L1 change of the output from the step before, and mean
    over tokens of |R_s| / |R_s-1|; NaN at the starts. gram [T, W, W]: entry (t, i, j) is the inner
    product of what it does to the guided output of step t to put the residual of step t-1-i, or
    t-1-j, in place of its own.
    """

    latents: Tensor
    sigmas: list[float]
    starts: list[int]
    change: dict[str, list[float]]
    ratio: dict[str, list[float]]
    gram: np.ndarray


def measure(
    bundle: Bundle, inputs: Inputs, *, window: int, sampling: dict[str, Any], on_step: Callback
) -> Measured:
    """Run once without a cache and look. sampling: keywords of `denoise`."""
    watch = Watch(window)
    gram = np.zeros((sampling["steps"], window, window))
    sigmas: list[float] = []
    starts: list[int] = []

    def look(step: Step) -> None:
        if watch.anew:
            starts.append(step.index)
        sigmas.append(step.sigma)
        low = step.expert == "transformer_2" and sampling["guidance_low"] is not None
        effects = watch.guided(sampling["guidance_low" if low else "guidance"])
        if effects:
            flat = torch.stack(effects).flatten(1).double()
            gram[step.index, : len(flat), : len(flat)] = (flat @ flat.T).cpu().numpy()
        watch.turn, watch.effects = 0, []
        on_step(step)

    with watch.hooks(bundle):
        latents = denoise(bundle, inputs, **sampling, callbacks=[look])
    return Measured(latents, sigmas, starts, watch.change, watch.ratio, gram)


@dataclass
class Watch:
    """Hooks on the experts, and what they have seen.

    effects: of the step under way, per branch and distance. anew: nothing of an earlier step is of
    any use at this one. memory: per expert and branch, the output of the step before and residuals,
    newest first, on the CPU.
    """

    window: int
    turn: int = 0  # forwards made at this step
    anew: bool = True
    effects: list[list[Tensor]] = field(default_factory=list)
    change: dict[str, list[float]] = field(default_factory=dict)
    ratio: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[tuple[str, str], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    @contextmanager
    def hooks(self, bundle: Bundle) -> Iterator[None]:
        handles = []
        for name, expert in bundle.experts.items():
            seen: dict[str, Tensor] = {}
            blocks = blocks_of(expert)
            handles += [
                blocks[0].register_forward_pre_hook(keep(seen, "before")),
                blocks[-1].register_forward_hook(keep(seen, "after")),
                expert.register_forward_hook(self.note(name, seen), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, expert: str, seen: dict[str, Tensor]) -> Callable[..., None]:
        """What to do after a forward of `expert`."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            branch = BRANCHES[self.turn]
            self.turn += 1
            sample, residual = output[0], seen["after"] - seen["before"]
            before, residuals = self.memory.get((expert, branch), (None, []))
            if residuals and residuals[0].shape != residual.shape:  # frames were dropped
                before, residuals = None, []
            self.anew = not residuals
            nan = float("nan")
            self.change.setdefault(branch, []).append(
                nan if before is None else float((sample - before).abs().mean() / size(before))
            )
            self.ratio.setdefault(branch, []).append(
                shrunk(residual, residuals[0].to(residual.device)) if residuals else nan
            )
            self.effects.append(
                [(replay(module, args, kwargs, r) - sample).float() for r in residuals]
            )
            self.memory[expert, branch] = (sample, [residual.cpu(), *residuals[: self.window - 1]])

        return hook

    def guided(self, strength: float) -> list[Tensor]:
        """Effects on uncond + strength * (cond - uncond), per distance."""
        if len(self.effects) < 2:
            return self.effects[0]
        pairs = zip(*self.effects, strict=True)
        return [strength * cond - (strength - 1) * uncond for cond, uncond in pairs]


def keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: Any = None) -> None:
        seen[name] = args[0] if name == "before" else output

    return hook


def size(value: Tensor) -> Tensor:
    return value.float().abs().mean()


def shrunk(residual: Tensor, before: Tensor) -> float:
    """mean over tokens of |R_s| / |R_s-1|."""
    return float((residual.float().norm(dim=-1) / before.float().norm(dim=-1)).mean())


class Injected(nn.Module):
    """Stands for all blocks: adds a given residual."""

    def __init__(self, residual: Tensor):
        super().__init__()
        self.residual = residual

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden + self.residual.to(hidden.device)


def replay(expert: nn.Module, args: tuple, kwargs: dict[str, Any], residual: Tensor) -> Tensor:
    """The expert's output for the same input if its blocks added `residual`."""
    blocks, path = blocks_of(expert), layout_of(expert)[0].path
    replace_blocks(expert, path, nn.ModuleList([Injected(residual)]))
    try:
        return expert.forward(*args, **kwargs)[0]
    finally:
        replace_blocks(expert, path, blocks)


@dataclass
class SkipOne(Policy):
    """Compute every step but one."""

    step: int = 1

    def mask(self, schedule: Schedule) -> list[bool]:
        return [step != self.step for step in range(schedule.num_steps)]


def damage(
    bundle: Bundle,
    inputs: Inputs,
    reference: Tensor,
    *,
    step: int,
    sampling: dict[str, Any],
    on_step: Callback,
) -> float:
    """Mean squared error of the final latents when one step takes a straight line's forecast."""
    settings = CacheSettings(SkipOne(step), Taylor(order=1), head=0, tail=0)
    latents = with_cache(bundle, inputs, settings, sampling, on_step)
    return float((latents - reference).float().square().mean())


def render(
    bundle: Bundle,
    inputs: Inputs,
    mask: list[bool],
    weights: list[list[float]],
    *,
    sampling: dict[str, Any],
    on_step: Callback,
) -> Tensor:
    """Final latents with a plan: weights of the last computed residuals at each skipped step."""
    policy = Planned(compute=sum(mask))
    marks = "".join("#" if computed else "." for computed in mask)
    policy.plan = {"mask": marks, "weights": weights, "sigmas": []}
    settings = CacheSettings(policy, Fitted(), head=0, tail=0)
    return with_cache(bundle, inputs, settings, sampling, on_step)


def with_cache(
    bundle: Bundle,
    inputs: Inputs,
    settings: CacheSettings,
    sampling: dict[str, Any],
    on_step: Callback,
) -> Tensor:
    attach_settings(bundle, settings, DeviceStore())
    try:
        return denoise(bundle, inputs, **sampling, callbacks=[on_step])
    finally:
        disable_cache(bundle)
