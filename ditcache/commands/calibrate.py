"""`ditcache calibrate`: a few uncached runs -> the constants policies need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ditcache.config import build
from ditcache.errors import ConfigError
from ditcache.pipeline.settings import SamplingSettings, check_bundle

if TYPE_CHECKING:
    from ditcache.calibrate.measure import Measured
    from ditcache.calibrate.plan import Plan
    from ditcache.models.base import Bundle
    from ditcache.pipeline.callbacks import Callback


@dataclass(kw_only=True)
class CalibrateSettings(SamplingSettings):
    """The keys of conf/calibrate.yaml; prompt n starts from the noise of seed + n."""

    computes: list[int] | None = None
    window: int = 9
    probes: int | None = None
    probe_prompts: int = 8
    refine: list[int] | None = None
    refine_prompts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lows = {"window": 2, "probes": 2, "probe_prompts": 1, "refine_prompts": 1, "steps": 4}
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: must be >= {low}, got {value}")
        self.window = min(self.window, self.steps - 1)
        for count in self.computes or []:
            if not self.least <= count < self.steps:
                raise ValueError(
                    f"computes: must be from {self.least} to {self.steps - 1}, got {count}"
                )

        if self.refine is None and self.refine_prompts is not None:
            raise ValueError("refine_prompts: has no effect without refine")
        for count in self.refine or []:
            if count not in self.counts:
                known = ", ".join(map(str, self.counts))
                raise ValueError(f"refine: must be among the planned {known}, got {count}")

    @property
    def refined_on(self) -> int:
        """Prompts to refine on."""
        return min(self.refine_prompts or 12, len(self.texts))

    @property
    def least(self) -> int:
        """Fewest steps a plan can compute with this window."""
        return max(2, 1 + -(-(self.steps - 1) // self.window))

    @property
    def counts(self) -> list[int]:
        """Numbers of computed steps to plan for."""
        return self.computes or list(range(max(4, self.least), self.steps))

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of `denoise`."""
        names = ("steps", "guidance", "guidance_low", "shift")
        return {name: getattr(self, name) for name in names}


def run(cfg: DictConfig) -> None:
    """One job."""
    # 1) Check everything that can be checked without weights.
    settings = build(cfg, "", CalibrateSettings)
    settings.model.check_folder()

    # 2) Load and open the run folder.
    from ditcache.report.progress import progress

    probed = min(settings.steps - 2, settings.probes or settings.steps)
    measured_steps = len(settings.texts) * settings.steps
    probe_steps = probed * min(settings.probe_prompts, len(settings.texts)) * settings.steps
    with progress(measured_steps + probe_steps + refine_steps(settings)) as show:
        from ditcache.calibrate.measure import measure
        from ditcache.models.load import load_once
        from ditcache.pipeline.render import open_picture, prepare
        from ditcache.report.calibration import write_calibration
        from ditcache.report.run_folder import chosen_options, open_run_folder

        bundle = load_once(settings.model)
        check_bundle(bundle, settings)
        check_refine(bundle, settings)
        pictures = [open_picture(path) for path in settings.pictures]
        folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))

        # 3) Uncached runs, looked at from all sides.
        inputs = [
            prepare(bundle, settings, text, picture, seed=settings.seed + index)
            for index, (text, picture) in enumerate(zip(settings.texts, pictures, strict=True))
        ]
        runs: list[Measured] = []
        for index, one in enumerate(inputs):
            watch = watcher(show, "measuring", index)
            sampling, window = settings.sampling, settings.window
            runs.append(measure(bundle, one, window=window, sampling=sampling, on_step=watch))

        # 4) What an error at a step does to the result.
        probes = probe_steps_of(runs[0].starts, settings.steps, probed)
        gains = measure_gains(bundle, settings, inputs, runs, probes, show)

        # 5) Plans, and the better ones that rendering finds.
        plans = make_plans(settings, runs, gains)
        for count in settings.refine or []:
            plans[count] = refined(bundle, settings, inputs, runs, plans[count], show)

    # 6) Fit, write, show.
    write_calibration(folder, settings, bundle, chosen_options()["model"], runs, gains, plans)


