"""PSNR and SSIM against scikit-image and against arithmetic."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim

RNG = np.random.default_rng(0)
CLIP = RNG.random((4, 40, 56, 3)).astype(np.float32)
NOISY = np.clip(CLIP + 0.1 * RNG.standard_normal(CLIP.shape), 0, 1).astype(np.float32)


def test_psnr_agrees_with_scikit_image():
    expected = peak_signal_noise_ratio(
        CLIP.astype(np.float64), NOISY.astype(np.float64), data_range=1
    )
    assert psnr(CLIP, NOISY) == pytest.approx(expected, abs=1e-9)


def test_ssim_agrees_with_scikit_image():
    """Inside the border of five pixels, which scikit-image's mean leaves out as well."""
    expected = np.mean(
        [
            structural_similarity(
                a.astype(np.float64),
                b.astype(np.float64),
                data_range=1,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                truncate=3.5,
            )
            for a, b in zip(CLIP, NOISY, strict=True)
        ]
    )
    assert ssim(CLIP, NOISY) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("sigma", "expected"), [(16, 24.4), (40, 16.9), (80, 11.9)])
def test_d1_psnr_has_no_floor(sigma, expected):
    """In uint8 arithmetic differences wrap around and no PSNR falls below 24 dB."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 200, 200, 3)).astype(float)
    noisy = np.clip(image + sigma * rng.standard_normal(image.shape), 0, 255).round()
    assert psnr(image / 255, noisy / 255) == pytest.approx(expected, abs=0.1)


def test_identical_videos():
    assert math.isinf(psnr(CLIP, CLIP))
    assert ssim(CLIP, CLIP) == pytest.approx(1)


def test_one_bad_frame_shows():
    bad = CLIP.copy()
    bad[2] = 1 - bad[2]
    values = psnr_per_frame(CLIP, bad)
    assert [math.isinf(v) for v in values] == [True, True, False, True]
    assert min(values) < psnr(CLIP, bad) == pytest.approx(min(values) + 10 * math.log10(4))


def test_unequal_lengths_are_refused():
    with pytest.raises(
        ValueError, match=r"reference is \(4, 40, 56, 3\), candidate is \(3, 40, 56, 3\)"
    ):
        psnr(CLIP, CLIP[:3])
    with pytest.raises(ValueError, match="compare videos of equal shape"):
        ssim(CLIP, CLIP[:3])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(CLIP[:, :8], CLIP[:, :8])
