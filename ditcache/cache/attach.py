"""Puts a step cache on a transformer, a diffusers pipeline or a bundle, and takes it off again.

One `ModelHook` on the transformer's root learns step and branch from diffusers' `cache_context`;
the block list is replaced on the instance by one that yields units. Classes are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from ditcache.cache.driver import Call, Driver, Run
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.cache.settings import CacheSettings, read_settings
from ditcache.cache.trace import Trace
from ditcache.cache.units import UnitList, partition
from ditcache.errors import DitcacheError
from ditcache.models.base import block_list_name
from ditcache.store.base import Store
from ditcache.store.device import DeviceStore

HOOK = "ditcache_step_cache"


class StepCache:
    """The step cache of one pipeline: one driver per expert, one run over all of them."""

    def __init__(
        self, settings: CacheSettings, store: Store, schedule_of: Callable[[int], Schedule]
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
        """JSON-serialisable: settings, per expert/branch/unit counts, signals and bytes, and the
        store's counters.
        """
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


class StepCacheHook(ModelHook):
    """Marks the beginning and end of each forward for the driver."""

    _is_stateful = True

    def __init__(self, cache: StepCache, driver: Driver):
        super().__init__()
        self.cache, self.driver = cache, driver
        self.contexts = StateManager(BaseState)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            context = self.contexts.context
        except ValueError:  # none is set
            context = None
        if context is None or context.step_index is None or context.num_inference_steps is None:
            raise DitcacheError(
                "step cache: the pipeline does not say which step and branch this forward is; call "
                "the transformer inside `transformer.cache_context('cond', step_index=..., "
                "num_inference_steps=...)`"
            )
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        call = Call(
            context.name, context.step_index, context.num_inference_steps, context.sigma, timestep
        )
        self.driver.begin_call(call, self.cache.schedule_of)
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.driver.end_call()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers pipelines call this when a run has ended."""
        self.cache.run.end()
        return module


def enable_cache(
    target: Any,
    policy: str | Policy = "taylorseer",
    forecaster: str | Forecaster | None = None,
    granularity: int | str | None = None,
    store: Store | None = None,
    **knobs: Any,
) -> StepCache:
    """Put a step cache on `target`: a diffusers pipeline, a bundle from `ditcache.load`, or one
    transformer.

    policy: an option of conf/cache ("taylorseer"), a name given to `@register_policy`, or an
    instance. knobs: keys of the policy or of `CacheSettings` (head, tail, max_skips, budget).
    Nothing is attached unless everything is.

    Raises ConfigError for wrong names or values, DitcacheError if a cache is already there or there
    are no blocks.
    """
    if granularity is not None:
        knobs["granularity"] = granularity
    settings = read_settings(policy, forecaster, dict(knobs))
    return attach_settings(target, settings, store or DeviceStore())


def attach_settings(target: Any, settings: CacheSettings, store: Store) -> StepCache:
    """`enable_cache` for settings that are already checked."""
    cache = StepCache(settings, store, schedule_reader(target))
    cache.experts = experts_of(target)
    if settings.policy is None:
        return cache
    for transformer in cache.experts.values():
        existing = hook_of(transformer)
        if existing is not None:
            raise DitcacheError(
                "enable_cache: this transformer already has a cache "
                f"({existing.cache.settings.name}); call disable_cache first"
            )
    check_fit(target, settings)
    cache.attach()
    return cache


def check_fit(target: Any, settings: CacheSettings) -> None:
    """Whether these settings can go onto `target`; attaches nothing. Raises DitcacheError with what
    would fit.
    """
    if settings.policy is not None:
        for transformer in experts_of(target).values():
            units_of(transformer, settings)


def disable_cache(target: Any) -> None:
    """Take the step cache off `target` and free what it keeps; does nothing where there is none."""
    for transformer in experts_of(target).values():
        hook = hook_of(transformer)
        if hook is not None:
            hook.cache.detach()


def experts_of(target: Any) -> dict[str, nn.Module]:
    """Expert name -> transformer: `transformer`, and `transformer_2` where a pipeline has two."""
    target = getattr(target, "pipe", target)
    if isinstance(target, nn.Module):
        return {"transformer": target}
    names = ("transformer", "transformer_2")
    experts = {name: part for name in names if (part := getattr(target, name, None)) is not None}
    if not experts:
        raise DitcacheError(f"enable_cache: {type(target).__name__} has no transformer")
    return experts


def schedule_reader(target: Any) -> Callable[[int], Schedule]:
    """How to learn a run's sigmas: from the pipeline's scheduler, if there is one."""
    pipe = getattr(target, "pipe", target)

    def read(num_steps: int) -> Schedule:
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or getattr(scheduler, "num_inference_steps", None) != num_steps:
            return Schedule(num_steps)
        return Schedule(num_steps, sigmas=tuple(scheduler.sigmas[:num_steps].tolist()))

    return read


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    blocks = getattr(transformer, block_list_name(transformer), None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise DitcacheError(f"enable_cache: {type(transformer).__name__} has no blocks to cache")
    return blocks


def units_of(transformer: nn.Module, settings: CacheSettings) -> list[range]:
    """The spans of blocks that are cached as one, for this transformer."""
    assert settings.policy is not None
    try:
        return partition(len(blocks_of(transformer)), settings.policy.probe, settings.granularity)
    except ValueError as error:
        raise DitcacheError(f"cache.{error}") from None


def attach_expert(name: str, transformer: nn.Module, cache: StepCache) -> None:
    spans = units_of(transformer, cache.settings)
    driver = Driver(name, cache.settings, cache.run, len(spans))
    assert cache.settings.policy is not None
    units = UnitList(blocks_of(transformer), driver, cache.settings.policy.probe, spans)
    setattr(transformer, block_list_name(transformer), units)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(StepCacheHook(cache, driver), HOOK)


def detach_expert(transformer: nn.Module) -> None:
    units = blocks_of(transformer)
    if isinstance(units, UnitList):
        setattr(transformer, block_list_name(transformer), units.original)
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(HOOK, recurse=False)


def hook_of(transformer: nn.Module) -> StepCacheHook | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK)
    return hook if isinstance(hook, StepCacheHook) else None
