"""Planned: an offline mask with an exact number of computed steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ditcache.cache.calibration import load_calibration
from ditcache.cache.policies.base import Policy, Schedule
from ditcache.errors import ConfigError


@dataclass
class Planned(Policy):
    """Compute exactly `compute` steps per branch: those that `ditcache calibrate` found to cost the
    final latents least, a shortest path over measured errors (the idea of LeMiCa,
    arXiv:2511.00090; what is measured is described in ditcache/calibrate/plan.py).

    Static. Meant for the fitted forecaster, which takes a damping for every skipped step, or the
    weights of a refined plan, from the same plan; any other works, at a loss. Plans hold for one
    number of steps and one sampling schedule.

    compute: steps computed per branch. calibration: an option of conf/calibration or a YAML file;
    null means the model's.
    """

    compute: int = 12
    calibration: str | None = None
    plan: dict[str, Any] | None = field(default=None, init=False)  # the chosen one, from there

    def __post_init__(self) -> None:
        if self.compute < 2:
            raise ValueError(f"compute: must be >= 2, got {self.compute}")

    def fitted(self, calibration: str | None) -> Policy:
        if self.plan is not None:  # given by `ditcache calibrate`, which is making it
            return self
        calibration = self.calibration or calibration
        known = load_calibration(calibration).planned if calibration else {}
        plans = {int(count): plan for count, plan in known.get("plans", {}).items()}
        if not plans:
            what = f"{calibration} has" if calibration else "this model has"
            raise ConfigError(
                f"cache.policy.calibration: {what} no plans; name a calibration that has, or run "
                "`ditcache calibrate`"
            )
        steps = int(known["steps"])
        if self.compute != steps and self.compute not in plans:
            raise ConfigError(
                f"cache.policy.compute: {calibration} has plans for "
                f"{', '.join(map(str, sorted(plans)))} of {steps} steps, got {self.compute}"
            )
        everything = {"mask": "#" * steps, "damping": []}
        chosen = replace(self)
        chosen.plan = {**plans.get(self.compute, everything), "sigmas": known["sigmas"]}
        return chosen

    def mask(self, schedule: Schedule) -> list[bool]:
        assert self.plan is not None
        mask = [mark == "#" for mark in self.plan["mask"]]
        if len(mask) != schedule.num_steps:
            raise ConfigError(
                f"cache.policy.calibration: its plans are for steps={len(mask)}, this run has "
                f"{schedule.num_steps}; run `ditcache calibrate steps={schedule.num_steps}`"
            )
        for step, (known, here) in enumerate(
            zip(self.plan["sigmas"], schedule.sigmas, strict=False)
        ):
            if abs(known - here) > 1e-3:
                raise ConfigError(
                    f"cache.policy.calibration: its plans are for sigma {known:.4f} at step "
                    f"{step}, this schedule has {here:.4f}; calibrate with the shift at hand"
                )
        return mask

    def damping(self, step: int) -> float:
        """Share of the line's slope that the fitted forecaster follows at a skipped step."""
        assert self.plan is not None
        skipped = self.plan["mask"][:step].count(".")
        known = self.plan.get("damping") if self.plan["mask"][step] == "." else None
        return float(known[skipped]) if known else 1.0

    @property
    def reach(self) -> int:
        """How many computed residuals the fitted forecaster needs."""
        assert self.plan is not None
        return max([2, *(len(weights) for weights in self.plan.get("weights", []))])

    def weights(self, step: int, behind: list[int]) -> list[float] | None:
        """A refined plan's weights of the last computed residuals, newest first; None without one
        or where the steps computed last, `behind`, are not the plan's.
        """
        assert self.plan is not None
        mask, weights = self.plan["mask"], self.plan.get("weights")
        if not weights or mask[step] == "#":
            return None
        found = [float(weight) for weight in weights[mask[:step].count(".")]]
        computed = [at for at in range(step - 1, -1, -1) if mask[at] == "#"]
        same = behind[: len(found)] == computed[: len(found)]
        return found if same else None
