"""Puts a step cache on a transformer, a diffusers pipeline or a bundle, and takes it off again.

Block lists are replaced on the instance by ones that yield units. Classes are never touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext
from torch import nn
from torch.utils.hooks import RemovableHandle

from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.driver import Driver
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.hooks import COMPILE, ContextHook, ForwardHooks
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.cache.run import Run
from ditcache.cache.schedule import calibration_of, schedule_reader
from ditcache.cache.settings import LOW, CacheSettings, read_settings
from ditcache.cache.trace import Trace
from ditcache.cache.units import UnitList, partition
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.cache.where import Finder
from ditcache.errors import ConfigError, DitcacheError, one_of
from ditcache.models.base import Blocks, layout_of, transformers_of
from ditcache.store.base import Store
from ditcache.store.device import DeviceStore

HOOK = "ditcache_step_cache"


@dataclass
class StepCache:
    """The step cache of one pipeline: one driver per expert, one run over all of them."""

    settings: CacheSettings
    store: Store
    schedule_of: Callable[[str, int], Schedule]
    finder: Finder
    experts: dict[str, nn.Module] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    contexts: list[ContextHook] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = Run(self.store)

    @property
    def trace(self) -> Trace:
        """Decisions of the current or last generation."""
        return self.run.trace

    @property
    def stats(self) -> dict[str, Any]:
        """JSON-serialisable: settings, counts, signals and bytes per unit, the store's counters."""
        low = self.settings.low
        return {
            **self.settings.names,
            **({} if low is None else {"low": low.names}),
            "units": self.trace.stats(),
            "store": self.store.stats(),
        }

    @contextmanager
    def at(
        self, branch: str, step_index: int, num_inference_steps: int, sigma: float | None = None
    ) -> Iterator[None]:
        """For a denoising loop of one's own around a model without diffusers' `cache_context`: says
        which branch and step the forwards inside are.
        """
        where = CacheContext(branch, step_index, num_inference_steps, sigma=sigma)
        try:
            for hook in self.contexts:
                hook.contexts.set_context(where)
            yield
        finally:
            for hook in self.contexts:
                hook.contexts.set_context(None)

    @contextmanager
    def one_video(self) -> Iterator[None]:
        """The pipeline's runs inside are segments of one video: later ones may start with residuals
        of earlier ones, if there is a `warmstart`. All else is forgotten after each, as always.
        """
        with self.run.one_video():
            yield

    def detach(self) -> None:
        """Take it off and free what it keeps."""
        self.run.end()
        self.finder.forget()
        for handle in self.handles:
            handle.remove()
        for transformer in self.experts.values():
            for name, units in unit_lists(transformer).items():
                replace_blocks(transformer, name, units.original)


def enable_cache(
    target: Any,
    policy: str | Policy = "taylorseer",
    forecaster: str | Forecaster | None = None,
    granularity: int | str | None = None,
    store: Store | None = None,
    cfg: str | CfgDelta | None = None,
    warmstart: str | WarmStart | None = None,
    low: dict[str, Any] | None = None,
    blocks: str | None = None,
    group: Any = None,
    **knobs: Any,
) -> StepCache:
    """Put a step cache on `target`: a diffusers pipeline, a bundle from `ditcache.load`, or one
    transformer.

    policy: an option of conf/cache ("taylorseer"), a name given to `@register_policy`, or an
    instance. cfg: "delta" also skips the uncond branch on some steps. warmstart: "reuse" lets runs
    inside `with cache.one_video()` start with residuals of earlier ones. low: what differs for
    Wan2.2's low-noise expert, e.g. {"threshold": 0.1}. blocks: dotted path of the block list, for a
    transformer that ditcache does not know. group: the torch.distributed group whose ranks share
    every forward (tensor or sequence parallel): a dynamic policy computes on all of them if it does
    on one; None: diffusers' own tensor-parallel group, if any. knobs: keys of the policy or of
    `CacheSettings` (head, tail, max_skips, budget). Nothing is attached unless everything is.

    Raises ConfigError for wrong names or values, DitcacheError if a cache is already there or there
    are no blocks.
    """
    if granularity is not None:
        knobs["granularity"] = granularity
    settings = read_settings(policy, forecaster, dict(knobs), cfg, low, warmstart)
    store = DeviceStore() if store is None else store
    return attach_settings(target, settings, store, blocks, group)


def attach_settings(
    target: Any,
    settings: CacheSettings,
    store: Store,
    blocks: str | None = None,
    group: Any = None,
) -> StepCache:
    """`enable_cache` for settings that are already checked."""
    experts, finder = experts_of(target), Finder(getattr(target, "pipe", target))
    if settings.policy is None:
        return StepCache(settings, store, schedule_reader(target, finder), finder)
    store.open()
    cache = StepCache(settings, store, schedule_reader(target, finder), finder, experts)
    plans, groups = {}, {}
    for name, transformer in experts.items():
        refuse_what_cannot_be(transformer)
        plans[name] = plan_of(target, name, settings, layout_of(transformer, blocks))
        groups[name] = group or parallel_group(transformer)
    cache.settings = next(iter(plans.values())).settings
    if settings.low is not None:
        cache.settings = replace(cache.settings, low=plans[LOW].settings)
    for name, plan in plans.items():
        attach_expert(name, plan, cache, groups[name])
    return cache


