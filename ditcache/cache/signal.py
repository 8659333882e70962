"""Signals policies measure. Each costs one synchronisation with the device."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_l1(value: Tensor, reference: Tensor) -> float:
    """mean|value - reference| / mean|reference| in fp32, the largest over the batch: one restless
    sample computes.

    value, reference: [B, N, D]. NaN or infinity is returned as NaN with a warning, and every
    comparison with it says compute.
    """
    change = (value.float() - reference.float()).abs().flatten(1).mean(1)
    size = reference.float().abs().flatten(1).mean(1)
    signal = float((change / size).max())
    if not math.isfinite(signal):
        warnings.warn(
            "step cache: a signal is not finite; computing instead of reusing", stacklevel=2
        )
        return math.nan
    return signal
