"""SSIM against scikit-image and torchmetrics, whose border rules differ: scikit-image and we leave
five pixels out of the mean, torchmetrics reflects the frame and averages over all of it.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from ditcache.metrics.ssim import ssim, ssim_per_frame

RNG = np.random.default_rng(0)
CLIP = RNG.random((4, 40, 56, 3)).astype(np.float32)
NOISE = RNG.standard_normal(CLIP.shape)
NOISY = np.clip(CLIP + 0.1 * NOISE, 0, 1).astype(np.float32)
SMOOTH = np.broadcast_to(np.linspace(0.2, 0.4, 56)[:, None], CLIP.shape).astype(np.float32)


def scikit_image(a, b):
    return structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        data_range=1,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        truncate=3.5,
    )


OTHERS = pytest.mark.parametrize(
    "other", [NOISY, 1 - CLIP, SMOOTH], ids=["noisy", "inverted", "smooth"]
)


@OTHERS
def test_agrees_with_scikit_image(other):
    expected = [scikit_image(a, b) for a, b in zip(CLIP, other, strict=True)]
    assert ssim_per_frame(CLIP, other) == pytest.approx(expected, abs=1e-6)
    assert ssim(CLIP, other) == pytest.approx(np.mean(expected), abs=1e-6)


@OTHERS
def test_agrees_with_torchmetrics(other):
    """Inside the border, and with its border where frames are reflected before."""
    wide = [torch.from_numpy(video).double().permute(0, 3, 1, 2) for video in (other, CLIP)]
    theirs, image = structural_similarity_index_measure(
        *wide, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = image[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    assert ssim_per_frame(CLIP, other) == pytest.approx(inside.tolist(), abs=1e-6)
    border = ((0, 0), (5, 5), (5, 5), (0, 0))
    reflected = [np.pad(video, border, mode="reflect") for video in (CLIP, other)]
    assert ssim_per_frame(*reflected) == pytest.approx(theirs.tolist(), abs=1e-6)


def test_identical_videos():
    assert ssim(CLIP, CLIP) == pytest.approx(1, abs=1e-12)


def test_bad_where_structure_is_gone():
    assert ssim(CLIP, 1 - CLIP) < -0.5
    assert ssim(CLIP, SMOOTH) < 0.1


def test_one_bad_frame_shows():
    bad = CLIP.copy()
    bad[2] = 1 - bad[2]
    values = ssim_per_frame(CLIP, bad)
    assert np.argmin(values) == 2 and values[2] < -0.5 and values[0] == pytest.approx(1)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 0.3), st.floats(1.2, 3))
def test_symmetric_and_falls_with_noise(strength, more):
    little, much = SMOOTH + strength * NOISE, SMOOTH + more * strength * NOISE
    assert ssim(SMOOTH, little) == pytest.approx(ssim(little, SMOOTH), abs=1e-12)
    assert ssim(SMOOTH, little) > ssim(SMOOTH, much)


def test_memory_is_that_of_a_few_frames_whatever_the_length():
    def peak(frames):
        video = np.zeros((frames, 64, 64, 3), np.float32)
        tracemalloc.start()
        ssim(video, video)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(20) < 1.2 * peak(2)


def test_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"ssim: reference is \(4, .*compare videos of equal shape"
    ):
        ssim(CLIP, CLIP[:3])
    with pytest.raises(ValueError, match=r"ssim: .* at least 11 pixels a side, got \(8, 56\)"):
        ssim(CLIP[:, :8], CLIP[:, :8])