def parallel_group(transformer: nn.Module) -> Any:
    """The ranks that hold slices of this transformer, by diffusers' `enable_parallelism`."""
    config: Any = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    if config.context_parallel_config is not None:
        raise DitcacheError(
            "enable_cache: context parallelism splits the tokens inside the first block, so that "
            "its residual is not its own; use tensor parallelism, or split tokens before the blocks"
        )
    return config.tensor_parallel_config._mesh.get_group()


class Plan(NamedTuple):
    """What goes onto one expert. spans: per block list, the blocks that are cached as one."""

    settings: CacheSettings
    layout: tuple[Blocks, ...]
    spans: list[list[range]]


def plan_of(target: Any, expert: str, settings: CacheSettings, layout: tuple[Blocks, ...]) -> Plan:
    """Raises ConfigError or DitcacheError where the settings do not fit this expert."""
    own = settings.of(expert)
    assert own.policy is not None
    if settings.low is not None and len(experts_of(target)) < 2:
        raise ConfigError("cache.low: has no effect, this model has one expert; leave it out")
    policy = own.policy.fitted(calibration_of(target))
    own = replace(own, policy=policy, forecaster=own.forecaster.beside(policy))
    return Plan(own, layout, spans_of(experts_of(target)[expert], layout, own))


def refuse_what_cannot_be(transformer: nn.Module) -> None:
    """A second cache, or a transformer that was compiled as one."""
    if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
        raise DitcacheError(COMPILE)
    for units in unit_lists(transformer).values():
        name = units.driver.settings.name
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
        for name, transformer in experts_of(target).items():
            plan_of(target, name, settings, layout_of(transformer))


def disable_cache(target: Any) -> None:
    """Take the step cache off `target` and free what it keeps; does nothing where there is none."""
    for transformer in experts_of(target).values():
        for units in list(unit_lists(transformer).values())[:1]:
            units.cache.detach()


def experts_of(target: Any) -> dict[str, nn.Module]:
    """Expert name -> transformer: `transformer`, and `transformer_2` where a pipeline has two."""
    target = getattr(target, "pipe", target)
    experts = {"transformer": target} if isinstance(target, nn.Module) else transformers_of(target)
    if not experts:
        raise DitcacheError(f"enable_cache: {type(target).__name__} has no transformer")
    return experts


def unit_lists(transformer: nn.Module) -> dict[str, UnitList]:
    """Path -> what stands in for the block list there."""
    modules = transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, UnitList)}


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """The only block list of a transformer that has one, such as Wan's. Raises DitcacheError for
    others.
    """
    layout = layout_of(transformer)
    if len(layout) > 1 or len(layout[0].returns) > 1:
        raise DitcacheError(f"{type(transformer).__name__}: works on one stream of blocks only")
    return list_at(transformer, layout[0].path)


def list_at(transformer: nn.Module, path: str) -> nn.ModuleList:
    """The block list at a dotted path. Raises DitcacheError with the lists there are."""
    blocks: Any = transformer
    for name in path.split("."):
        blocks = getattr(blocks, name, None)
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return blocks
    modules = transformer.named_modules()
    lists = [name for name, module in modules if isinstance(module, nn.ModuleList) and len(module)]
    what = "is not there" if blocks is None else "is no list of blocks"
    raise DitcacheError(
        f"enable_cache: {type(transformer).__name__} has no blocks to cache: '{path}' {what}. "
        f"{one_of(path, lists)}"
    )


def spans_of(
    transformer: nn.Module, layout: tuple[Blocks, ...], settings: CacheSettings
) -> list[list[range]]:
    """Per block list, the spans of blocks that are cached as one. Raises DitcacheError where the
    settings do not fit.

    Blocks that always run at the front are the first list's, those at the back the last one's.
    """
    policy, granularity = settings.policy, settings.granularity
    assert policy is not None
    if granularity == "output" and (len(layout) > 1 or len(layout[0].returns) > 1):
        raise DitcacheError(
            "cache.granularity: output forecasts what one list of blocks with one stream leads to, "
            f"which {type(transformer).__name__} has not; use stack"
        )
    spans = []
    for number, blocks in enumerate(layout):
        front = policy.probe if number == 0 else 0
        back = policy.back if number == len(layout) - 1 else 0
        try:
            count = len(list_at(transformer, blocks.path))
            spans.append(partition(count, front, back, granularity))
        except ValueError as error:
            raise DitcacheError(f"cache.{error}") from None
    return spans


def attach_expert(name: str, plan: Plan, cache: StepCache, group: Any) -> None:
    transformer = cache.experts[name]
    driver = Driver(name, plan.settings, cache.run, sum(map(len, plan.spans)), group)
    context, first = ContextHook(cache.run, cache.finder), 0
    names = list(inspect.signature(transformer.forward).parameters)
    forwards = ForwardHooks(cache, driver, context, names)
    cache.contexts.append(context)
    cache.handles += [
        transformer.register_forward_pre_hook(forwards.begin, with_kwargs=True),
        transformer.register_forward_hook(forwards.end, always_call=True),
    ]
    for number, (blocks, own) in enumerate(zip(plan.layout, plan.spans, strict=True)):
        original = list_at(transformer, blocks.path)
        units = UnitList(original, cache, driver, blocks, own, first)
        first += len(own)
        if number == 0:
            HookRegistry.check_if_exists_or_initialize(units).register_hook(context, HOOK)
        replace_blocks(transformer, blocks.path, units)


def replace_blocks(transformer: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    """Set a block list; diffusers remembers which children carry hooks and must look again."""
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, blocks)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
