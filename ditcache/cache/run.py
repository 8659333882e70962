"""A run over all experts of one pipeline, and one forward in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ditcache.cache.earlier import Earlier
from ditcache.cache.policies.base import Context, Schedule
from ditcache.cache.state import Generation
from ditcache.cache.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.store.base import Store

GENERATIONS = itertools.count(1)  # unique in the process, so that caches may share a store


class Run:
    """What all experts of one pipeline share: the store, the trace and the generation under way."""

    def __init__(self, store: Store):
        self.store, self.trace = store, Trace()
        self.generation: Generation | None = None
        self.segment: int | None = None  # None: every generation is a video of its own
        self.earlier = Earlier(store)

    @contextmanager
    def one_video(self) -> Iterator[None]:
        """The generations inside are segments of one video."""
        self.end()
        self.segment = -1
        try:
            yield
        finally:
            self.end()
            self.earlier.clear()
            self.segment = None

    def begin(self, schedule: Schedule) -> Generation:
        """Start a new generation with nothing remembered."""
        self.end()
        if self.segment is not None:
            self.segment += 1
        if not self.segment:
            self.trace = Trace()
        number, shelf = next(GENERATIONS), next(GENERATIONS)
        self.generation = Generation(number, schedule.num_steps, self.store, self.segment, shelf)
        return self.generation

    def end(self) -> None:
        """Free everything the generation kept; the trace stays readable."""
        if self.generation is not None:
            self.generation.free()
            self.generation = None


class Call:
    """One forward of the expert: where it is in the run, and what has been decided for all of its
    units.
    """

    __slots__ = (
        "branch",
        "computed",
        "latents",
        "leader",
        "num_steps",
        "output",
        "probe_residual",
        "sigma",
        "step",
        "timestep",
    )

    def __init__(
        self,
        branch: str,
        step: int,
        num_steps: int,
        sigma: float | None,
        timestep: Tensor | None,
        latents: Tensor | None = None,
    ):
        self.branch, self.step, self.num_steps = branch, step, num_steps
        self.sigma, self.timestep, self.latents = sigma, timestep, latents
        self.probe_residual: Tensor | None = None
        # What the first unit did and why; the others follow it.
        self.leader: tuple[bool, str] | None = None
        self.computed: Context | None = None  # of the first unit, if it computed
        self.output: Tensor | None = None  # stands in for the whole forward's output
