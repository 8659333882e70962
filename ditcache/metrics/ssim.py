"""Structural similarity (Wang et al. 2004) on raw float frames. Knows nothing of models or
files.
"""

import numpy as np

SIZE, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean over frames, channels and pixels whose 11x11 Gaussian window (sigma 1.5) lies inside the
    frame; float64.

    reference, candidate: [T, H, W, 3] in 0..1, at least 11 pixels a side. Raises ValueError
    otherwise.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"ssim: reference is {reference.shape}, candidate is {candidate.shape}; "
            "compare videos of equal shape"
        )
    if min(reference.shape[1:3]) < SIZE:
        raise ValueError(
            f"ssim: frames must be at least {SIZE} pixels a side, got {reference.shape[1:3]}"
        )
    return float(np.mean([frame_ssim(a, b) for a, b in zip(reference, candidate, strict=True)]))


def frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One pair of frames [H, W, 3]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return float((luminance * structure).mean())


def blur(image: np.ndarray) -> np.ndarray:
    """Separable Gaussian without padding: [H, W, C] -> [H - 10, W - 10, C]."""
    offsets = np.arange(SIZE) - SIZE // 2
    kernel = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    kernel /= kernel.sum()
    height, width = image.shape[0] - SIZE + 1, image.shape[1] - SIZE + 1
    rows = sum(weight * image[i : i + height] for i, weight in enumerate(kernel))
    return np.asarray(sum(weight * rows[:, i : i + width] for i, weight in enumerate(kernel)))
