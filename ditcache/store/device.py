"""The simplest store: tensors stay where they are, without a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ditcache.store.base import Key, Store

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DeviceStore(Store):
    """Tensors in a dictionary, on the device that made them."""

    entries: dict = field(default_factory=dict, init=False, repr=False)
    held: int = field(default=0, init=False)
    peak: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)

    def put(self, key: Key, tensor: Tensor) -> None:
        from ditcache.store.codec import compact

        tensor = compact(tensor)
        old = self.entries.get(key)
        self.held += tensor.nbytes - (0 if old is None else old.nbytes)
        self.peak = max(self.peak, self.held)
        self.entries[key] = tensor

    def get(self, key: Key) -> Tensor | None:
        tensor = self.entries.get(key)
        if tensor is None:
            self.misses += 1
        else:
            self.hits += 1
        return tensor

    def drop(self, *prefix: int | str) -> None:
        for key in [key for key in self.entries if key[: len(prefix)] == prefix]:
            self.held -= self.entries.pop(key).nbytes

    def nbytes(self, *prefix: int | str) -> int:
        return sum(t.nbytes for key, t in self.entries.items() if key[: len(prefix)] == prefix)

    def stats(self) -> dict[str, Any]:
        return {
            "entries": len(self.entries),
            "bytes": self.held,
            "bytes_peak": self.peak,
            "hits": self.hits,
            "misses": self.misses,
        }

    def reset_counters(self) -> None:
        self.peak, self.hits, self.misses = self.held, 0, 0
