"""The last residual again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Forecaster

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.state import UnitState


@dataclass
class Hold(Forecaster):
    """Reuse the residual of the last computed step unchanged. One tensor per unit and branch."""

    def forecast(self, state: UnitState, step: int) -> Tensor | None:
        return state.get(state.computed[-1][1])
