"""Temporal error and flicker against closed forms and direct arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.metrics.temporal import flicker, temporal

RNG = np.random.default_rng(0)
CLIP = RNG.random((6, 16, 20, 3)).astype(np.float32)
NOISE = RNG.standard_normal(CLIP.shape)
STILL = np.full((6, 16, 20, 3), 0.5)
SIGNS = np.array([1, -1, 1, -1, 1, -1]).reshape(6, 1, 1, 1)
RAMP = np.arange(6).reshape(6, 1, 1, 1) / 20


def test_temporal_is_the_mean_difference_of_differences():
    other = (CLIP + 0.1 * NOISE).astype(np.float32)
    a, b = CLIP.astype(np.float64), other.astype(np.float64)
    expected = np.abs(np.diff(b, axis=0) - np.diff(a, axis=0)).mean()
    assert temporal(CLIP, other) == pytest.approx(expected, abs=1e-12)
    assert temporal(STILL, STILL + 0.1 * SIGNS) == pytest.approx(0.2)
    assert temporal(STILL, STILL + RAMP) == pytest.approx(1 / 20)


def test_flicker_is_the_growth_of_the_second_difference():
    other = (CLIP + 0.3 * NOISE).astype(np.float32)
    a, b = CLIP.astype(np.float64), other.astype(np.float64)
    energies = [(np.diff(video, n=2, axis=0) ** 2).mean() + 255**-2 for video in (a, b)]
    expected = np.sqrt(energies[1] / energies[0]) - 1
    assert flicker(CLIP, other) == pytest.approx(expected, abs=1e-12)
    assert flicker(STILL, STILL + SIGNS / 255) == pytest.approx(np.sqrt(17) - 1)
    assert flicker(STILL + 0.1 * SIGNS, STILL + 0.2 * SIGNS) == pytest.approx(1, abs=1e-3)


def test_identical_videos():
    assert temporal(CLIP, CLIP) == 0 and flicker(CLIP, CLIP) == 0
    assert temporal(STILL, STILL) == 0 and flicker(STILL, STILL) == 0


def test_bad_where_frames_alternate():
    trembling = STILL + RAMP + 0.05 * SIGNS
    assert temporal(STILL + RAMP, trembling) == pytest.approx(0.1)
    assert flicker(STILL + RAMP, trembling) > 10


def test_blind_as_documented():
    """A still error, an even drift, a frozen candidate."""
    assert temporal(CLIP, CLIP + np.float32(0.25)) == pytest.approx(0, abs=1e-7)
    assert flicker(STILL, STILL + RAMP) == pytest.approx(0, abs=1e-9)
    frozen = np.broadcast_to(CLIP[:1], CLIP.shape)
    assert flicker(CLIP, frozen) == 0
    assert temporal(CLIP, frozen) > 0.3


def test_flicker_below_one_8_bit_level_hardly_counts():
    assert flicker(STILL, STILL + 0.01 * SIGNS / 255) < 0.001


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.3), st.floats(1.1, 3))
def test_temporal_is_symmetric_and_both_grow_with_noise(strength, more):
    little, much = STILL + strength * NOISE, STILL + more * strength * NOISE
    assert temporal(STILL, little) == temporal(little, STILL)
    assert temporal(STILL, much) == pytest.approx(more * temporal(STILL, little))
    assert flicker(STILL, much) > flicker(STILL, little) > 0 == flicker(little, STILL)


def test_nan_is_not_taken_for_no_flicker():
    broken = CLIP.copy()
    broken[2, 3, 4, 0] = np.nan
    assert np.isnan(flicker(CLIP, broken)) and np.isnan(temporal(CLIP, broken))


@pytest.mark.parametrize("metric", [temporal, flicker])
def test_shapes_and_short_videos_are_refused(metric):
    name = metric.__name__
    with pytest.raises(
        ValueError, match=rf"{name}: reference is \(6, 16, 20, 3\), candidate is \(5"
    ):
        metric(CLIP, CLIP[:5])
    with pytest.raises(ValueError, match=rf"{name}: needs at least [23] frames, got 1"):
        metric(CLIP[:1], CLIP[:1])
