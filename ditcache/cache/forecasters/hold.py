"""The last residual again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.cache.forecasters.base import Combination

if TYPE_CHECKING:
    from ditcache.cache.policies.base import Context
    from ditcache.cache.state import Point


@dataclass
class Hold(Combination):
    """Reuse the residual of the last computed step unchanged. One tensor per unit and branch."""

    def weights(self, points: list[Point], ctx: Context) -> list[float]:
        return [1.0]
