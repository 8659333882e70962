"""Puts a step cache on a transformer, a diffusers pipeline or a bundle, and takes it off again.

The block list is replaced on the instance by one that yields units. A stateful diffusers hook on
that list learns step and branch from `cache_context`; torch's own forward hooks on the transformer
mark the beginning and end of each forward. `transformer.forward` itself is left alone, because
offload hooks of accelerate and diffusers wrap and restore it. Classes are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.driver import Call, Driver, Run
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.cache.schedule import calibration_of, schedule_reader
from ditcache.cache.settings import CacheSettings, read_settings
from ditcache.cache.trace import Trace
from ditcache.cache.units import UnitList, partition
from ditcache.errors import DitcacheError
from ditcache.models.base import block_list_name, transformers_of
from ditcache.store.base import Store
from ditcache.store.device import DeviceStore

HOOK = "ditcache_step_cache"


class StepCache:
    """The step cache of one pipeline: one driver per expert, one run over all of them."""

    def __init__(
        self, settings: CacheSettings, store: Store, schedule_of: Callable[[str, int], Schedule]
    ):
        self.settings, self.store, self.schedule_of = settings, store, schedule_of
        self.run = Run(store)
        self.experts: dict[str, nn.Module] = {}

    @property
    def trace(self) -> Trace:
        """Decisions of the current or last generation."""
        return self.run.trace

    @property
    def stats(self) -> dict[str, Any]:
        """JSON-serialisable: settings, counts, signals and bytes per unit, the store's counters."""
        return {
            "policy": self.settings.name,
            "forecaster": type(self.settings.forecaster).__name__,
            "granularity": self.settings.granularity,
            "units": self.trace.stats(),
            "store": self.store.stats(),
        }

    def attach(self) -> None:
        for name, transformer in self.experts.items():
            attach_expert(name, transformer, self)

    def detach(self) -> None:
        self.run.end()
        for transformer in self.experts.values():
            detach_expert(transformer)


