"""Arms: one setting of one method each, put on a bundle and taken off again.

An arm's settings are plain data, so that they can be written down and compared. `attached` is the
same for everyone: a context in which the method is on, yielding a function that says how many bytes
of state it keeps at that moment (None: not known). Every video gets a fresh attachment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bench import cache_dit_arm
from bench.state import bytes_of
from diffusers import hooks
from diffusers.hooks.hooks import StateManager

import ditcache
from ditcache.cache.calibration import load_calibration
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.forecasters.hermite import Hermite
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.forecasters.two_anchor import TwoAnchor
from ditcache.cache.schedule import calibration_of
from ditcache.errors import ConfigError

FORECASTERS = {"hold": Hold, "taylor": Taylor, "two_anchor": TwoAnchor, "hermite": Hermite}
UNSAID = (
    "policy",
    "config",
    "num_inference_steps",
    "steps",
    "cache_identifiers",
    "use_lite_mode",
)
Kept = Callable[[], int | None]


@dataclass(frozen=True)
class Arm:
    """who: ditcache, diffusers, cache-dit or control. method: what its settings compete within.
    settings: what the library takes, in words that JSON knows.
    """

    who: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.who} {json.dumps(self.settings, sort_keys=True)}"

    @property
    def name(self) -> str:
        shown = {k: v for k, v in self.settings.items() if k not in UNSAID}
        if "skip" in shown:  # run lengths, as a picture
            shown["compute"] = picture(shown["compute"], shown.pop("skip"))
            shown.pop("preset")
        if self.who == "control":
            shown = {}  # the method says it
        return " ".join([self.method, *(f"{key}={short(value)}" for key, value in shown.items())])

    def attached(self, bundle: Any, spans: list[range]) -> Any:
        return ATTACH[self.who](bundle, self.settings, spans)


def short(value: Any) -> str:
    if isinstance(value, dict):
        rest = ",".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value['name']}({rest})" if "name" in value else f"({rest})"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(compute: list[int], skip: list[int]) -> str:
    """Run lengths -> `#` computed, `.` skipped."""
    gaps = [*skip, *[0] * (len(compute) - len(skip))]
    return "".join("#" * c + "." * s for c, s in zip(compute, gaps, strict=True))


@contextmanager
def nothing(bundle: Any, settings: dict[str, Any], spans: list[range]) -> Iterator[Kept]:
    yield lambda: 0


@contextmanager
def ditcache_cache(bundle: Any, settings: dict[str, Any], spans: list[range]) -> Iterator[Kept]:
    """Ours. A forecaster or cfg given as a dictionary is built with those settings. low_share: the
    low-noise expert's threshold as a share of the other's.
    """
    settings = dict(settings)
    if isinstance(settings.get("forecaster"), dict):
        knobs = dict(settings["forecaster"])
        settings["forecaster"] = FORECASTERS[knobs.pop("name")](**knobs)
    share = settings.pop("low_share", None)
    if share is not None:
        settings["low"] = {"threshold": share * settings["threshold"]}
    if isinstance(settings.get("cfg"), dict):
        settings["cfg"] = CfgDelta(**settings["cfg"])
    cache = ditcache.enable_cache(bundle, **settings)
    try:
        yield lambda: cache.store.stats()["bytes_peak"]
    finally:
        ditcache.disable_cache(bundle)


@contextmanager
def diffusers_hooks(bundle: Any, settings: dict[str, Any], spans: list[range]) -> Iterator[Kept]:
    """diffusers' own caches: settings are a config class's fields and its name."""
    experts = list(bundle.experts.values())
    with ExitStack() as stack:
        for transformer, span in zip(experts, spans, strict=True):
            fields = own(settings, span)
            name = fields.pop("config")
            if name == "MagCacheConfig" and "mag_ratios" not in fields:
                fields["mag_ratios"] = magnitudes(bundle, span, spans[-1].stop)
            if name == "TaylorSeerCacheConfig":
                fields["taylor_factors_dtype"] = transformer.dtype  # bfloat16 loses precision
            transformer.enable_cache(getattr(hooks, name)(**fields))
            stack.callback(transformer.disable_cache)
        yield lambda: bytes_of([hook_states(transformer) for transformer in experts])


def own(settings: dict[str, Any], span: range) -> dict[str, Any]:
    """A peer's settings for one expert: peers count the calls of each transformer by themselves."""
    settings = dict(settings)
    for key in ("steps", "num_inference_steps"):
        if key in settings:
            settings[key] = len(span)
    if "disable_cache_after_step" in settings:
        settings["disable_cache_after_step"] = len(span) - 1
    for key in ("mask", "mag_ratios"):
        if key in settings:
            settings[key] = settings[key][span.start : span.stop]
    low = settings.pop("warmup_low", None)
    if low is not None and span.start:
        settings["warmup"] = low
    return settings


def magnitudes(bundle: Any, span: range, steps: int) -> list[float]:
    """Our calibration's ratios. diffusers keeps one state per branch and counts its steps, so one
    curve serves both.
    """
    name = calibration_of(bundle)
    known = load_calibration(name).magcache if name else {}
    if "cond" not in known or known["steps"] != steps:
        raise ConfigError(f"calibration: no magnitude ratios for {steps} steps of this model")
    return [float(ratio) for ratio in known["cond"][span.start : span.stop]]


@contextmanager
def cache_dit(bundle: Any, settings: dict[str, Any], spans: list[range]) -> Iterator[Kept]:
    """cache-dit's, once per expert."""
    with ExitStack() as stack:
        kept = [
            stack.enter_context(cache_dit_arm.attached(transformer, own(settings, span)))
            for transformer, span in zip(bundle.experts.values(), spans, strict=True)
        ]
        yield lambda: sum(one() or 0 for one in kept)


def hook_states(transformer: torch.nn.Module) -> list[Any]:
    """What diffusers' hooks keep: one dictionary of states per state manager."""
    registries = [m._diffusers_hook for m in transformer.modules() if hasattr(m, "_diffusers_hook")]
    own = [hook for registry in registries for hook in registry.hooks.values()]
    managers = [
        value for hook in own for value in vars(hook).values() if isinstance(value, StateManager)
    ]
    return [manager._state_cache for manager in managers]


ATTACH = {
    "control": nothing,
    "ditcache": ditcache_cache,
    "diffusers": diffusers_hooks,
    "cache-dit": cache_dit,
}
