"""A chain of tiers, each with a byte budget: device, host memory, disk, a remote directory."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditcache.errors import one_of
from ditcache.store.base import Key, Store, Tier
from ditcache.store.sizes import read_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

    from ditcache.store.codec import Packed
    from ditcache.store.homes import Entry, Homes

CODECS = {"none": None, "bf16": "bf16", "int8": "int8"}
AHEAD = 32  # entries looked at by one prefetch


@dataclass
class TieredStore(Store):
    """Entries start in the first tier and go down, least recently used first, as budgets require;
    past the last they are gone. For use from one thread.

    gpu, cpu, disk: budgets, as 512MiB, 2GiB or bytes; 0: no such tier, None: no limit. gpu is the
    device that made a tensor, so ordinary memory where that is a CPU. directory: where the disk
    tier makes its folder; None is the run's folder or, from Python, the system's temporary one.
    remote: URL of a directory behind the disk, for fsspec. gpu_codec, cpu_codec, disk_codec: none
    is lossless; bf16 or int8 lose something, the same every time. skip_slow: answer None for what
    takes longer to fetch than to compute again; then results depend on timing. share: what warm
    starts compute is left in `remote` for other processes, under a hash of all it follows from.
    """

    gpu: int | float | str | None = "512MiB"
    cpu: int | float | str | None = "2GiB"
    disk: int | float | str | None = "20GiB"
    directory: str | None = None
    remote: str | None = None
    gpu_codec: str = "none"
    cpu_codec: str = "none"
    disk_codec: str = "none"
    skip_slow: bool = False
    share: bool = False
    homes: Any = field(default=None, init=False, repr=False)  # a Homes, once open
    shared: Any = field(default=None, init=False, repr=False)  # a SharedFolder, once open
    hits: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)
    slow: int = field(default=0, init=False)
    peak: int = field(default=0, init=False)
    costs: dict[tuple, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        budgets = {name: read_size(name, getattr(self, name)) for name in ("gpu", "cpu", "disk")}
        if not any(size != 0 for size in budgets.values()) and self.remote is None:
            raise ValueError("gpu: at least one of gpu, cpu, disk must not be 0")
        for name, size in budgets.items():
            codec = getattr(self, f"{name}_codec")
            if codec not in CODECS:
                raise ValueError(f"{name}_codec: no '{codec}'. {one_of(codec, CODECS)}")
            if codec != "none" and size == 0:
                raise ValueError(f"{name}_codec: has no effect without the tier; set {name}")
        if self.directory is not None and budgets["disk"] == 0:
            raise ValueError("directory: has no effect without the disk tier; set disk")
        if self.share and self.remote is None:
            raise ValueError("share: has no effect without a place for it; set remote=<URL>")

    def open(self, folder: Path | None = None) -> None:
        if self.homes is not None:
            return
        from ditcache.store.homes import Homes
        from ditcache.store.staging import Staging

        tiers = self.make_tiers()
        for number, tier in enumerate(tiers):
            try:
                tier.open(folder or Path(tempfile.gettempdir()))
            except BaseException:
                for opened in tiers[:number]:
                    opened.close()
                raise
        if self.share:
            from ditcache.store.shared import SharedFolder

            assert self.remote is not None
            self.shared = SharedFolder(self.remote)
        self.homes = Homes(tiers)
        self.homes.staging = Staging(self.homes)
        if self.skip_slow:
            for tier in tiers:
                time_a_read(tier)

    def make_tiers(self) -> list[Tier]:
        """Those that are not off, from the nearest to the farthest."""
        from ditcache.store.disk import DiskTier
        from ditcache.store.host import DeviceTier, HostTier

        directory = None if self.directory is None else Path(self.directory).expanduser()
        gpu, cpu, disk = (read_size(name, getattr(self, name)) for name in ("gpu", "cpu", "disk"))
        tiers: list[Tier] = [
            DeviceTier(gpu, CODECS[self.gpu_codec]),
            HostTier(cpu, CODECS[self.cpu_codec]),
            DiskTier(disk, CODECS[self.disk_codec], directory),
        ]
        if self.remote is not None:
            from ditcache.store.remote import RemoteTier

            tiers.append(RemoteTier(None, None, self.remote))
        return [tier for tier in tiers if tier.budget != 0]

    def close(self) -> None:
        if self.homes is None:
            return
        self.drop()
        self.homes.land_all()
        for tier in self.homes.tiers:
            tier.close()
        self.homes = None
        if self.shared is not None:
            self.shared.close()
            self.shared = None

    def __enter__(self) -> TieredStore:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def opened(self) -> Homes:
        """The tiers, with every move that has ended taken note of."""
        self.open()
        self.homes.settle()
        return self.homes

    def put(self, key: Key, tensor: Tensor) -> None:
        from ditcache.store.codec import compact, pack
        from ditcache.store.homes import Entry

        homes = self.opened()
        if key in homes.index:
            homes.forget(homes.index[key])
        homes.place(Entry(key, tensor.device), pack(compact(tensor)), 0)
        self.note_peak()

    def get(self, key: Key) -> Tensor | None:
        from ditcache.store.codec import decode

        homes = self.opened()
        entry, packed, level = homes.index.get(key), None, len(homes.tiers)
        if entry is not None and self.skip_slow and self.too_slow(key):
            self.slow += 1
        elif entry is not None:
            level = 0 if key in homes.staging.copies else entry.level
            packed = self.fetch(entry)
        if packed is None:
            self.misses += 1
            level = len(homes.tiers)
        else:
            self.hits += 1
            homes.tiers[level].counts["hits"] += 1
        for tier in homes.tiers[:level]:
            tier.counts["misses"] += 1
        self.note_peak()
        return None if packed is None else decode(packed)

    def fetch(self, entry: Entry) -> Packed | None:
        """An entry's content on its device, from the nearest place that has it; None after a
        fault.
        """
        from ditcache.store.base import Fault
        from ditcache.store.streams import to_device

        homes, staging = self.homes, self.homes.staging
        homes.at[entry.level].move_to_end(entry.key)
        if entry.key in staging.copies:
            packed = staging.get(entry)
        elif entry.flight is not None:
            packed = entry.flight.packed
        else:
            packed = homes.read(entry, entry.device)
            if packed is not None:
                staging.keep(entry, packed)
        try:
            return None if packed is None else to_device(packed, entry.device).result()
        except Fault as fault:
            homes.fault(entry, fault)
            return None

    def prefetch(self, keys: Iterable[Key]) -> None:
        homes = self.opened()
        for key in itertools.islice(keys, AHEAD):
            entry = homes.index.get(key)
            if entry is not None and not homes.staging.start(entry):
                break
        self.note_peak()

    def note_cost(self, prefix: tuple, seconds: float) -> None:
        self.costs[prefix] = seconds

    @property
    def wants_cost(self) -> bool:
        return self.skip_slow

    @property
    def shares(self) -> bool:
        return self.share

    def publish(self, name: str, tensor: Tensor) -> None:
        if self.share:
            self.opened()
            self.shared.put(name, tensor.detach())

    def recall(self, name: str, device: torch.device) -> Tensor | None:
        if not self.share:
            return None
        self.opened()
        return self.shared.get(name, device)

    def too_slow(self, key: Key) -> bool:
        """Whether all that the unit of `key` would have to fetch takes longer than computing it;
        False while either is not known.
        """
        cost = self.costs.get(key[:4])
        if cost is None:
            return False
        far = [
            entry
            for other, entry in self.homes.index.items()
            if other[:4] == key[:4] and other not in self.homes.staging.copies
        ]
        rates = [self.homes.tiers[entry.level].read_cost or 0.0 for entry in far]
        return sum(rate * entry.size for rate, entry in zip(rates, far, strict=True)) > cost

    def drop(self, *prefix: int | str) -> None:
        for key in self.keys(prefix):
            self.opened().forget(self.opened().index[key])
        for known in [known for known in self.costs if known[: len(prefix)] == prefix]:
            del self.costs[known]

    def keys(self, prefix: tuple) -> list[Key]:
        index = {} if self.homes is None else self.homes.index
        return [key for key in index if key[: len(prefix)] == prefix]

    def nbytes(self, *prefix: int | str) -> int:
        return sum(self.opened().index[key].nbytes for key in self.keys(prefix))

    def note_peak(self) -> None:
        self.peak = max(self.peak, self.bytes_now())

    def bytes_now(self) -> int:
        return sum(tier.used for tier in self.homes.tiers) if self.homes is not None else 0

    def stats(self) -> dict[str, Any]:
        """As of any store, and per tier: entries and bytes now (bytes with copies and moves under
        way), the rest since `reset_counters`. codec: where it is lossy.
        """
        tiers = {}
        for number, tier in enumerate(() if self.homes is None else self.opened().tiers):
            tiers[tier.name] = {
                "budget": tier.budget,
                "entries": len(self.homes.at[number]),
                "bytes": tier.used,
                "bytes_peak": tier.peak,
                **({} if tier.codec is None else {"codec": tier.codec}),
                **tier.counts,
            }
        return {
            "entries": 0 if self.homes is None else len(self.homes.index),
            "bytes": self.bytes_now(),
            "bytes_peak": self.peak,
            "hits": self.hits,
            "misses": self.misses,
            "skipped_slow": self.slow,
            "lossy": any("codec" in tier for tier in tiers.values()),
            **({} if self.shared is None else {"shared": dict(self.shared.counts)}),
            "tiers": tiers,
        }

    def reset_counters(self) -> None:
        self.hits = self.misses = self.slow = 0
        self.peak = self.bytes_now()
        for tier in () if self.homes is None else self.homes.tiers:
            tier.reset_counters()


def time_a_read(tier: Tier) -> None:
    """Write and read a file of one MiB, so that its cost is known from the start."""
    import torch

    from ditcache.store.base import Fault
    from ditcache.store.codec import pack
    from ditcache.store.disk import FileTier

    packed = pack(torch.zeros(2**18))
    fits = tier.budget is None or tier.size(packed) <= tier.budget
    if not isinstance(tier, FileTier) or not fits:
        return
    try:
        handle = tier.write(packed).result()
        read = tier.read(handle, packed.device)
        read.result()
        tier.read_cost = read.seconds / packed.nbytes
        tier.delete(handle)
    except Fault:
        tier.counts["faults"] += 1
