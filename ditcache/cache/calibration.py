"""Constants measured on one model, which some policies need: TeaCache's polynomial, MagCache's
ratios, planned masks. One YAML per model, in conf/calibration or where `ditcache calibrate` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditcache.cli import conf_dir
from ditcache.errors import ConfigError, first_line, one_of


@dataclass
class Calibration:
    """What is known of one model.

    name: the option or the file, for messages. source: where the numbers come from. teacache: per
    signal (`e`, `e0`) the polynomial's coefficients, highest degree first. magcache: `steps`, and
    per branch the ratio |R_s| / |R_{s-1}| of every step, a leading 1 included. planned: `steps`,
    `sigmas` and `plans`: number of computed steps -> what to do at each step.
    """

    name: str
    source: str = ""
    model: str = ""
    teacache: dict[str, Any] = field(default_factory=dict)
    magcache: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises TypeError, KeyError or ValueError for what does not look like the above."""
        for part in (self.teacache, self.magcache, self.planned):
            if not isinstance(part, dict):
                raise TypeError(f"expected keys, got {part!r}")
        plans = self.planned.get("plans", {}).values()
        if self.planned:
            int(self.planned["steps"])
        lists = [
            *(polynomial["coefficients"] for polynomial in self.teacache.values()),
            *(ratios for branch, ratios in self.magcache.items() if branch != "steps"),
            *([self.planned["sigmas"]] if self.planned else []),
            *(plan["damping"] for plan in plans if "weights" not in plan),
            *(weights for plan in plans for weights in plan.get("weights", [])),
        ]
        for values in lists:
            [float(value) for value in values]
        for plan in plans:
            if set(plan["mask"]) - {"#", "."}:
                raise ValueError(f"a mask consists of # and ., got {plan['mask']}")
            if "weights" in plan and len(plan["weights"]) != plan["mask"].count("."):
                raise ValueError(f"needs weights for every skipped step of {plan['mask']}")


def calibrations() -> list[str]:
    return sorted(path.stem for path in (conf_dir() / "calibration").glob("*.yaml"))


def load_calibration(name: str) -> Calibration:
    """An option of conf/calibration, or the path of a YAML file. Raises ConfigError."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = conf_dir() / "calibration" / f"{name}.yaml"
        if not path.is_file():
            known = calibrations()
            raise ConfigError(
                f"calibration: no '{name}'. {one_of(name, known)}; or give a .yaml file"
            )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        return Calibration(name=name, **{str(k): v for k, v in content.items()})  # type: ignore
    except OSError as error:
        raise ConfigError(f"calibration: cannot read {name}: {error.strerror}") from None
    except (TypeError, AttributeError, OmegaConfBaseException, ValueError, KeyError) as error:
        raise ConfigError(
            f"calibration: {name} is not a calibration: {first_line(error)}"
        ) from None
