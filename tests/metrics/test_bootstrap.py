"""Bootstrap intervals against scipy and against the truth they should cover."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.metrics.bootstrap import Interval, bootstrap, paired_bootstrap

VALUES = np.random.default_rng(0).exponential(2, 25)


def test_agrees_with_scipy():
    theirs = scipy.stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, method="percentile",
        confidence_level=0.9, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = bootstrap(VALUES, level=0.9, resamples=20_000)
    assert ours.mean == VALUES.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential"])
def test_covers_the_truth_about_as_often_as_it_says(draw):
    rng = np.random.default_rng(2)
    truth = {"standard_normal": 0, "standard_exponential": 1}[draw]
    found = [bootstrap(getattr(rng, draw)(60), resamples=400, seed=k) for k in range(400)]
    assert 0.88 <= np.mean([i.low <= truth <= i.high for i in found]) <= 0.98
    third = [3 * (truth - i.mean) + i.mean for i in found]  # as if intervals were a third as wide
    assert np.mean([i.low <= t <= i.high for t, i in zip(third, found, strict=True)]) < 0.7


@pytest.mark.parametrize(("prompts", "covered"), [(5, 0.82), (20, 0.92)])
def test_too_narrow_for_few_prompts_as_documented(prompts, covered):
    rng = np.random.default_rng(4)
    found = [bootstrap(rng.standard_normal(prompts), resamples=400, seed=k) for k in range(600)]
    assert np.mean([i.low <= 0 <= i.high for i in found]) == pytest.approx(covered, abs=0.035)


def test_paired_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(3)
    before = 10 * rng.standard_normal(20)
    after = before + 1 + 0.5 * rng.standard_normal(20)
    difference = paired_bootstrap(before, after)
    assert 0 < difference.low < 1 < difference.high < 2
    assert bootstrap(before).high > bootstrap(after).low
    assert paired_bootstrap(after, before) == pytest.approx(
        (-difference.mean, -difference.high, -difference.low), abs=0.05
    )


def test_one_prompt_and_equal_prompts_give_the_value():
    assert bootstrap([3.5]) == Interval(3.5, 3.5, 3.5)
    assert bootstrap([2.0] * 7) == (2, 2, 2)
    assert paired_bootstrap([1.0], [3.0]) == (2, 2, 2)


def test_infinite_psnr_and_nan():
    assert bootstrap([math.inf] * 3) == (math.inf,) * 3
    mixed = bootstrap([30.0, 40.0, math.inf])
    assert mixed.mean == mixed.high == math.inf and 30 <= mixed.low < 40
    assert all(map(math.isnan, bootstrap([1.0, math.nan])))
    assert paired_bootstrap([math.inf, 30.0], [math.inf, 30.0]) == (0, 0, 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 9))
def test_ordered_inside_the_sample_and_deterministic(values, seed):
    found = bootstrap(values, resamples=200, seed=seed)
    assert found == bootstrap(values, resamples=200, seed=seed)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_settings_are_refused():
    with pytest.raises(
        ValueError, match=r"bootstrap: needs one value per prompt, got shape \(0,\)"
    ):
        bootstrap([])
    with pytest.raises(ValueError, match="level: must be between 0 and 1, got 95"):
        bootstrap([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="resamples: must be >= 1, got 0"):
        bootstrap([1.0, 2.0], resamples=0)
    with pytest.raises(ValueError, match="bootstrap: 2 values before, 1 after; pair them"):
        paired_bootstrap([1.0, 2.0], [1.0])
