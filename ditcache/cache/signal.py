"""Signals policies measure. Each costs one synchronisation with the device."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def relative_l1(value: Tensor, reference: Tensor) -> float:
    """mean|value - reference| / mean|reference|, the largest over the batch: one restless sample
    computes.

    value, reference: [B, N, D]. Sums are taken in fp32; the difference is not, since that of two
    near numbers is exact. NaN or infinity is returned as NaN with a warning, and every comparison
    with it says compute.
    """
    dims = tuple(range(1, value.ndim))
    change = torch.linalg.vector_norm(value - reference, 1, dims, dtype=torch.float32)
    size = torch.linalg.vector_norm(reference, 1, dims, dtype=torch.float32)
    signal = float((change / size).max())
    if not math.isfinite(signal):
        message = "step cache: a signal is not finite; computing instead of reusing"
        warnings.warn(message, stacklevel=2)
        return math.nan
    return signal
