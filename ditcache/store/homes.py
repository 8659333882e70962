"""Which tier every entry lives in: filled from the top, the least recently used going down.

Where an entry lives follows from the order of calls alone, never from how fast a medium is. So with
the same budgets the same entries are evicted, and a lossy codec meets the same entries, every time.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditcache.store.base import Fault, Key, Pending, Tier
from ditcache.store.codec import Packed, encode

if TYPE_CHECKING:
    import torch

    from ditcache.store.staging import Staging


@dataclass(eq=False)
class Entry:
    """A tensor that is kept. level: number of its tier, nbytes: what it takes there, size: of its
    content. flight: the move that brings it there; handle: the tier's, once it has arrived.
    """

    key: Key
    device: torch.device
    level: int = 0
    nbytes: int = 0
    size: int = 0
    flight: Flight | None = None
    handle: Any = None
    alive: bool = True


@dataclass(eq=False)
class Source:
    """Where a flight comes from; its bytes are free once the flight has landed."""

    tier: Tier
    handle: Any
    nbytes: int

    def release(self) -> None:
        if self.handle is not None:
            self.tier.delete(self.handle)
        self.handle = None
        self.tier.release(self.nbytes)


@dataclass(eq=False)
class Flight:
    """A move that takes up bytes at both of its ends. packed: what is moved, readable meanwhile."""

    pending: Pending
    source: Source | None
    entry: Entry | None = None  # None: a copy that nobody waits for any more
    tier: Tier | None = None
    packed: Packed | None = None

    def frees(self, tier: Tier) -> bool:
        """Whether `tier` has more room once this has landed."""
        dead = self.entry is not None and not self.entry.alive and self.tier is tier
        return dead or (self.source is not None and self.source.tier is tier)


class Homes:
    """The tiers in order, and the entries in each, least recently used first."""

    def __init__(self, tiers: list[Tier]):
        self.tiers = tiers
        self.index: dict[Key, Entry] = {}
        self.at: list[OrderedDict[Key, Entry]] = [OrderedDict() for _ in tiers]
        self.held = [0] * len(tiers)  # bytes of the entries that live there
        self.flights: list[Flight] = []
        self.reads: list[tuple[Tier, Pending, int]] = []  # under way, to be added up
        self.warned: set[str] = set()
        self.staging: Staging

    def place(self, entry: Entry, packed: Packed, level: int, source: Source | None = None) -> None:
        """Give an entry a home in the first tier from `level` on that is large enough; where there
        is none, it is gone.
        """
        while level < len(self.tiers):
            tier = self.tiers[level]
            coded = encode(packed, tier.codec)
            nbytes = tier.size(coded)
            if tier.budget is None or nbytes <= tier.budget:
                break
            level += 1
        else:
            self.evict(entry, self.tiers[-1])
            if source is not None:
                source.release()
            return
        self.make_room(level, nbytes)
        tier.take(nbytes)
        flight = Flight(tier.write(coded), source, entry, tier, coded)
        entry.level, entry.nbytes, entry.size = level, nbytes, coded.nbytes
        entry.flight, entry.handle = flight, None
        self.index[entry.key] = self.at[level][entry.key] = entry
        self.held[level] += nbytes
        self.flights.append(flight)
        if source is None or flight.pending.done():  # without a source no budget covers a wait
            self.land(flight)

    def make_room(self, level: int, nbytes: int) -> None:
        """First by sending entries down, then by waiting until they have left."""
        tier = self.tiers[level]
        if tier.budget is None:
            return
        while self.held[level] + nbytes > max(nbytes, self.limit(level)):
            self.spill(level)
        while tier.used + nbytes > tier.budget:
            if level > 0 or not self.staging.drop_oldest():
                self.land(next(flight for flight in self.flights if flight.frees(tier)))

    def limit(self, level: int) -> int:
        """Bytes that entries may fill. Once some live below the first tier, an eighth of it stays
        free of homes: there their copies land, and there a new entry waits for an old one to leave.
        """
        budget = self.tiers[level].budget
        assert budget is not None
        staged = level == 0 and self.tiers[0].memory and any(self.at[1:])
        return budget - budget // 8 if staged else budget

    def spill(self, level: int) -> None:
        """The least recently used entry of a tier goes one down; past the last it is gone."""
        entry, tier = next(iter(self.at[level].values())), self.tiers[level]
        if level == len(self.tiers) - 1:
            self.evict(entry, tier)
            return
        if entry.flight is not None:
            self.land(entry.flight)
        self.staging.wait_for(entry)  # it may be reading what is about to be removed
        if not entry.alive:
            return
        packed = self.read(entry, tier.place(entry.device))
        if packed is None:
            return
        del self.at[level][entry.key]
        self.held[level] -= entry.nbytes
        tier.counts["spills"] += 1
        self.place(entry, packed, level + 1, Source(tier, entry.handle, entry.nbytes))

    def evict(self, entry: Entry, tier: Tier) -> None:
        tier.counts["evictions"] += 1
        if entry.key in self.index:
            self.forget(entry)

    def read(self, entry: Entry, device: torch.device) -> Packed | None:
        """What an entry's home holds, on `device`; None after a fault, which ends the entry."""
        tier = self.tiers[entry.level]
        pending = tier.read(entry.handle, device)
        self.reads.append((tier, pending, entry.size))
        try:
            return pending.result()
        except Fault as fault:
            self.fault(entry, fault)
            return None

    def fault(self, entry: Entry, fault: Fault) -> None:
        """Count it, warn once per tier, and let go of the entry."""
        tier = self.tiers[entry.level]
        tier.counts["faults"] += 1
        self.forget(entry)
        if tier.name not in self.warned:
            self.warned.add(tier.name)
            warnings.warn(
                f"store: the {tier.name} tier failed ({fault}); what it lost is computed again, "
                "and further faults are only counted",
                RuntimeWarning,
                stacklevel=2,
            )

    def forget(self, entry: Entry) -> None:
        """An entry is over. Bytes of a move under way stay taken until it has landed."""
        entry.alive = False
        del self.index[entry.key]
        self.staging.discard(entry.key)
        if self.at[entry.level].pop(entry.key, None) is None:
            return  # on its way down, which its source ends
        self.held[entry.level] -= entry.nbytes
        if entry.flight is None:
            tier = self.tiers[entry.level]
            tier.delete(entry.handle)
            tier.release(entry.nbytes)
        else:
            cancel(entry.flight.pending)

    def settle(self) -> None:
        """Take note of every move that has ended by itself."""
        for flight in [flight for flight in self.flights if flight.pending.done()]:
            self.land(flight)
        for read in [read for read in self.reads if read[1].done()]:
            tier, pending, size = read
            self.reads.remove(read)
            tier.counts["move_seconds"] += pending.seconds
            if pending.seconds and size:
                tier.read_cost = pending.seconds / size

    def land(self, flight: Flight) -> None:
        """Wait for a move to end and settle who has what."""
        if flight not in self.flights:
            return
        self.flights.remove(flight)
        entry, tier, handle = flight.entry, flight.tier, None
        try:
            handle = flight.pending.result()
        except Fault as fault:
            if entry is not None and entry.alive:
                self.fault(entry, fault)
        if entry is not None and tier is not None:
            tier.counts["move_seconds"] += flight.pending.seconds
            if entry.alive:
                entry.handle, entry.flight = handle, None
            else:
                if handle is not None:
                    tier.delete(handle)
                tier.release(entry.nbytes)
        if flight.source is not None:
            flight.source.release()

    def land_all(self) -> None:
        while self.flights:
            self.land(self.flights[0])


def cancel(pending: Any) -> None:
    """Where it has not begun yet; other moves have."""
    if hasattr(pending, "cancel"):
        pending.cancel()
