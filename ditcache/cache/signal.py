"""Signals policies measure."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def change(value: Tensor, reference: Tensor) -> Tensor:
    """mean|value - reference| / mean|reference| per sample, [B, ...] -> [B] fp32, without a sync.

    Sums are taken in fp32; the difference is not, since that of two near numbers is exact.
    """
    dims = tuple(range(1, value.ndim))
    difference = torch.linalg.vector_norm(value - reference, 1, dims, dtype=torch.float32)
    return difference / torch.linalg.vector_norm(reference, 1, dims, dtype=torch.float32)


def largest(values: Tensor) -> float:
    """The largest of [B] as a number: one restless sample computes. One synchronisation.

    NaN or infinity is returned as NaN with a warning, and every comparison with it says compute.
    """
    signal = float(values.max())
    if not math.isfinite(signal):
        message = "step cache: a signal is not finite; computing instead of reusing"
        warnings.warn(message, stacklevel=2)
        return math.nan
    return signal


def relative_l1(value: Tensor, reference: Tensor) -> float:
    """The largest `change` over the batch."""
    return largest(change(value, reference))
