"""Finished chunks in a store of tiers, the newest one on the device.

Entries are a chunk's keys, or values, in one block. A block at work is put together in buffers that
all blocks share, while the store is asked for the next block's. Unlike residuals, keys and values
cannot be computed anew in passing, so a store that loses some is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ditcache.errors import DitcacheError
from ditcache.kv.codec import Scratch
from ditcache.kv.storage import Slots, Storage, check_alike, put
from ditcache.store.base import Key, Store

CACHES = itertools.count(1)  # unique in the process, so that caches may share a store


@dataclass
class Entry:
    """A finished chunk. parts: (its slots, where they begin in it); fewer as it is evicted."""

    number: int
    parts: list[tuple[slice, int]]

    def without(self, gone: Slots) -> Entry:
        parts = self.parts
        for cut in gone:
            parts = [
                (slice(low, high), at + low - slot.start)
                for slot, at in parts
                for low, high in (
                    (slot.start, min(slot.stop, cut.start)),
                    (max(slot.start, cut.stop), slot.stop),
                )
                if low < high
            ]
        return Entry(self.number, parts)


class Stored:
    """A block's keys and values."""

    def __init__(self, store: Store, name: tuple[int, str, str], scratch: Scratch, room: int):
        self.store, self.scratch, self.room = store, scratch, room
        self.prefix = (*name, len(scratch.members))  # number, expert, branch, block
        self.entries: list[Entry] = []
        self.newest: list[Tensor] = []
        self.slots: Slots = []
        self.chunks = 0
        scratch.members.append(self)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.newest, *self.scratch.buffers]

    def check(self, key: Tensor, value: Tensor) -> None:
        for name, kept, new in zip(("key", "value"), self.newest, (key, value), strict=False):
            check_alike(name, kept, new)

    def make_room(self, slots: int) -> None:
        self.room = max(self.room, slots)

    def write(self, slots: Slots, key: Tensor, value: Tensor, *, append: bool) -> None:
        if append and self.newest:
            for slot, finished in zip(self.keys(self.chunks), self.newest, strict=True):
                self.store.put(slot, finished)
            starts = itertools.accumulate((s.stop - s.start for s in self.slots), initial=0)
            self.entries.append(Entry(self.chunks, list(zip(self.slots, starts, strict=False))))
            self.chunks += 1
        if append:
            kept = [entry.without(slots) for entry in self.entries]
            for entry in kept:
                if not entry.parts:
                    for gone in self.keys(entry.number):
                        self.store.drop(*gone)
            self.entries = [entry for entry in kept if entry.parts]
        self.newest, self.slots = [key.clone(), value.clone()], slots

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        outs = [x[:, :filled] for x in self.scratch.pair(self.newest, self.room)]
        members = self.scratch.members
        following = members[(self.prefix[-1] + 1) % len(members)]
        assert isinstance(following, Stored)
        self.store.prefetch(key for e in following.entries for key in following.keys(e.number))
        for entry in self.entries:
            for key, out in zip(self.keys(entry.number), outs, strict=True):
                found = self.store.get(key)
                if found is None:
                    raise DitcacheError(
                        "kv.offload: the store lost keys and values that the window still needs; "
                        "raise store.cpu or store.disk, or set kv.offload=false"
                    )
                for slot, at in entry.parts:
                    out[:, slot] = found[:, at : at + slot.stop - slot.start]
        for newest, out in zip(self.newest, outs, strict=True):
            put(out, self.slots, newest)
        return outs[0], outs[1]

    def keys(self, chunk: int) -> list[Key]:
        return [Key(*self.prefix, f"{kind}{chunk}") for kind in ("key", "value")]

    def free(self) -> None:
        self.store.drop(*self.prefix)
        self.scratch.buffers, self.scratch.members = [], []


def stored(store: Store, name: tuple[str, str]) -> Callable[[Tensor, Tensor, int], Storage]:
    """`storage` of one `RollingKVCache`. name: its expert and branch."""
    scratch, number = Scratch(), next(CACHES)

    def make(key: Tensor, value: Tensor, room: int) -> Storage:
        return Stored(store, (number, *name), scratch, room)

    return make
