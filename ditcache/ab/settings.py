"""The keys of conf/ab_test.yaml. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditcache.bridge.settings import BridgeSettings, check_bridge
from ditcache.cache.settings import CacheSettings
from ditcache.metrics.measure import MetricSettings
from ditcache.pipeline.settings import VideoSettings
from ditcache.store.base import Store


@dataclass
class BaselineSettings:
    """folder: where uncached results are kept between runs. refresh: render them again."""

    folder: str = "outputs/baselines"
    refresh: bool = False


@dataclass
class GateSettings:
    """What b must reach; None: not asked. min_psnr, min_ssim: mean over cases. min_worst_psnr: of
    every case. min_speedup: median, of denoising.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    min_worst_psnr: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.min_ssim is not None and not 0 < self.min_ssim <= 1:
            raise ValueError(f"min_ssim: must be between 0 and 1, got {self.min_ssim}")
        for name in ("min_psnr", "min_worst_psnr", "min_speedup"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be > 0, got {value}")

    @property
    def asked(self) -> bool:
        return any(value is not None for value in vars(self).values())


@dataclass
class SearchSettings:
    """One target; the other direction is searched as far as it goes. trials: settings that are
    tried. space: key of b's cache -> [low, high], such as {policy.threshold: [0.01, 1]}.
    """

    target_psnr: float | None = None
    target_ssim: float | None = None
    target_speedup: float | None = None
    trials: int = 16
    space: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        asked = [name for name in vars(self) if name.startswith("target") and vars(self)[name]]
        if len(asked) > 1:
            raise ValueError(f"{asked[1]}: one target at a time, {asked[0]} is set as well")
        if self.target_ssim is not None and not 0 < self.target_ssim < 1:
            raise ValueError(f"target_ssim: must be between 0 and 1, got {self.target_ssim}")
        if self.target_psnr is not None and self.target_psnr <= 0:
            raise ValueError(f"target_psnr: must be > 0, got {self.target_psnr}")
        if self.target_speedup is not None and self.target_speedup <= 1:
            raise ValueError(f"target_speedup: must be > 1, got {self.target_speedup}")
        if self.trials < 2:
            raise ValueError(f"trials: must be >= 2, got {self.trials}")
        for key, limits in (self.space or {}).items():
            if not (isinstance(limits, list) and len(limits) == 2 and limits[0] < limits[1]):
                raise ValueError(f"space.{key}: needs [low, high], got {limits}")

    @property
    def target(self) -> float:
        """The one that is set; 0 without any."""
        return self.target_psnr or self.target_ssim or self.target_speedup or 0.0

    @property
    def asked(self) -> bool:
        return self.target > 0


@dataclass(frozen=True)
class Case:
    """One prompt with one seed. other: another prompt and its picture, for controls that are given
    the wrong one (None: there is only one).
    """

    index: int
    prompt: str
    seed: int
    picture: Path | None
    other: tuple[str, Path | None] | None = None


@dataclass(kw_only=True)
class AbTestSettings(VideoSettings):
    """a is what b is measured against; without a `b` of its own it is `cache`. bridge: b's, whose
    sources a does not read.
    """

    cache: CacheSettings
    a: CacheSettings
    store: Store
    metrics: MetricSettings
    baseline: BaselineSettings
    gate: GateSettings
    search: SearchSettings
    b: CacheSettings | None = None
    bridge: BridgeSettings | None = None
    seeds: list[int] | None = None
    controls: int = 8
    fps: int = 16
    upscale: int = 1
    candidate: CacheSettings = field(init=False)
    cases: list[Case] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("fps", 1), ("upscale", 1), ("controls", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be >= {low}, got {getattr(self, name)}")
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0):
            raise ValueError(f"seeds: needs numbers >= 0, got {self.seeds}")
        self.candidate = self.cache if self.b is None else self.b
        for name, cache in (("a", self.a), ("b", self.candidate)):
            if cache.policy is None and cache != CacheSettings():
                raise ValueError(f"{name}: without a policy no setting of it has an effect")
            if cache.cfg is not None and self.guidance <= 1:
                raise ValueError(f"{name}.cfg: has no effect without guidance; set guidance > 1")
            cache.check_segments(name, self.segments)
        if self.bridge is not None:
            if self.segments > 1:
                raise ValueError("segments: a bridge reads one segment's; set segments=1")
            check_bridge(self, self.bridge, cached=self.candidate.policy is not None)
        if self.store.shares:
            raise ValueError(
                "store.share: one arm would use what another computed; set it to false"
            )
        if self.search.asked and self.candidate.policy is None:
            raise ValueError("search: needs a policy to search over; set cache=<policy>")
        seeds = [self.seed] if self.seeds is None else self.seeds
        pairs = [(number, seed) for number in range(len(self.texts)) for seed in seeds]
        self.cases = [
            Case(index, self.texts[number], seed, self.pictures[number], self.other_than(number))
            for index, (number, seed) in enumerate(pairs)
        ]
        if self.search.asked and len(self.cases) < 4:
            raise ValueError(
                f"search: needs 4 cases or more, half of them to check on, got {len(self.cases)}; "
                "give more prompts, such as prompts=twenty, or seeds"
            )

    def other_than(self, number: int) -> tuple[str, Path | None] | None:
        """Another prompt and its picture, half the list away, as neighbours are often alike."""
        texts, count = self.texts, len(self.texts)
        later = ((number + count // 2 + step) % count for step in range(count))
        others = ((texts[n], self.pictures[n]) for n in later if texts[n] != texts[number])
        return next(others, None)
