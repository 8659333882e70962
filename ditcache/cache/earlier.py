"""The residuals that later segments of a long video may start with. Knows no policy.

Each segment keeps its own under a generation number of their own, so that they outlast the
generation that computed them and leave the store together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ditcache.store.base import Key, Store

if TYPE_CHECKING:
    from torch import Tensor


class Place(NamedTuple):
    """Where in a segment a residual belongs."""

    expert: str
    branch: str
    unit: int
    step: int


class Kept(NamedTuple):
    """segment: that computed it. signature: shape, dtype, device of the unit's input then."""

    segment: int
    signature: tuple
    key: Key


class Earlier:
    """Per place the newest residual of the segments in the window, in the order of their use."""

    def __init__(self, store: Store):
        self.store = store
        self.kept: dict[Place, Kept] = {}

    def put(
        self, place: Place, segment: int, number: int, signature: tuple, residual: Tensor
    ) -> None:
        """number: under which the segment keeps its own."""
        key = Key(number, place.expert, place.branch, place.unit, f"step{place.step}")
        old = self.kept.get(place)
        if old is not None and old.key != key:
            self.store.drop(*old.key)
        self.kept[place] = Kept(segment, signature, key)
        self.store.put(key, residual)

    def get(self, place: Place, signature: tuple) -> Tensor | None:
        """None if there is none for an input like this one, or the store has lost it."""
        kept = self.kept.get(place)
        if kept is None or kept.signature != signature:
            return None
        return self.store.get(kept.key)

    def forget(self, expert: str, before: int) -> None:
        """Drop what an expert computed in segments with lower numbers than `before`."""
        for place in [p for p, kept in self.kept.items() if p.expert == expert]:
            if self.kept[place].segment < before:
                self.store.drop(*self.kept.pop(place).key)

    def upcoming(self, after: Place) -> Iterator[Key]:
        """Keys that the rest of this step and the next one ask for, in order."""
        passed = after not in self.kept
        for place, kept in self.kept.items():
            if place.step > after.step + 1:
                return
            if place.step >= after.step and (passed or place.step > after.step):
                yield kept.key
            passed = passed or place == after

    def all(self) -> Iterator[Key]:
        """Keys in the order in which the next segment asks for them."""
        return (kept.key for kept in self.kept.values())

    def clear(self) -> None:
        """The video is over."""
        for kept in self.kept.values():
            self.store.drop(*kept.key)
        self.kept.clear()
