"""Distance between final latents, before any decoder. Knows nothing of models, and of torch only
that its tensors can say `.detach()`.
"""

import math
from typing import Any

import numpy as np


def latent(reference: Any, candidate: Any) -> float:
    """Relative L2: |candidate - reference| / |reference| over all elements, float64, no unit.

    0 for equal latents, about 1.4 for unrelated ones of equal size. Blind to what the decoder makes
    of it: equal errors can look very different. Comparable only within one model.

    reference, candidate: arrays or torch tensors of one shape, any float dtype and device. Raises
    ValueError if their shapes differ.
    """
    before, after = float64(reference), float64(candidate)
    if before.shape != after.shape:
        raise ValueError(
            f"latent: reference is {before.shape}, candidate is {after.shape}; "
            "compare latents of equal shape"
        )
    distance, size = (float(np.linalg.norm(x.ravel())) for x in (after - before, before))
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / size


def float64(latents: Any) -> np.ndarray:
    """numpy reads neither bfloat16 nor tensors on a device: torch converts its own."""
    if hasattr(latents, "detach"):
        latents = latents.detach().cpu().double().numpy()
    return np.asarray(latents, dtype=np.float64)
