"""The fastest setting of a policy that holds a target, found on one half of the cases and checked
once on the other.

Optuna proposes settings. Speed is the compute ratio, which does not wander as the clock does, save
where the target is a speed-up: that is measured. A setting is good enough if the lower end of its
quality's interval over the cases holds the target, so that luck on a few prompts is not enough.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ditcache.ab.results import digest, plain
from ditcache.ab.settings import AbTestSettings, Case, SearchSettings
from ditcache.cache.settings import CacheSettings, with_low
from ditcache.config import build
from ditcache.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from ditcache.ab.runs import Runner

LEVEL = 0.8  # of the interval: its lower end holds in nine of ten draws of prompts
SPACES: dict[str, dict[str, list[float]]] = {
    "threshold": {"policy.threshold": [0.01, 1.5]},
    "rel_l1_thresh": {"policy.rel_l1_thresh": [0.01, 1.0]},
    "every": {"policy.every": [2, 6], "head": [1, 8]},
    "compute": {"policy.compute": [4, 0]},  # to one less than the steps
}
FILE = "search.json"


def key_of(cfg: DictConfig) -> str:
    """Where b's cache is in the configuration."""
    return "cache" if cfg.get("b") is None else "b"


def space_of(settings: AbTestSettings, cfg: DictConfig) -> dict[str, list[float]]:
    """What to search over. Raises ConfigError for a policy without a knob we know."""
    node = cfg[key_of(cfg)]
    if settings.search.space is not None:
        for name in settings.search.space:
            if OmegaConf.select(node, name) is None:
                raise ConfigError(f"search.space: {key_of(cfg)} has no value '{name}' to change")
        return settings.search.space
    knob = next((name for name in SPACES if name in node.policy), None)
    if knob is None:
        keys = [str(key) for key in node.policy if key != "_target_"]
        raise ConfigError(
            f"search.space: no usual one for this policy; give e.g. {{policy.{(keys or ['x'])[0]}: "
            "[low, high]}"
        )
    space = {name: list(limits) for name, limits in SPACES[knob].items()}
    if knob == "compute":
        space["policy.compute"][1] = settings.steps - 1
    return space


def check(settings: AbTestSettings, cfg: DictConfig) -> None:
    """Before anything is loaded."""
    space_of(settings, cfg)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError("search: needs optuna; pip install 'ditcache[search]'") from None


@dataclass
class Trial:
    """One setting on the cases to search on. quality: per case, of the target's metric, or PSNR."""

    values: dict[str, float]
    compute_ratio: float
    speedup: float
    quality: list[float]

    def rank(self, search: SearchSettings) -> tuple[bool, float]:
        """(good enough, how good): more is better, anything good enough before anything else."""
        from ditcache.metrics.bootstrap import bootstrap

        mean, low, _ = bootstrap(self.quality, level=LEVEL)
        if search.target_speedup is not None:
            missing = self.speedup - search.target_speedup
            return (missing >= 0, mean if missing >= 0 else missing)
        missing = low - search.target
        return (missing >= 0, self.compute_ratio if missing >= 0 else missing)


@dataclass
class Found:
    """cache: b as the search found it. good: whether it held on the cases searched on."""

    cache: CacheSettings
    best: Trial
    good: bool
    trials: int
    search: SearchSettings
    held_out: list[Case]
    notes: list[str] = field(default_factory=list)

    def difference(self) -> list[dict[str, str]]:
        return [
            {"key": f"{name} (found)", "a": "-", "b": f"{value:g}"}
            for name, value in self.best.values.items()
        ]

    def verdict(self, report: dict[str, Any]) -> dict[str, Any]:
        """Whether the target holds on the cases held out, and a sentence that says so."""
        row = next(row for row in report["rows"] if row["kind"] == "b")
        if self.search.target_speedup is not None:
            name, got = "speed-up", row["speedup"]["median"]
        else:
            name = "psnr" if self.search.target_psnr is not None else "ssim"
            got = None if row["identical"] else row[name]["mean"]
        target = self.search.target
        met = got is None or got >= target
        setting = " ".join(f"{key}={value:g}" for key, value in self.best.values.items())
        shown = "identical" if got is None else f"{got:.4g}"
        text = (
            f"search: {setting} after {self.trials} trials; on {len(self.held_out)} cases it had "
            f"not seen: {name} {shown}, asked {target:g}: {'met' if met else 'NOT met'}"
        )
        if not self.good:
            text += "; no setting held the target where it was searched, this one came nearest"
        return {
            "met": met,
            "text": text,
            "target": {name: target},
            "got": got,
            "values": self.best.values,
            "compute_ratio": row["compute_ratio"],
        }


