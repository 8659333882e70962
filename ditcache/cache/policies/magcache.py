"""MagCache: the residual's magnitude shrinks in the same way for every prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ditcache.cache.calibration import load_calibration
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.errors import ConfigError


@dataclass
class MagCache(Policy):
    """Skip while the calibrated magnitude ratios, multiplied up since the last computed step, stay
    near 1 (MagCache, arXiv:2506.09045).

    Static: the ratios are known before the run. Everything counts steps, so that both branches
    compute the same ones; each expert starts anew.

    threshold: most error to add up, 0 skips nothing. max_run: most steps skipped in a row (K of the
    paper). retention: share of an expert's steps at its start that compute. ratios: |R_s| / |R_s-1|
    per step, a leading 1 included; null takes those of the model's calibration. calibration: an
    option of conf/calibration or a YAML file; null means the model's. Other step counts than the
    calibrated take the nearest ratio.
    """

    threshold: float = 0.12
    max_run: int = 2
    retention: float = 0.2
    ratios: list[float] | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")
        if self.max_run < 0:
            raise ValueError(f"max_run: must be >= 0, got {self.max_run}")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention: must be between 0 and 1, got {self.retention}")
        if self.ratios is not None and not self.ratios:
            raise ValueError("ratios: needs one per step, got none")

    def fitted(self, calibration: str | None) -> Policy:
        if self.ratios is not None:
            return self
        calibration = self.calibration or calibration
        known = load_calibration(calibration).magcache if calibration else {}
        if "cond" not in known:
            what = f"{calibration} has" if calibration else "this model has"
            raise ConfigError(
                f"cache.policy.ratios: {what} no magnitude ratios; give them, name a "
                "cache.policy.calibration, or run `ditcache calibrate`"
            )
        return replace(self, ratios=[float(r) for r in known["cond"]])

    def mask(self, schedule: Schedule) -> list[bool]:
        assert self.ratios is not None
        ratios = resampled(self.ratios, schedule.num_steps)
        retained = schedule.first + int(self.retention * len(schedule.span) + 0.5)
        retained = max(retained, schedule.first + 1, schedule.head)
        mask = [True] * schedule.num_steps
        product, run, error = 1.0, 0, 0.0
        for step in range(retained, schedule.span.stop):
            product, run = product * ratios[step], run + 1
            error += abs(1 - product)
            mask[step] = not (error < self.threshold and run <= self.max_run)
            if mask[step]:
                product, run, error = 1.0, 0, 0.0
        return mask


def resampled(ratios: list[float], steps: int) -> list[float]:
    """The nearest ratio for every step of a run of another length."""
    if steps == len(ratios) or steps == 1:
        return ratios[:steps]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[int(step * scale + 0.5)] for step in range(steps)]
