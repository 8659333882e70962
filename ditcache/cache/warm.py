"""One expert's part in a warm start: what its units take from earlier segments and leave to later
ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditcache.cache.earlier import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ditcache.cache.run import Call, Run
    from ditcache.cache.settings import CacheSettings
    from ditcache.cache.state import Generation, UnitState
    from ditcache.cache.streams import Work
    from ditcache.store.base import Key


class Warm:
    """Does nothing without a `warmstart`, and in videos of one piece."""

    def __init__(self, expert: str, settings: CacheSettings, run: Run):
        self.expert, self.settings, self.run = expert, settings, run
        self.warmstart = settings.warmstart

    def begin(self, generation: Generation) -> None:
        """A segment starts: what left the window goes."""
        if self.warmstart is not None and generation.segment is not None:
            self.run.earlier.forget(self.expert, generation.segment - self.warmstart.window)

    def takes(self, call: Call, generation: Generation) -> bool:
        """Whether this step is one of those that segments share."""
        if self.warmstart is None or generation.segment is None:
            return False
        return call.step < self.warmstart.steps

    def residual(
        self, call: Call, state: UnitState, index: int, generation: Generation
    ) -> Tensor | None:
        """What an earlier segment's unit computed at this step, for an input of this shape."""
        tail = call.step >= call.num_steps - self.settings.tail
        if tail or not generation.segment or not self.takes(call, generation):
            return None
        assert state.signature is not None
        return self.run.earlier.get(self.place(call, index), state.signature)

    def leave(
        self, state: UnitState, call: Call, index: int, generation: Generation, residual: Tensor
    ) -> None:
        """Keep what was computed for later segments."""
        assert generation.segment is not None and state.signature is not None
        self.run.earlier.put(
            self.place(call, index),
            generation.segment,
            generation.shelf,
            state.signature,
            residual.detach(),
        )

    def recall(
        self, call: Call, index: int, work: Work, generation: Generation
    ) -> tuple[Tensor | None, str | None]:
        """The unit's output if another process has computed it; else the name under which to
        publish it, where the store is shared.
        """
        if not self.run.store.shares or not self.takes(call, generation):
            return None, None
        from ditcache.cache.content import name_of, weights_of

        place = (self.expert, index)
        if place not in generation.weights:  # once per generation: adapters come and go
            generation.weights[place] = weights_of(work.blocks)
        weights = generation.weights[place]
        if weights is None:
            return None, None
        name = name_of(work, weights)
        found = self.run.store.recall(name, work.joined.device)
        return found, None if found is not None else name

    def upcoming(self, call: Call, index: int, generation: Generation) -> Iterator[Key]:
        """What earlier segments left for the rest of this step and for the next."""
        if generation.segment and self.takes(call, generation):
            yield from self.run.earlier.upcoming(self.place(call, index))

    def later(self, call: Call, generation: Generation) -> Iterator[Key]:
        """At the end of a segment, what the next one will start with: as many steps are left to
        bring it near as it will take to use it.
        """
        if self.warmstart is None or generation.segment is None:
            return
        if call.step >= call.num_steps - self.warmstart.steps:
            yield from self.run.earlier.all()

    def place(self, call: Call, index: int) -> Place:
        return Place(self.expert, call.branch, index, call.step)
