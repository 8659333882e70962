"""Measurements -> TeaCache's polynomial and MagCache's ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditcache.calibrate.measure import Measured


@dataclass
class Polynomial:
    """A least-squares fit of the output's change on a signal's.

    coefficients: highest degree first. r2: share of the variance explained. signal, change: the
    points it was fitted to.
    """

    coefficients: list[float]
    r2: float
    signal: np.ndarray
    change: np.ndarray


def fit_polynomial(
    signal: Sequence[float], runs: Sequence[Measured], *, degree: int = 4
) -> Polynomial:
    """signal [T]: the embedding's relative change at each step, the same for every run. One point
    per step, branch and run.
    """
    x, y = [], []
    for run in runs:
        for changes in run.change.values():
            for step, change in enumerate(changes):
                if np.isfinite(change):
                    x.append(signal[step])
                    y.append(change)
    points, values = np.array(x), np.array(y)
    degree = min(degree, len(set(x)) - 1)
    scale = points.max()  # powers of small numbers would be lost
    scaled = np.polyfit(points / scale, values, degree)
    coefficients = scaled / scale ** np.arange(degree, -1, -1)
    left = values - np.polyval(coefficients, points)
    r2 = 1 - left.var() / values.var()
    return Polynomial([float(c) for c in coefficients], float(r2), points, values)


def mean_ratios(runs: Sequence[Measured]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per branch: mean and spread over runs of every step's magnitude ratio, 1 at the starts."""
    found = {}
    for branch in runs[0].ratio:
        ratios = np.array([run.ratio[branch] for run in runs])
        ratios[np.isnan(ratios)] = 1.0
        found[branch] = (ratios.mean(0), ratios.std(0))
    return found
