"""A bridge at work: while one target denoises, its blocks read what its sources make of the same
noisy latents.

Attached for one generation, on the target alone: nothing is left behind on the source. The source
runs only when a fused block of the target asks, so that a step on which a step cache skips them
costs no source forward. Letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditcache.bridge.capture import Seen, ends, fuse, fusing, told_apart
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.nets import KeyValues, Net
from ditcache.bridge.readers import Reader, StoreReader, StreamReader
from ditcache.errors import DitcacheError
from ditcache.store.base import Store

GENERATIONS = itertools.count(1_000_000)  # apart from the step cache's, which may share the store


@dataclass
class Source:
    """One source of a run. texts: branch -> [1, 512, D], in its transformer's dtype; image: its own
    embedding of the picture. condition: what it sees in place of the target's channels of the
    picture (None: the same).
    """

    transformer: nn.Module
    net: Net
    texts: Mapping[str, Tensor]
    image: Tensor | None = None
    condition: Tensor | None = None

    def reads(self, seen: Seen, branch: str) -> Seen:
        """The target's inputs, with the source's own reading of caption and picture."""
        latents = seen.latents.to(next(self.transformer.parameters()).dtype)
        if self.condition is not None:
            noisy, condition = latents[:, : -self.condition.shape[1]], self.condition
            if condition.shape[2] > noisy.shape[2]:  # ChronoEdit has dropped its reasoning frames
                condition = condition[:, :, [0, -1]]
            latents = torch.cat([noisy, condition.to(latents)], 1)
        return Seen(latents, seen.timestep, self.texts[branch], self.image)


class Bridge:
    """One target's sources during one generation.

    asked: (step, source, branch) of every source forward, in order. recomputed: source forwards
    that only replaced what a store had lost. drafted: source forwards of a first stage. blocks: of
    sources, run so far. seconds: spent in `source` and `projector`, where the device is a CPU.
    """

    def __init__(
        self, target: nn.Module, sources: Mapping[str, Source], fusion: Fusion, store: Store
    ):
        self.target, self.sources, self.fusion, self.store = target, dict(sources), fusion, store
        self.generation = next(GENERATIONS)
        self.asked: list[tuple[int, str, str]] = []
        self.recomputed = self.drafted = self.blocks = 0
        self.seconds = {"source": 0.0, "projector": 0.0}
        self.readers: dict[tuple[str, str], Reader] = {}
        self.call: Call | None = None
        self.step, self.sigma = -1, 2.0
        self.asking = False

    @contextmanager
    def attached(self, texts: Mapping[str, Tensor]) -> Iterator[Bridge]:
        """Within, the target is bridged. texts: what it reads in each branch, by which its forwards
        are told apart. Puts the target back as it was, also after an exception.
        """
        for name, source in self.sources.items():
            missing = sorted(set(texts) - set(source.texts))
            if missing:
                raise DitcacheError(f"bridge: source {name} has no text for branch {missing[0]}")
        self.store.open()
        handles = [
            self.target.register_forward_pre_hook(
                lambda module, args, kwargs: self.begin(texts, args, kwargs), with_kwargs=True
            )
        ]
        try:
            with fusing(self.target, self.fused):
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.readers.clear()
            self.store.drop(self.generation)

    @property
    def forwards(self) -> int:
        """Source forwards so far."""
        return len(self.asked) + self.recomputed

    def begin(self, texts: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward of the target starts."""
        if self.asking:  # the source is the target itself
            return
        branch, seen = told_apart(texts, args, kwargs)
        sigma = float(seen.timestep[0]) / 1000
        if sigma != self.sigma:
            self.step, self.sigma = self.step + 1, sigma
        branches = {"both": branch, "cond": "cond" if branch == "cond" else None}
        reads = branches.get(self.fusion.branches, "cond")
        acts = reads is not None and self.fusion.acts_at(sigma)
        self.call = Call(self.step, sigma, branch, reads or branch, seen) if acts else None

    @torch.no_grad()
    def fused(self, layer: int, own: KeyValues) -> KeyValues:
        """What block `layer` of the target attends to."""
        call, limit = self.call, self.fusion.layers
        if self.asking or call is None or not (limit is None or layer < limit):
            return own
        said = {
            name: (source.net, self.read(name, source.net.partners[layer], call))
            for name, source in self.sources.items()
            if layer in source.net.partners
        }
        started = time.perf_counter()
        mixed = fuse(self.fusion, layer, own, said, call.seen.sigma, call.seen.latents.shape[2])
        self.seconds["projector"] += time.perf_counter() - started
        return mixed

    def read(self, name: str, layer: int, call: Call) -> KeyValues | None:
        """A source's keys and values at one of its layers; asks it first where that is due."""
        reader = self.reader(name, call.reads)
        if name not in call.checked:
            call.checked.add(name)
            changed = reader.seen is not None and reader.shape != call.seen.latents.shape
            due = changed or self.fusion.is_due(call.step, call.sigma, reader.last)
            if due and call.branch == call.reads:
                reader.shape = call.seen.latents.shape
                reader.last = (call.step, call.sigma)
                reader.refresh(self.seen_by(self.sources[name], call))
                self.asked.append((call.step, name, call.branch))
            elif changed:
                reader.forget()
        if reader.seen is None:
            return None
        started = time.perf_counter()
        self.asking = True
        try:
            return reader.get(layer)
        finally:
            self.asking = False
            self.seconds["source"] += time.perf_counter() - started

    def reader(self, name: str, branch: str) -> Reader:
        key = (name, branch)
        if key not in self.readers:
            cls = {"stream": StreamReader, "store": StoreReader}[self.fusion.driver]
            net, limit = self.sources[name].net, self.fusion.layers
            wanted = [s for t, s in net.partners.items() if limit is None or t < limit]
            self.readers[key] = cls(self, key, self.sources[name].transformer, wanted)
        return self.readers[key]

    def seen_by(self, source: Source, call: Call) -> Seen:
        """The call's inputs, as the source is shown them."""
        seen = source.reads(call.seen, call.reads)
        if ends(self.fusion) and seen.latents.shape[2] > 2:
            seen.latents = seen.latents[:, :, [0, -1]]
        return seen


@dataclass
class Call:
    """One forward of the target. reads: the branch whose source it reads. checked: sources that
    have been asked in it if that was due.
    """

    step: int
    sigma: float
    branch: str
    reads: str
    seen: Seen
    checked: set[str] = field(default_factory=set)
