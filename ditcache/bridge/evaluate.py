"""Held-out losses of a bridge and its controls, clip by clip, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ditcache.bridge.controls import (
    SHARES,
    Alone,
    OutputAverage,
    TimestepSwitch,
    WeightAverage,
)
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.pair import Pair, even_draw
from ditcache.bridge.projectors.identity import Identity
from ditcache.bridge.projectors.weighted import Weighted
from ditcache.bridge.students import Batch, Bridged, Student

LEVELS = (0.95, 0.75, 0.5, 0.25)  # of noise
BATCH = 16
TARGET, SOURCE = "target alone", "source alone"


@dataclass
class Row:
    """One method. losses [N]: mean over noise levels, per test clip. picked: settings chosen on the
    validation clips. cost: wall time of a step relative to the target's.
    """

    name: str
    losses: Tensor
    forwards: float
    parameters: int
    picked: str = ""
    cost: float | None = None


@torch.no_grad()
def losses_of(
    pair: Pair,
    students: Mapping[str, Student],
    fusion: Fusion,
    split: str,
    autocast: Any,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Mean squared error of the velocity per clip of a split, [N], mean over LEVELS. Clips of all
    domains stand in one batch, so that a shuffled source is often of another domain.
    """
    rows = pair.samples.rows(split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))
    feeds = {student.feed for student in students.values()}
    outputs = any(student.mixes_outputs for student in students.values())
    found = {name: torch.zeros(len(rows)) for name in students}
    for level, sigma in enumerate(LEVELS):
        for part in order.split(BATCH):
            with autocast():
                draw = even_draw(pair.samples, rows[part], sigma, level)
                batch = pair.batch(draw, feeds, outputs=outputs, fusion=fusion)
                for name, student in students.items():
                    with student.attached(batch, pair.target):
                        error = student(batch, pair.target).float() - batch.wanted
                    found[name][part] += error.square().flatten(1).mean(1).cpu() / len(LEVELS)
            on_batch()
    return found


def candidates(pair: Pair, fusion: Fusion) -> dict[str, dict[str, Student]]:
    """Row -> setting -> student, for rows with a setting to pick."""
    from ditcache.bridge.capture import shape_of

    found: dict[str, dict[str, Student]] = {
        "output averaging": {f"share {a:g}": OutputAverage(a) for a in SHARES},
        "timestep switching": switches(),
    }
    if WeightAverage.fits(pair.target, pair.source):
        found["weight average"] = {f"share {a:g}": WeightAverage(pair.source, a) for a in SHARES}
    source, target = shape_of(pair.source), shape_of(pair.target)
    if (source.heads, source.head_dim) == (target.heads, target.head_dim):
        fixed = {"learnable_alpha": False, "alpha_granularity": "global"}
        found["weighted, fixed alpha"] = {
            f"alpha {a:g}": Bridged(
                Weighted(fusion_alpha=a, **fixed).make(source, target),  # type: ignore[arg-type]
                fusion,
            )
            for a in SHARES
        }
        found["identity"] = {"": Bridged(Identity().make(source, target), fusion)}
    return found


def switches() -> dict[str, Student]:
    """The source above or below each noise level between two that are judged, or nowhere."""
    found: dict[str, Student] = {"target throughout": TimestepSwitch(2.0, source_above=True)}
    for high, low in pairwise(LEVELS):
        sigma = (high + low) / 2
        for name, above in (("above", True), ("below", False)):
            found[f"source {name} sigma {sigma:.2f}"] = TimestepSwitch(sigma, source_above=above)
    return found


def untrained(
    pair: Pair, fusion: Fusion, autocast: Any, on_batch: Callable[[], None], *, mixed: bool = True
) -> dict[str, tuple[Student, str]]:
    """Row -> student and its setting: the two models alone, and unless `mixed` is False what mixes
    them without training, with settings picked on the validation clips.
    """
    options = candidates(pair, fusion) if mixed else {}
    flat = {
        f"{row}|{setting}": student
        for row, settings in options.items()
        for setting, student in settings.items()
        if len(settings) > 1
    }
    known = losses_of(pair, flat, fusion, "validation", autocast, on_batch) if flat else {}
    chosen: dict[str, tuple[Student, str]] = {
        TARGET: (Alone(), ""),
        SOURCE: (Alone(source=True), ""),
    }
    for row, settings in options.items():
        scores = {s: float(known[f"{row}|{s}"].mean()) for s in settings if len(settings) > 1}
        best = min(scores, key=scores.__getitem__) if scores else next(iter(settings))
        chosen[row] = (settings[best], best)
    return chosen


@torch.no_grad()
def measure_costs(
    pair: Pair, students: Mapping[str, Student], fusion: Fusion, autocast: Any, repeats: int = 5
) -> dict[str, float]:
    """Wall time of one step with each student, relative to the target's alone; medians, students
    taking turns. One clip, as in generation.
    """
    draw = even_draw(pair.samples, pair.samples.rows("test")[:1], 0.5, 0)
    feeds = {student.feed for student in students.values()}
    with autocast():
        batch = pair.batch(draw, feeds, outputs=True, fusion=fusion)
        alone: list[float] = []
        taken: dict[str, list[float]] = {name: [] for name in students}
        for _ in range(repeats):
            alone.append(clocked(pair, lambda: batch.seen.call(pair.target)))
            for name, student in students.items():
                with student.attached(batch, pair.target):
                    taken[name].append(clocked(pair, partial(step_of, pair, student, batch)))
    return {name: statistics.median(times) / statistics.median(alone)
            for name, times in taken.items()}  # fmt: skip


def step_of(pair: Pair, student: Student, batch: Batch) -> None:
    """Everything that one denoising step needs with this student, which is attached."""
    for role in student.asks(0.5):
        batch.seen.call(pair.source if role == "source" else pair.target)
    student(batch, pair.target)


def clocked(pair: Pair, work: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if pair.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
