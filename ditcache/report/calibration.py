"""A calibration's YAML, its picture and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditcache.cache.policies.base import Schedule
from ditcache.cache.policies.teacache import SIGNALS, TeaCache
from ditcache.cache.schedule import time_embeddings
from ditcache.calibrate.fit import Polynomial, fit_polynomial, mean_ratios
from ditcache.calibrate.plan import Plan
from ditcache.files import complete_file
from ditcache.pipeline.denoise import make_scheduler
from ditcache.report.run_folder import versions, write_json, write_text

if TYPE_CHECKING:
    from ditcache.calibrate.measure import Measured
    from ditcache.commands.calibrate import CalibrateSettings
    from ditcache.models.base import Bundle

Ratios = dict[str, tuple[np.ndarray, np.ndarray]]


def write_calibration(
    folder: Path,
    settings: CalibrateSettings,
    bundle: Bundle,
    model: str,
    runs: Sequence[Measured],
    gains: list[float],
    plans: dict[int, Plan],
) -> None:
    """calibration.yaml, calibration.png, metrics.json, and a table on the terminal."""
    polynomials = fit_teacache(settings, bundle, runs)
    ratios = mean_ratios(runs)
    text = calibration_yaml(settings, model, runs, polynomials, ratios, plans)
    write_text(folder / "calibration.yaml", text)
    draw(folder / "calibration.png", polynomials, ratios, plans)
    metrics = {
        "schema": 1,
        "command": "calibrate",
        "model": model,
        "seed": settings.seed,
        "steps": settings.steps,
        "prompts": settings.texts,
        "teacache": {name: {"r2": p.r2} for name, p in polynomials.items()},
        "magcache": {name: {"spread": float(spread.max())} for name, (_, spread) in ratios.items()},
        "planned": {str(count): plan.decibel for count, plan in plans.items()},
        "refined": {str(count): plan.rendered for count, plan in plans.items() if plan.rendered},
        "gains": gains,
        "versions": versions(),
    }
    write_json(folder / "metrics.json", metrics)
    print_table(folder, polynomials, ratios, plans)


def fit_teacache(
    settings: CalibrateSettings, bundle: Bundle, runs: Sequence[Measured]
) -> dict[str, Polynomial]:
    """A polynomial per signal; none where the transformer has no time embedding we know."""
    scheduler = make_scheduler(bundle.pipe.scheduler, settings.shift)
    scheduler.set_timesteps(settings.steps)
    starts, found = runs[0].starts, {}
    for signal in SIGNALS:
        changes = [0.0] * settings.steps
        for expert, first in zip(bundle.experts.values(), starts, strict=False):
            embed = time_embeddings(expert, scheduler.timesteps.cpu())
            if embed is None:
                return {}
            end = min((s for s in starts if s > first), default=settings.steps)
            schedule = Schedule(settings.steps, first=first, end=end, embed=embed)
            own = TeaCache(signal=signal).changes(schedule)
            changes[first:end] = own[first:end]
        found[signal] = fit_polynomial(changes, runs)
    return found


def calibration_yaml(
    settings: CalibrateSettings,
    model: str,
    runs: Sequence[Measured],
    polynomials: dict[str, Polynomial],
    ratios: Ratios,
    plans: dict[int, Plan],
) -> str:
    size = f"{settings.num_frames}x{settings.height}x{settings.width}"
    refined = f" refine=[{','.join(map(str, settings.refine))}]" if settings.refine else ""
    lines = [
        f"# Measured on {model}.  ditcache generate model={model} cache=planned",
        f"source: ditcache calibrate model={model}{refined}, {len(runs)} prompts, "
        f"seed {settings.seed}, "
        f"{settings.steps} steps, guidance {settings.guidance}, shift {settings.shift}, {size}",
        f"model: {model}",
    ]
    if polynomials:
        lines.append("teacache:  # polynomial of a signal's relative change, highest degree first")
    for signal, polynomial in polynomials.items():
        lines.append(f"  {signal}:  # explains {polynomial.r2:.1%} of the variance")
        lines.append(f"    coefficients: [{numbers(polynomial.coefficients, '.9g')}]")
    lines.append("magcache:  # |R_s| / |R_s-1|, 1 at an expert's first step")
    lines.append(f"  steps: {settings.steps}")
    lines += [f"  {name}: [{numbers(mean, '.5f')}]" for name, (mean, _) in ratios.items()]
    lines.append(
        "planned:  # of which steps compute (#); damping of the line at each skipped one, or"
    )
    lines.append("  # weights of the last computed residuals, newest first, where it was refined")
    lines.append(f"  steps: {settings.steps}")
    lines.append(f"  sigmas: [{numbers(runs[0].sigmas, '.5f')}]")
    lines.append("  plans:")
    for count, plan in plans.items():
        lines.append(f"    {count}:  # {quality(plan)}")
        lines.append(f'      mask: "{plan.marks}"')
        if plan.weights is None:
            lines.append(f"      damping: [{numbers(plan.damping, '.3f')}]")
        else:
            rows = ", ".join(f"[{numbers(row, '.4f')}]" for row in plan.weights)
            lines.append(f"      weights: [{rows}]")
    return "\n".join(lines) + "\n"


def quality(plan: Plan) -> str:
    if plan.rendered is None:
        return f"predicted error of the latents {plan.decibel:.1f} dB"
    before, after = plan.rendered
    return f"rendered error of the latents {after:.1f} dB, {before:.1f} dB before it was refined"


def numbers(values: Any, form: str) -> str:
    return ", ".join(format(float(value), form) for value in values)


def draw(
    path: Path, polynomials: dict[str, Polynomial], ratios: Ratios, plans: dict[int, Plan]
) -> None:
    """How good the fits are, to look at."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flat
    for axis, (signal, polynomial) in zip(axes, polynomials.items(), strict=False):
        axis.plot(polynomial.signal, polynomial.change, ".", alpha=0.3, label="measured")
        grid = np.linspace(polynomial.signal.min(), polynomial.signal.max(), 200)
        axis.plot(grid, np.polyval(polynomial.coefficients, grid), label="polynomial")
        axis.set_title(f"TeaCache, signal {signal}: R² {polynomial.r2:.3f}")
        axis.set_xlabel("relative change of the signal")
        axis.set_ylabel("relative change of the output")
        axis.legend()
    axis = figure.axes[2]
    for (name, (mean, spread)), style in zip(ratios.items(), ("-", "--"), strict=False):
        axis.errorbar(range(len(mean)), mean, spread, linestyle=style, label=name, capsize=2)
    axis.set_title("MagCache: mean and spread over prompts")
    axis.set_xlabel("step")
    axis.set_ylabel("|R_s| / |R_s-1|")
    axis.legend()
    axis = figure.axes[3]
    for row, plan in enumerate(plans.values()):
        computed = [step for step, on in enumerate(plan.mask) if on]
        axis.plot(computed, [row] * len(computed), "s", color="black", markersize=5)
        error = plan.rendered[1] if plan.rendered else plan.decibel
        axis.text(len(plan.mask) + 0.5, row, f"{error:.1f} dB", fontsize=7, va="center")
    axis.set_yticks(range(len(plans)), [str(count) for count in plans], fontsize=7)
    axis.set_title("Plans: computed steps and error of the latents")
    axis.set_xlabel("step")
    axis.set_ylabel("computed steps")
    axis.set_xlim(-0.7, max((len(plan.mask) for plan in plans.values()), default=1) + 4)
    with complete_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def print_table(
    folder: Path, polynomials: dict[str, Polynomial], ratios: Ratios, plans: dict[int, Plan]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, collapse_padding=True)
    for column in ("what", "quality of the fit"):
        table.add_column(column)
    for signal, polynomial in polynomials.items():
        table.add_row(f"teacache, {signal}", f"explains {polynomial.r2:.1%} of the variance")
    for name, (_, spread) in ratios.items():
        table.add_row(f"magcache, {name}", f"spread over prompts at most {spread.max():.4f}")
    for count, plan in plans.items():
        error = f"{plan.decibel:.1f} dB predicted"
        if plan.rendered is not None:
            error = "{:.1f} -> {:.1f} dB rendered".format(*plan.rendered)
        table.add_row(f"planned, compute={count}", f"{plan.marks}  {error}")
    console = Console()
    console.print(table)
    path = folder / "calibration.yaml"
    console.print(f"use it: model.calibration={path}", highlight=False, soft_wrap=True)
