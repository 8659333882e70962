"""How sure a mean over prompts is. Knows nothing of videos."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """mean: of the sample. low, high: ends of the confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979): draw as many prompts with replacement,
    `resamples` times, and keep the middle `level` of their means. Equal arguments, equal result.

    Says how much the mean depends on the choice of prompts, nothing else. Too narrow for few
    prompts: of intervals at 95 %, about 82 % cover the truth at 5 prompts and 92 % at 20. One
    prompt gives its value three times. Infinite values (PSNR of equal videos) sort above all
    others; NaN gives NaN. Raises ValueError if there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"bootstrap: needs one value per prompt, got shape {sample.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level: must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: must be >= 1, got {resamples}")
    mean = float(sample.mean())
    if np.isnan(sample).any() or sample.min() == sample.max():
        return Interval(mean, mean, mean)
    draws = np.random.default_rng(seed).integers(0, sample.size, (resamples, sample.size))
    means = np.sort(sample[draws].mean(1))
    # An actual mean at either end, not one between two: that would be NaN next to infinity.
    below = math.floor((1 - level) / 2 * (resamples - 1))
    return Interval(mean, float(means[below]), float(means[resamples - 1 - below]))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`bootstrap` of after - before, prompt by prompt: an interval without 0 is a difference. Much
    narrower than comparing two intervals, because hard prompts are hard for both. Two equal values,
    infinite ones too, differ by 0. Raises ValueError if the lengths differ.
    """
    first, second = (np.asarray(v, dtype=np.float64) for v in (before, after))
    if first.shape != second.shape:
        raise ValueError(
            f"bootstrap: {first.size} values before, {second.size} after; pair them by prompt"
        )
    differences = np.zeros_like(first)
    np.subtract(second, first, out=differences, where=first != second)
    return bootstrap(differences.tolist(), level=level, resamples=resamples, seed=seed)
