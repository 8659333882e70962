"""The source's keys and values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.bridge.projectors.base import Projector, Shape

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net


@dataclass
class Identity(Projector):
    """The source's keys and values in place of the target's. Nothing to train; a control more than
    a method, because it is open from the start.
    """

    @property
    def learns(self) -> bool:
        return False

    def build(self, source: Shape, target: Shape) -> Net:
        from ditcache.bridge.nets import IdentityNet

        return IdentityNet(source, target)
