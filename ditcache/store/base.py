"""What a store is: a place for tensors under keys, which may lose any of them.

Knows nothing of models or caches; usable on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Key(NamedTuple):
    """Where a tensor belongs. A prefix of the fields names everything below it."""

    generation: int
    expert: str
    branch: str
    unit: int
    slot: str


@dataclass
class Store:
    """Keeps tensors. `get` may answer None at any time, which always means "compute it"."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep `tensor` (no copy: the caller gives it away)."""
        raise NotImplementedError

    def get(self, key: Key) -> Tensor | None:
        raise NotImplementedError

    def drop(self, *prefix: int | str) -> None:
        """Forget every entry whose key starts with `prefix`; without one, everything."""
        raise NotImplementedError

    def nbytes(self, *prefix: int | str) -> int:
        """Bytes held under `prefix`."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Counters, JSON-serialisable: entries, bytes, bytes_peak, hits, misses."""
        raise NotImplementedError

    def reset_counters(self) -> None:
        """Start counting hits, misses and the peak anew; entries stay."""
        raise NotImplementedError
