"""TeaCache: how far the time embedding has moved tells how far the output has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ditcache.cache.calibration import load_calibration
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.errors import ConfigError, one_of

SIGNALS = ("e", "e0")


@dataclass
class TeaCache(Policy):
    """Add up a polynomial of the time embedding's relative change; compute when the sum reaches
    `rel_l1_thresh` (TeaCache, arXiv:2411.19108).

    The embedding depends on the timestep and the weights alone, so the mask is known before the run
    and both branches share it. A negative value of the polynomial is added as it is, like in the
    original. Head and tail steps start the sum anew.

    rel_l1_thresh: 0 skips nothing; published for Wan2.1 at .05 to .3. signal: `e`, the time
    embedding, or `e0`, its projection that modulates the blocks (the authors' ret mode, used with
    head=5). coefficients: highest degree first; null takes those of the model's calibration.
    calibration: an option of conf/calibration or a YAML file; null means the model's.
    """

    rel_l1_thresh: float = 0.1
    signal: str = "e0"
    coefficients: list[float] | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if not self.rel_l1_thresh >= 0:
            raise ValueError(f"rel_l1_thresh: must be >= 0, got {self.rel_l1_thresh}")
        if self.signal not in SIGNALS:
            raise ValueError(f"signal: no '{self.signal}'. {one_of(self.signal, SIGNALS)}")
        if self.coefficients is not None and len(self.coefficients) < 2:
            raise ValueError(f"coefficients: needs two or more, got {self.coefficients}")

    def fitted(self, calibration: str | None) -> Policy:
        if self.coefficients is not None:
            return self
        calibration = self.calibration or calibration
        known = load_calibration(calibration).teacache if calibration else {}
        if self.signal not in known:
            what = f"{calibration} has no" if calibration else "this model has no"
            raise ConfigError(
                f"cache.policy.coefficients: {what} polynomial for signal {self.signal}"
                f"{' (only ' + ', '.join(known) + ')' if known else ''}; give one, name a "
                "cache.policy.calibration, or run `ditcache calibrate`"
            )
        return replace(self, coefficients=[float(c) for c in known[self.signal]["coefficients"]])

    def mask(self, schedule: Schedule) -> list[bool]:
        if schedule.embed is None:
            raise ConfigError(
                "cache.policy: TeaCache needs a pipeline with a scheduler and a transformer with a "
                "time embedding ditcache knows; use another policy"
            )
        return self.decide(schedule, self.changes(schedule))

    def changes(self, schedule: Schedule) -> list[float]:
        """Relative L1 change of the signal from the step before; 0 for the expert's first."""
        assert schedule.embed is not None
        values = schedule.embed()[self.signal].flatten(1)  # [T, D], fp32, one row per step
        result = [0.0] * schedule.num_steps
        for step in schedule.span[1:]:
            before = values[step - 1]
            result[step] = float((values[step] - before).abs().mean() / before.abs().mean())
        return result

    def decide(self, schedule: Schedule, changes: list[float]) -> list[bool]:
        assert self.coefficients is not None
        mask, total = [True] * schedule.num_steps, 0.0
        for step in schedule.span:
            free = schedule.head <= step < schedule.num_steps - schedule.tail
            if step == schedule.first or not free:
                total = 0.0
                continue
            total += polynomial(self.coefficients, changes[step])
            mask[step] = self.rel_l1_thresh <= 0 or not total < self.rel_l1_thresh
            if mask[step]:
                total = 0.0
        return mask


def polynomial(coefficients: list[float], x: float) -> float:
    """Horner's rule, highest degree first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
