"""The `cache` config group as one checked dataclass, and how a name becomes one without Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.policies.base import REGISTERED, Policy
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.cli import options
from ditcache.config import build, load_yaml
from ditcache.errors import ConfigError, one_of

RULES = ["granularity", "head", "tail", "max_skips", "budget"]
LOW = "transformer_2"  # the low-noise expert, as diffusers calls it


@dataclass
class CacheSettings:
    """When to compute, what stands in, for which units, and the driver's rules that hold for every
    policy.

    policy: None means no cache at all. granularity: `stack` (all blocks as one unit), `per_block`,
    a group size, or `output` (all blocks; forecast is the transformer's output minus its latent
    input, of which little has to be kept). head, tail: steps at the start and end that always
    compute. max_skips: longest run of skipped steps (None: no limit). budget: most steps skipped
    per branch and expert in one generation (None: no limit). cfg: leave out the uncond branch on
    some steps. warmstart: segments of a long video start with residuals of earlier ones. low: all
    of these again, for Wan2.2's low-noise expert; None: the same.
    """

    policy: Policy | None = None
    forecaster: Forecaster = field(default_factory=Hold)
    granularity: int | str = "stack"
    head: int = 1
    tail: int = 1
    max_skips: int | None = None
    budget: int | None = None
    cfg: CfgDelta | None = None
    warmstart: WarmStart | None = None
    low: CacheSettings | None = None

    def __post_init__(self) -> None:
        for name, low in (("head", 0), ("tail", 0), ("max_skips", 0), ("budget", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: must be >= {low}, got {value}")
        if self.granularity not in ("stack", "per_block", "output") and not (
            isinstance(self.granularity, int) and self.granularity >= 1
        ):
            raise ValueError(
                "granularity: must be 'stack', 'per_block', 'output' or a group size >= 1, "
                f"got {self.granularity!r}"
            )
        if self.policy is not None:
            self.forecaster.check(self.policy)
        if self.low is not None and (self.policy is None or self.low.policy is None):
            raise ValueError("low: has no effect without a policy for both experts")
        if self.low is not None and self.low.low is not None:
            raise ValueError("low.low: there is no third expert")

    def of(self, expert: str) -> CacheSettings:
        """The settings of one expert."""
        return self.low if self.low is not None and expert == LOW else self

    def check_effect(self) -> None:
        """Raises ValueError if there is no policy that the other settings could act on."""
        if self.policy is None and self != CacheSettings():
            raise ValueError("cache.policy: without one no setting has an effect; use cache=none")

    def check_segments(self, key: str, segments: int) -> None:
        """key: where these settings are, for the message. Raises ValueError if there is nothing
        that a warm start could come from.
        """
        if self.warmstart is not None and segments == 1:
            raise ValueError(f"{key}.warmstart: has no effect on one segment; set segments > 1")

    @property
    def names(self) -> dict[str, Any]:
        """For reports."""
        return {
            "policy": self.name,
            "forecaster": type(self.forecaster).__name__,
            "granularity": self.granularity,
        }

    @property
    def name(self) -> str:
        return "none" if self.policy is None else type(self.policy).__name__


def read_settings(
    policy: str | Policy,
    forecaster: str | Forecaster | None,
    knobs: dict[str, Any],
    cfg: str | CfgDelta | None = None,
    low: dict[str, Any] | None = None,
    warmstart: str | WarmStart | None = None,
) -> CacheSettings:
    """`enable_cache`'s arguments -> settings: a YAML of conf/cache, a registered class, or an
    instance.

    knobs: keys of the policy, or head, tail, max_skips, budget, granularity. low: those that differ
    for the low-noise expert; with another `policy` nothing is shared. Raises ConfigError for
    unknown ones.
    """
    parts: dict[str, Any] = {"forecaster": forecaster, "cfg": cfg, "warmstart": warmstart}
    settings = read_one(policy, **parts, knobs=knobs)
    if low is None:
        return settings
    shared = {} if "policy" in low else {**parts, **knobs}
    own = {"policy": policy, **dict.fromkeys(parts), **shared, **low}
    parts = {name: own.pop(name) for name in ("policy", *parts)}
    try:
        return replace(settings, low=read_one(**parts, knobs=own))
    except ValueError as error:
        raise ConfigError(f"cache.{error}") from None


def read_one(
    policy: str | Policy,
    forecaster: str | Forecaster | None,
    cfg: str | CfgDelta | None,
    warmstart: str | WarmStart | None,
    knobs: dict[str, Any],
) -> CacheSettings:
    """The settings of one expert, or of all."""
    if isinstance(policy, Policy):
        node, own, target = OmegaConf.create({}), [], None
    elif policy in options("cache"):
        node, target = compose(policy), None
        own = keys_of(node.policy)
    elif policy in REGISTERED:
        node, target = OmegaConf.create({"policy": {}}), REGISTERED[policy]
        own = [f.name for f in fields(target)]
    else:
        known = {*options("cache"), *REGISTERED}
        raise ConfigError(f"enable_cache: no policy '{policy}'. {one_of(str(policy), known)}")

    driver = [] if policy == "none" else RULES
    places = {name: name for name in driver}
    places |= {name: f"cfg.{name}" for name in keys_of(node.get("cfg"))}
    places |= {name: f"policy.{name}" for name in own}
    for name, value in knobs.items():
        if name not in places:
            label = policy if isinstance(policy, str) else type(policy).__name__
            raise ConfigError(
                f"enable_cache: {label} takes no '{name}' here. {one_of(name, places)}"
            )
        OmegaConf.update(node, places[name], value, force_add=True)
    for name, part in (("forecaster", forecaster), ("cfg", cfg), ("warmstart", warmstart)):
        if policy == "none" and part is not None:
            raise ConfigError(f"enable_cache: none takes no {name}")
    if isinstance(forecaster, str):
        node.forecaster = load_yaml("cache/forecaster", forecaster)
    if isinstance(cfg, str):
        node.cfg = load_yaml("cache/cfg", cfg)
    if isinstance(warmstart, str):
        node.warmstart = load_yaml("cache/warmstart", warmstart)

    if target is not None:
        policy = build(node, "policy", target)
    if isinstance(policy, Policy):
        node.pop("policy", None)
    settings = build(node, "", CacheSettings)
    instances: dict[str, Any] = {}
    if isinstance(policy, Policy):
        instances["policy"] = policy
    if isinstance(forecaster, Forecaster):
        instances["forecaster"] = forecaster
    if cfg is not None and not isinstance(cfg, str):
        instances["cfg"] = cfg
    if isinstance(warmstart, WarmStart):
        instances["warmstart"] = warmstart
    try:
        return replace(settings, **instances)
    except ValueError as error:
        raise ConfigError(f"cache.{error}") from None


def keys_of(node: DictConfig | None) -> list[str]:
    return [str(key) for key in node or () if key != "_target_"]


def with_low(cfg: DictConfig, name: str = "cache") -> DictConfig:
    """The configuration with `cache.low` filled up: it says only what differs, unless it brings a
    policy of another class, with which nothing is shared. name: where the cache's settings are.
    """
    cache = cfg[name]
    low = cache.get("low")
    if low is None or OmegaConf.is_missing(cache, "policy") or cache.policy is None:
        return cfg
    if not isinstance(low, DictConfig):
        raise ConfigError(
            f"{name}.low: needs keys of its own, such as {name}.low.head=2, got {low}"
        )
    filled = cfg.copy()
    OmegaConf.set_struct(filled, False)
    target = OmegaConf.select(low, "policy._target_") or cache.policy.get("_target_")
    if target == cache.policy.get("_target_"):
        other = [
            part
            for part in ("forecaster", "cfg", "warmstart")
            if OmegaConf.select(low, f"{part}._target_")
            not in (None, OmegaConf.select(cache, f"{part}._target_"))
        ]
        kept = [key for key in filled[name] if key not in ("low", *other)]
        same = OmegaConf.masked_copy(filled[name], kept)
        filled[name].low = OmegaConf.merge(same, filled[name].low)
    return filled


def compose(name: str) -> DictConfig:
    """conf/cache/<name>.yaml with its nested default (a forecaster), as Hydra would compose it."""
    node = load_yaml("cache", name)
    for default in node.pop("defaults", []):
        if isinstance(default, DictConfig):
            for group, option in default.items():
                if option is None:
                    continue
                node[str(group)] = load_yaml(f"cache/{group!s}", str(option))
    return node