class ContextHook(ModelHook):
    """Receives diffusers' cache context, and word that a run has ended. Sits on the block list."""

    _is_stateful = True

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.contexts = run, StateManager(BaseState)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers pipelines call this at the end of a run."""
        self.run.end()
        return module


class ForwardHooks:
    """Torch hooks that tell the driver when the expert's forward begins and ends."""

    def __init__(self, cache: StepCache, driver: Driver, context: ContextHook):
        self.cache, self.driver, self.context = cache, driver, context

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise DitcacheError("step cache: gradient checkpointing would recompute skipped blocks")
        try:
            context = self.context.contexts.context
        except ValueError:  # none is set
            context = None
        if context is None or context.step_index is None or context.num_inference_steps is None:
            raise DitcacheError(
                "step cache: the pipeline does not say which step and branch this forward is; call "
                "the transformer inside `transformer.cache_context('cond', step_index=..., "
                "num_inference_steps=...)`"
            )
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        latents = kwargs.get("hidden_states", args[0] if args else None)
        channels = getattr(getattr(module, "config", None), "out_channels", None)
        if latents is not None and channels is not None:
            latents = latents[:, :channels]  # the noisy ones; conditioning stands behind them
        call = Call(
            context.name,
            context.step_index,
            context.num_inference_steps,
            context.sigma,
            timestep,
            latents,
        )
        self.driver.begin_call(call, self.cache.schedule_of)

    def end(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Returns another output where the driver puts one in place of the transformer's."""
        sample = output if output is None or isinstance(output, torch.Tensor) else output[0]
        instead = self.driver.end_call(sample)
        if instead is None:
            return None
        if isinstance(output, tuple):
            return (instead, *output[1:])
        return instead if isinstance(output, torch.Tensor) else type(output)(sample=instead)


def enable_cache(
    target: Any,
    policy: str | Policy = "taylorseer",
    forecaster: str | Forecaster | None = None,
    granularity: int | str | None = None,
    store: Store | None = None,
    cfg: str | CfgDelta | None = None,
    **knobs: Any,
) -> StepCache:
    """Put a step cache on `target`: a diffusers pipeline, a bundle from `ditcache.load`, or one
    transformer.

    policy: an option of conf/cache ("taylorseer"), a name given to `@register_policy`, or an
    instance. cfg: "delta" also skips the uncond branch on some steps. knobs: keys of the policy or
    of `CacheSettings` (head, tail, max_skips, budget). Nothing is attached unless everything is.

    Raises ConfigError for wrong names or values, DitcacheError if a cache is already there or there
    are no blocks.
    """
    if granularity is not None:
        knobs["granularity"] = granularity
    settings = read_settings(policy, forecaster, dict(knobs), cfg)
    return attach_settings(target, settings, DeviceStore() if store is None else store)


def attach_settings(target: Any, settings: CacheSettings, store: Store) -> StepCache:
    """`enable_cache` for settings that are already checked."""
    experts = experts_of(target)
    if settings.policy is None:
        return StepCache(settings, store, schedule_reader(target))
    settings = replace(settings, policy=settings.policy.fitted(calibration_of(target)))
    cache = StepCache(settings, store, schedule_reader(target))
    cache.experts = experts
    for transformer in experts.values():
        refuse_second_cache(transformer)
        units_of(transformer, settings)
    cache.attach()
    return cache


def refuse_second_cache(transformer: nn.Module) -> None:
    blocks = blocks_of(transformer)
    if isinstance(blocks, UnitList):
        name = blocks.driver.settings.name
        raise DitcacheError(
            f"enable_cache: this transformer already has a cache ({name}); call disable_cache first"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise DitcacheError(
            "enable_cache: this transformer has one of diffusers' own caches; call "
            "transformer.disable_cache() first"
        )


def check_fit(target: Any, settings: CacheSettings) -> None:
    """Whether these settings can go onto `target`; attaches nothing. Raises DitcacheError with what
    would fit.
    """
    if settings.policy is not None:
        settings.policy.fitted(calibration_of(target))
        for transformer in experts_of(target).values():
            units_of(transformer, settings)


def disable_cache(target: Any) -> None:
    """Take the step cache off `target` and free what it keeps; does nothing where there is none."""
    for transformer in experts_of(target).values():
        blocks = blocks_of(transformer)
        if isinstance(blocks, UnitList):
            blocks.cache.detach()


def experts_of(target: Any) -> dict[str, nn.Module]:
    """Expert name -> transformer: `transformer`, and `transformer_2` where a pipeline has two."""
    target = getattr(target, "pipe", target)
    experts = {"transformer": target} if isinstance(target, nn.Module) else transformers_of(target)
    if not experts:
        raise DitcacheError(f"enable_cache: {type(target).__name__} has no transformer")
    return experts


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    blocks = getattr(transformer, block_list_name(transformer), None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise DitcacheError(f"enable_cache: {type(transformer).__name__} has no blocks to cache")
    return blocks


def units_of(transformer: nn.Module, settings: CacheSettings) -> list[range]:
    """The spans of blocks that are cached as one, for this transformer."""
    assert settings.policy is not None
    try:
        always = (settings.policy.probe, settings.policy.back)
        return partition(len(blocks_of(transformer)), *always, settings.granularity)
    except ValueError as error:
        raise DitcacheError(f"cache.{error}") from None


def attach_expert(name: str, transformer: nn.Module, cache: StepCache) -> None:
    spans = units_of(transformer, cache.settings)
    driver, context = Driver(name, cache.settings, cache.run, len(spans)), ContextHook(cache.run)
    forwards = ForwardHooks(cache, driver, context)
    handles = (
        transformer.register_forward_pre_hook(forwards.begin, with_kwargs=True),
        transformer.register_forward_hook(forwards.end, always_call=True),
    )
    units = UnitList(blocks_of(transformer), cache, driver, spans, handles)
    HookRegistry.check_if_exists_or_initialize(units).register_hook(context, HOOK)
    replace_blocks(transformer, units)


def detach_expert(transformer: nn.Module) -> None:
    units = blocks_of(transformer)
    if isinstance(units, UnitList):
        for handle in units.handles:
            handle.remove()
        replace_blocks(transformer, units.original)


def replace_blocks(transformer: nn.Module, blocks: nn.ModuleList) -> None:
    """Set the block list; diffusers remembers which children carry hooks and must look again."""
    setattr(transformer, block_list_name(transformer), blocks)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
