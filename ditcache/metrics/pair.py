"""Two videos that are to be compared, frame by frame in float64. Knows nothing of metrics.

Frame by frame so that the largest temporary is one frame: 81 frames of 480 x 832 would be 0.8 GB
each time they are copied to float64.
"""

from collections.abc import Iterator

import numpy as np


def check_pair(metric: str, reference: np.ndarray, candidate: np.ndarray) -> None:
    """Raises ValueError, starting with the metric's name, unless both are float videos
    [T, H, W, 3] of one shape.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"{metric}: reference is {reference.shape}, candidate is {candidate.shape}; "
            "compare videos of equal shape"
        )
    if reference.ndim != 4 or reference.shape[3] != 3 or reference.shape[0] == 0:
        raise ValueError(f"{metric}: needs frames [T, H, W, 3], got {reference.shape}")
    for name, frames in (("reference", reference), ("candidate", candidate)):
        if not np.issubdtype(frames.dtype, np.floating):
            raise ValueError(
                f"{metric}: {name} is {frames.dtype}; needs float frames in 0..1 as they left the "
                "decoder"
            )


def frame_pairs(
    metric: str, reference: np.ndarray, candidate: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Checked pairs of float64 frames [H, W, 3]; raises as `check_pair` at once, not when used."""
    check_pair(metric, reference, candidate)
    return (
        (a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(reference, candidate, strict=True)
    )
