"""A fixed or learned share of the way from the target to the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.bridge.projectors.base import Projector, Shape
from ditcache.errors import one_of

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net

GRANULARITIES = ("global", "layer", "head")


@dataclass
class Weighted(Projector):
    """t + a (s - t), for keys and values alike.

    fusion_alpha: a, where it is fixed; the most |a| can become, where it is learned.
    learnable_alpha: a starts at 0, that is closed, and is learned. A fixed one is open from the
    start, and 0.5 is much for a frozen target. alpha_granularity: one a (`global`), one per layer
    for keys and one for values (`layer`), or one per head as well (`head`).
    """

    fusion_alpha: float = 0.5
    learnable_alpha: bool = True
    alpha_granularity: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fusion_alpha <= 1:
            raise ValueError(f"fusion_alpha: must be from 0 to 1, got {self.fusion_alpha}")
        if self.alpha_granularity not in GRANULARITIES:
            found = self.alpha_granularity
            raise ValueError(f"alpha_granularity: no '{found}'. {one_of(found, GRANULARITIES)}")
        if self.learnable_alpha and self.fusion_alpha == 0:
            raise ValueError("fusion_alpha: 0 leaves learnable_alpha nothing to learn")
        if not self.learnable_alpha and self.alpha_granularity != "global":
            raise ValueError(
                "alpha_granularity: has no effect on a fixed alpha; set alpha_granularity=global "
                "or learnable_alpha=true"
            )

    @property
    def learns(self) -> bool:
        return self.learnable_alpha

    def build(self, source: Shape, target: Shape) -> Net:
        from ditcache.bridge.nets import WeightedNet

        return WeightedNet(self, source, target)