def search(runner: Runner, folder: Path, cfg: DictConfig) -> Found:
    """Run the trials; every finished one is kept, so that an interrupted search goes on."""
    import optuna

    settings = runner.settings
    seen, held_out = settings.cases[::2], settings.cases[1::2]
    made_of = digest(
        {
            **runner.key(seen[0], settings.steps, 0.0),
            "cases": [[case.prompt, case.seed] for case in seen],
            "a": plain(settings.a),
            "b": OmegaConf.to_container(cfg[key_of(cfg)], resolve=True),
            "ssim": settings.search.target_ssim is not None,
        }
    )
    space, done = space_of(settings, cfg), read_trials(folder, made_of)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(proposed: optuna.Trial) -> float:
        values = {name: suggest(proposed, name, limits) for name, limits in space.items()}
        name = json.dumps(values, sort_keys=True)
        if name not in done:
            done[name] = run_trial(runner, cfg, values, seen)
            write_trials(folder, made_of, done)
        good, value = done[name].rank(settings.search)
        return value if good else value - 1000.0

    try:
        study.optimize(objective, n_trials=settings.search.trials)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted after {len(done)} trials; the same command with hydra.run.dir={folder} "
            "goes on from there"
        ) from None
    best = max(done.values(), key=lambda trial: trial.rank(settings.search))
    return Found(
        cache_with(cfg, best.values),
        best,
        best.rank(settings.search)[0],
        len(done),
        settings.search,
        held_out,
    )


def suggest(proposed: Any, name: str, limits: list[float]) -> float:
    low, high = limits
    if isinstance(low, int) and isinstance(high, int):
        return int(proposed.suggest_int(name, low, high))
    value = proposed.suggest_float(name, low, high, log=low > 0)
    return float(f"{value:.3g}")


def cache_with(cfg: DictConfig, values: dict[str, float]) -> CacheSettings:
    """b's settings with other values. Raises ConfigError for one that is not allowed."""
    changed, where = cfg.copy(), key_of(cfg)
    for name, value in values.items():
        OmegaConf.update(changed, f"{where}.{name}", value)
    return build(with_low(changed, where), where, CacheSettings)


def run_trial(
    runner: Runner, cfg: DictConfig, values: dict[str, float], cases: list[Case]
) -> Trial:
    from ditcache.metrics.psnr import psnr
    from ditcache.metrics.ssim import ssim

    cache = cache_with(cfg, values)
    metric = ssim if runner.settings.search.target_ssim is not None else psnr
    ratios, gains, quality = [], [], []
    for case in cases:
        before, reference = runner.arm(case, runner.settings.a)
        after, frames = runner.arm(case, cache, bridged=runner.settings.bridge is not None)
        ratios.append(before.blocks_total / after.blocks)
        gains.append(before.seconds["denoise"] / after.seconds["denoise"])
        quality.append(min(metric(reference, frames), 100.0))  # identical: infinite
    return Trial(values, fmean(ratios), median(gains), quality)


def read_trials(folder: Path, made_of: str) -> dict[str, Trial]:
    """Those that are there already, if they were made with the same settings."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        rows = kept["trials"] if kept["made_of"] == made_of else []
        return {json.dumps(row["values"], sort_keys=True): Trial(**row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_trials(folder: Path, made_of: str, done: dict[str, Trial]) -> None:
    from ditcache.report.run_folder import write_json

    trials = [vars(trial) for trial in done.values()]
    write_json(folder / FILE, {"made_of": made_of, "trials": trials})
