"""Copies in the first tier of entries that live below it: what was prefetched, and what was fetched
lately.

A copy takes only room that no entry has claimed, and is the first to go when one does. So copies
never change where entries live; they only save time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.store.base import Fault, Key, Pending, Ready
from ditcache.store.homes import Entry, Flight, Homes, Source, cancel

if TYPE_CHECKING:
    from ditcache.store.codec import Packed


@dataclass(eq=False)
class Copy:
    """pending: the read that brings it. used: it was asked for and may make way for another."""

    pending: Pending
    nbytes: int
    used: bool


class Staging:
    """The copies, oldest first."""

    def __init__(self, homes: Homes):
        self.homes, self.tier = homes, homes.tiers[0]
        self.copies: OrderedDict[Key, Copy] = OrderedDict()

    def start(self, entry: Entry) -> bool:
        """Begin to bring an entry near; False if there is no room for it."""
        copy = self.copies.get(entry.key)
        if copy is not None:
            copy.used = False  # wanted again
        if copy is not None or entry.level == 0 or entry.flight is not None:
            return True
        if not self.find_room(entry.size):
            return False
        home = self.homes.tiers[entry.level]
        self.tier.take(entry.size)
        pending = home.read(entry.handle, self.tier.place(entry.device))
        self.homes.reads.append((home, pending, entry.size))
        self.copies[entry.key] = Copy(pending, entry.size, used=False)
        return True

    def keep(self, entry: Entry, packed: Packed) -> None:
        """Keep what was fetched on the spot, if it can be had for nothing."""
        near = packed.device == self.tier.place(entry.device)
        if near and entry.level > 0 and self.find_room(entry.size):
            self.tier.take(entry.size)
            self.copies[entry.key] = Copy(Ready(packed), entry.size, used=True)

    def get(self, entry: Entry) -> Packed | None:
        """An entry's copy, waiting for it if it is on its way; None after a fault, which ends the
        entry.
        """
        copy = self.copies[entry.key]
        copy.used = True
        try:
            return copy.pending.result()
        except Fault as fault:
            self.homes.fault(entry, fault)
            return None

    def wait_for(self, entry: Entry) -> None:
        """Until an entry's copy, if it has one, has come."""
        copy = self.copies.get(entry.key)
        if copy is not None:
            try:
                copy.pending.result()
            except Fault as fault:
                self.homes.fault(entry, fault)

    def find_room(self, nbytes: int) -> bool:
        """Whether the first tier has room for a copy, if need be in place of used ones."""
        if not self.tier.memory:
            return False
        if self.tier.budget is None:
            return True
        for key in [key for key, copy in self.copies.items() if copy.used]:
            if self.tier.used + nbytes <= self.tier.budget:
                break
            self.discard(key)
        return self.tier.used + nbytes <= self.tier.budget

    def discard(self, key: Key) -> None:
        """Let go of a copy; one on its way takes its room until it has come."""
        copy = self.copies.pop(key, None)
        if copy is None:
            return
        cancel(copy.pending)
        flight = Flight(copy.pending, Source(self.tier, None, copy.nbytes))
        self.homes.flights.append(flight)
        if copy.pending.done():
            self.homes.land(flight)

    def drop_oldest(self) -> bool:
        """Make room for an entry; False if there are no copies left."""
        if not self.copies:
            return False
        self.discard(next(iter(self.copies)))
        return True
