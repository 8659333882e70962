"""Peak signal-to-noise ratio on raw float frames, in dB. Knows nothing of models or files."""

import math

import numpy as np


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """From the mean squared error over the whole video, in float64; infinite for equal videos.

    reference, candidate: [T, H, W, 3] in 0..1. Raises ValueError if their shapes differ.
    """
    return decibel(squared_error(reference, candidate).mean())


def psnr_per_frame(reference: np.ndarray, candidate: np.ndarray) -> list[float]:
    """One value per frame; their mean is not the PSNR of the video, their minimum is its worst
    frame.
    """
    return [decibel(error) for error in squared_error(reference, candidate).mean((1, 2, 3))]


def squared_error(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    if reference.shape != candidate.shape:
        raise ValueError(
            f"psnr: reference is {reference.shape}, candidate is {candidate.shape}; "
            "compare videos of equal shape"
        )
    return (reference.astype(np.float64) - candidate.astype(np.float64)) ** 2


def decibel(mean_squared_error: float) -> float:
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)
