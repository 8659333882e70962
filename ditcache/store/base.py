"""What a store is: a place for tensors under keys, which may lose any of them. And what a tier of
one is: a medium that tensors can be moved to and brought back from.

Knows nothing of models or caches; usable on its own. Imports torch only where a tensor is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch
    from torch import Tensor

    from ditcache.store.codec import Packed


class Key(NamedTuple):
    """Where a tensor belongs. A prefix of the fields names everything below it."""

    generation: int
    expert: str
    branch: str
    unit: int
    slot: str


class Fault(Exception):
    """A tier could not do what it was asked. Never leaves the store: the tensor is a miss."""


@dataclass
class Store:
    """Keeps tensors. `get` may answer None at any time, which always means "compute it"."""

    def open(self, folder: Path | None = None) -> None:
        """Get ready; tiers that need files make their folder in `folder`, unless they were told
        another. Does nothing if it is open already. Raises ConfigError.
        """

    def close(self) -> None:
        """Forget every entry, remove all files, stop all threads."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep `tensor` (the caller gives it away and never writes to it again)."""
        raise NotImplementedError

    def get(self, key: Key) -> Tensor | None:
        """The tensor put under `key`, on the device it came from; not to be written to."""
        raise NotImplementedError

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Start bringing these entries near, in the order in which they will be asked for. Never
        waits, and never costs another entry its place.
        """

    def note_cost(self, prefix: tuple, seconds: float) -> None:
        """Computing everything under `prefix` anew takes this long."""

    @property
    def wants_cost(self) -> bool:
        """Whether `note_cost` has an effect, so that the caller should measure it."""
        return False

    @property
    def shares(self) -> bool:
        """Whether `publish` and `recall` reach anyone, so that the caller should find names."""
        return False

    def publish(self, name: str, tensor: Tensor) -> None:
        """Let other processes have what follows from `name` alone."""

    def recall(self, name: str, device: torch.device) -> Tensor | None:
        """What this or another process published under `name`."""
        return None

    def drop(self, *prefix: int | str) -> None:
        """Forget every entry whose key starts with `prefix`; without one, everything."""
        raise NotImplementedError

    def nbytes(self, *prefix: int | str) -> int:
        """Bytes held under `prefix`."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Counters, JSON-serialisable: entries, bytes, bytes_peak, hits, misses."""
        raise NotImplementedError

    def reset_counters(self) -> None:
        """Start counting hits, misses and the peak anew; entries stay."""
        raise NotImplementedError


class Pending(Protocol):
    """A move under way, like a `concurrent.futures.Future`. seconds: what it took, once done."""

    @property
    def seconds(self) -> float: ...

    def done(self) -> bool: ...

    def result(self) -> Any:
        """What arrived; waits for it. Raises Fault."""


@dataclass
class Ready:
    """A move that took no time."""

    value: Any
    seconds: float = 0.0

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.value


@dataclass
class Failed:
    """A move that could not start."""

    reason: str
    seconds: float = 0.0

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        raise Fault(self.reason)


@dataclass
class Tier:
    """One medium with a byte budget. It moves tensors and counts; which ones is the store's choice.

    budget: bytes, None for no limit. codec: how tensors are written here, see codec.py.
    """

    budget: int | None
    codec: str | None = None
    used: int = field(default=0, init=False)  # bytes reserved, those of moves under way as well
    read_cost: float | None = field(default=None, init=False)  # seconds per byte, as last seen
    peak: int = field(default=0, init=False)
    counts: dict[str, float] = field(init=False)

    name = ""  # in statistics and messages
    memory = False  # whether it can hold copies of what lives in a tier below

    def __post_init__(self) -> None:
        self.reset_counters()

    def reset_counters(self) -> None:
        names = ("hits", "misses", "spills", "evictions", "faults")
        self.counts = {**dict.fromkeys(names, 0), "move_seconds": 0.0}
        self.peak = self.used

    def open(self, folder: Path | None) -> None:
        """Raises ConfigError where the settings cannot work."""

    def close(self) -> None:
        """Give everything back. Nothing is under way any more."""

    def place(self, device: torch.device) -> torch.device:
        """Where what came from `device` can be read without leaving the tier."""
        raise NotImplementedError

    def size(self, packed: Packed) -> int:
        """Bytes that `packed` takes here, at most."""
        return packed.nbytes

    def take(self, count: int) -> None:
        """Reserve bytes, before they are used."""
        assert self.budget is None or self.used + count <= self.budget
        self.used += count
        self.peak = max(self.peak, self.used)

    def release(self, count: int) -> None:
        """Give reserved bytes back, after the last use."""
        self.used -= count

    def write(self, packed: Packed) -> Pending:
        """Start a copy to this tier; its result is the tier's own handle of it."""
        raise NotImplementedError

    def read(self, handle: Any, device: torch.device) -> Pending:
        """Start bringing it to `device`; the result is a `Packed`."""
        raise NotImplementedError

    def delete(self, handle: Any) -> None:
        """Remove what `write` made. Never fails."""
