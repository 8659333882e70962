"""Peak signal-to-noise ratio on raw float frames, in dB. Knows nothing of models or files."""

import math

import numpy as np

from ditcache.metrics.pair import frame_pairs


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """From the mean squared error over the whole video, in float64; infinite for equal videos.

    reference, candidate: [T, H, W, 3] in 0..1. Raises ValueError if their shapes differ.
    """
    return decibel(squared_errors(reference, candidate).mean())


def psnr_per_frame(reference: np.ndarray, candidate: np.ndarray) -> list[float]:
    """One value per frame; their mean is not the PSNR of the video, their minimum is its worst
    frame.
    """
    return [decibel(error) for error in squared_errors(reference, candidate)]


def squared_errors(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Mean squared error of every frame, [T]."""
    pairs = frame_pairs("psnr", reference, candidate)
    return np.array([((a - b) ** 2).mean() for a, b in pairs])


def decibel(mean_squared_error: float) -> float:
    """For a peak of 1; NaN stays NaN."""
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)
