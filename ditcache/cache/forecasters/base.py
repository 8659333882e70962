"""What a forecaster is: it says *what* stands in for a residual that is not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.state import UnitState


@dataclass
class Forecaster:
    """Base of all forecasters. Keeps its tensors in the unit's state, at most `tensors` of them."""

    @property
    def tensors(self) -> int:
        """Residuals kept per unit and branch."""
        return 1

    def observe(self, state: UnitState, step: int, residual: Tensor) -> None:
        """Take in the residual [B, N, D] computed at `step`; the tensor is given away."""
        slot = str(len(state.computed) % self.tensors)
        state.put(slot, residual)
        state.computed.append((step, slot))

    def forecast(self, state: UnitState, step: int) -> Tensor | None:
        """The residual expected at `step`, or None if what it needs is not there (then the unit
        computes).
        """
        raise NotImplementedError
