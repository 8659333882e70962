"""PSNR against scikit-image, torchmetrics and arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from ditcache.metrics.psnr import psnr, psnr_per_frame

RNG = np.random.default_rng(0)
CLIP = RNG.random((4, 40, 56, 3)).astype(np.float32)
NOISE = RNG.standard_normal(CLIP.shape)
NOISY = np.clip(CLIP + 0.1 * NOISE, 0, 1).astype(np.float32)


def test_agrees_with_scikit_image():
    wide = [video.astype(np.float64) for video in (CLIP, NOISY)]
    assert psnr(CLIP, NOISY) == pytest.approx(
        peak_signal_noise_ratio(*wide, data_range=1), abs=1e-9
    )


def test_agrees_with_torchmetrics():
    wide = [torch.from_numpy(video).double() for video in (NOISY, CLIP)]
    expected = torchmetrics_psnr(*wide, data_range=1.0).item()
    assert psnr(CLIP, NOISY) == pytest.approx(expected, abs=1e-6)
    frames = [torchmetrics_psnr(a, b, data_range=1.0).item() for a, b in zip(*wide, strict=True)]
    assert psnr_per_frame(CLIP, NOISY) == pytest.approx(frames, abs=1e-6)


@pytest.mark.parametrize(("sigma", "expected"), [(16, 24.4), (40, 16.9), (80, 11.9)])
def test_d1_psnr_has_no_floor(sigma, expected):
    """In uint8 arithmetic differences wrap around and no PSNR falls below 24 dB."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 200, 200, 3)).astype(float)
    noisy = np.clip(image + sigma * rng.standard_normal(image.shape), 0, 255).round()
    assert psnr(image / 255, noisy / 255) == pytest.approx(expected, abs=0.1)


def test_black_against_white_is_zero():
    assert psnr(np.zeros((2, 12, 12, 3)), np.ones((2, 12, 12, 3))) == 0


def test_identical_videos():
    assert math.isinf(psnr(CLIP, CLIP)) and all(map(math.isinf, psnr_per_frame(CLIP, CLIP)))


def test_one_bad_frame_shows():
    bad = CLIP.copy()
    bad[2] = 1 - bad[2]
    values = psnr_per_frame(CLIP, bad)
    assert [math.isinf(v) for v in values] == [True, True, False, True]
    assert min(values) < psnr(CLIP, bad) == pytest.approx(min(values) + 10 * math.log10(4))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.001, 0.3), st.floats(1.05, 3))
def test_symmetric_and_falls_with_noise(strength, more):
    little, much = CLIP + strength * NOISE, CLIP + more * strength * NOISE
    assert psnr(CLIP, little) == psnr(little, CLIP) > psnr(CLIP, much)
    assert psnr(CLIP, little) - psnr(CLIP, much) == pytest.approx(20 * math.log10(more), abs=1e-4)


def test_unequal_lengths_are_refused():
    message = r"psnr: reference is \(4, 40, 56, 3\), candidate is \(3, 40, 56, 3\); compare"
    with pytest.raises(ValueError, match=message):
        psnr(CLIP, CLIP[:3])


def test_bytes_and_single_images_are_refused():
    with pytest.raises(ValueError, match="psnr: candidate is uint8; needs float frames in 0"):
        psnr(CLIP, CLIP.astype(np.uint8))
    with pytest.raises(ValueError, match=r"psnr: needs frames \[T, H, W, 3\], got \(40, 56, 3\)"):
        psnr(CLIP[0], CLIP[0])
