"""Structural similarity (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861) on raw float
frames. Knows nothing of models or files.
"""

import numpy as np

from ditcache.metrics.pair import frame_pairs

SIZE, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean over frames, channels and pixels whose 11x11 Gaussian window (sigma 1.5) lies inside the
    frame; float64, population covariance. 1 for equal videos.

    reference, candidate: [T, H, W, 3] in 0..1, at least 11 pixels a side. Raises ValueError
    otherwise.
    """
    return float(np.mean(ssim_per_frame(reference, candidate)))


def ssim_per_frame(reference: np.ndarray, candidate: np.ndarray) -> list[float]:
    """One value per frame; their mean is the SSIM of the video."""
    pairs = frame_pairs("ssim", reference, candidate)
    if min(reference.shape[1:3]) < SIZE:
        raise ValueError(
            f"ssim: frames must be at least {SIZE} pixels a side, got {reference.shape[1:3]}"
        )
    return [frame_ssim(a, b) for a, b in pairs]


def frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One pair of float64 frames [H, W, 3]. The two variances are needed only as their sum, so four
    blurs do.
    """
    mean_a, mean_b = blur(a), blur(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance = blur(a * b) - product
    variances = blur(a * a + b * b) - squares
    luminance = (2 * product + C1) / (squares + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return float((luminance * structure).mean())


def blur(image: np.ndarray) -> np.ndarray:
    """Separable Gaussian without padding: [H, W, C] -> [H - 10, W - 10, C]."""
    return blur_rows(blur_rows(image).swapaxes(0, 1)).swapaxes(0, 1)


def blur_rows(image: np.ndarray) -> np.ndarray:
    """Along the first axis: [N, ...] -> [N - 10, ...]. Adds the two rows of equal weight before it
    multiplies, in place: four times as fast as a plain weighted sum.
    """
    half, count = SIZE // 2, image.shape[0] - SIZE + 1
    kernel = np.exp(-0.5 * (np.arange(-half, 1) / SIGMA) ** 2)
    kernel /= 2 * kernel[:half].sum() + kernel[half]
    total = kernel[half] * image[half : half + count]
    both = np.empty_like(total)
    for near, weight in enumerate(kernel[:half]):
        far = SIZE - 1 - near
        np.add(image[near : near + count], image[far : far + count], out=both)
        both *= weight
        total += both
    return total