def watcher(show: Any, what: str, index: int) -> Callback:
    return lambda step: show(what, index, step, None)


def check_refine(bundle: Bundle, settings: CalibrateSettings) -> None:
    """Every expert's first step and the first after dropped frames compute, and the last one."""
    starts = len(bundle.experts) + (getattr(bundle.model, "reasoning_steps", 0) > 0)
    for count in settings.refine or []:
        if count <= starts:
            raise ConfigError(f"refine: must be >= {starts + 1} for this model, got {count}")


def refine_steps(settings: CalibrateSettings) -> int:
    """Denoising steps that refining takes at most, for the progress bar."""
    if not settings.refine:
        return 0
    from ditcache.calibrate.refine import REACH, ROUNDS, SHARES

    renders = sum(
        ROUNDS * 3 * count + (REACH - 1) * (settings.steps - count) + len(SHARES) + 3
        for count in settings.refine
    )
    return renders * settings.refined_on * settings.steps


def make_plans(
    settings: CalibrateSettings, runs: list[Measured], gains: list[float]
) -> dict[int, Plan]:
    """Number of computed steps -> the shortest path."""
    import numpy as np

    from ditcache.calibrate.plan import make_plan

    grams, starts = np.stack([run.gram for run in runs]), runs[0].starts
    sizes = np.array([float(run.latents.float().square().mean()) for run in runs])
    return {
        count: make_plan(grams, gains, sizes, starts, count)
        for count in settings.counts
        if count >= len(starts) + 1
    }


def refined(
    bundle: Bundle,
    settings: CalibrateSettings,
    inputs: list[Any],
    runs: list[Measured],
    plan: Plan,
    show: Any,
) -> Plan:
    """The plan after rendering its neighbours and changes on the first `refined_on` prompts."""
    import numpy as np

    from ditcache.calibrate.measure import render
    from ditcache.calibrate.refine import refine

    few = slice(settings.refined_on)

    def render_all(mask: list[bool], weights: list[list[float]]) -> list[Any]:
        return [
            render(
                bundle,
                one,
                mask,
                weights,
                sampling=settings.sampling,
                on_step=watcher(show, f"refining compute={sum(mask)}", index),
            )
            for index, one in enumerate(inputs[few])
        ]

    references = [run.latents for run in runs[few]]
    grams = np.stack([run.gram for run in runs])
    return refine(plan, grams, runs[0].starts, references, render_all)


def probe_steps_of(starts: list[int], steps: int, count: int) -> list[int]:
    """Steps whose effect is measured: all that may be skipped, or `count` of them, evenly, with the
    first and the last.
    """
    free = [step for step in range(steps - 1) if step not in starts]
    count = min(count, len(free))
    return [free[round(i * (len(free) - 1) / max(count - 1, 1))] for i in range(count)]


def measure_gains(
    bundle: Bundle,
    settings: CalibrateSettings,
    inputs: list[Any],
    runs: list[Measured],
    probes: list[int],
    show: Any,
) -> list[float]:
    """[T]: mean squared error of the final latents per squared error of the guided output at a
    step; geometric mean over prompts, interpolated in logarithms where it was not measured.
    """
    import numpy as np

    from ditcache.calibrate.measure import damage
    from ditcache.calibrate.plan import error_at

    logs = []
    for step in probes:
        start = max(s for s in runs[0].starts if s <= step)
        anchors = (step - 1, step - 2) if step - 2 >= start else (step - 1,)
        found = []
        for index, one in enumerate(inputs[: settings.probe_prompts]):
            watch = watcher(show, f"probing step {step}", index)
            reference, sampling = runs[index].latents, settings.sampling
            error = damage(bundle, one, reference, step=step, sampling=sampling, on_step=watch)
            local = error_at(runs[index].gram.tolist(), anchors, step, 1.0)
            found.append(np.log(max(error, 1e-30) / max(local, 1e-30)))
        logs.append(float(np.mean(found)))
    return [float(g) for g in np.exp(np.interp(range(settings.steps), probes, logs))]
