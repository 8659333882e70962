"""The tier of files: safetensors, written and read by a small pool of threads.

A file appears under its name only when it is complete, and what is read is believed only if its
checksum is the one that was written. The files are this process's own and end with it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save

from ditcache.errors import first_line
from ditcache.files import complete_file
from ditcache.store import streams
from ditcache.store.base import Fault, Pending, Tier
from ditcache.store.codec import Packed
from ditcache.store.folder import OwnFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

THREADS = 2
BLOCK = 4096  # files take whole blocks of a file system
HEADER = 1024  # more than safetensors' own description of two tensors


@dataclass(frozen=True)
class File:
    """One entry on disk. crc: of the whole file. orders: per part, its dimensions as they lie in
    memory, outermost first. like: the entry without tensors.
    """

    name: str
    crc: int
    orders: dict[str, list[int]]
    like: Packed


class Job:
    """A piece of work on the pool. seconds: its own, without waiting for a free thread."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[], Any]):
        self.seconds = 0.0
        self.future: Future = pool.submit(self.timed, work)

    def timed(self, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds = time.perf_counter() - start

    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """Do not begin, if it has not begun yet."""
        self.future.cancel()

    def result(self) -> Any:
        try:
            return self.future.result()
        except CancelledError:
            raise Fault("cancelled") from None
        except Exception as error:  # whatever a file system or a damaged file comes up with
            raise Fault(first_line(error)) from None


class ReadJob(Job):
    """Its work ends with a copy to the device."""

    def result(self) -> Packed:
        return super().result().result()


@dataclass
class FileTier(Tier):
    """Entries as files, wherever `store`, `load` and `remove` put them."""

    pool: ThreadPoolExecutor = field(init=False, repr=False)
    names: itertools.count = field(default_factory=itertools.count, init=False, repr=False)

    def open(self, folder: Path | None) -> None:
        self.pool = ThreadPoolExecutor(THREADS, f"ditcache-{self.name}")

    def close(self) -> None:
        self.pool.shutdown()

    def place(self, device: torch.device) -> torch.device:
        return streams.CPU

    def size(self, packed: Packed) -> int:
        return -(-(packed.nbytes + HEADER) // BLOCK) * BLOCK

    def write(self, packed: Packed) -> Pending:
        name = f"{next(self.names)}.safetensors"
        coming, like = streams.to_host(packed), packed.with_parts({})
        return Job(self.pool, lambda: self.write_now(name, coming.result(), like))

    def write_now(self, name: str, packed: Packed, like: Packed) -> File:
        orders = {key: order_of(part) for key, part in packed.parts.items()}
        content = save(
            {key: part.permute(orders[key]).contiguous() for key, part in packed.parts.items()}
        )
        self.store(name, content)
        return File(name, zlib.crc32(content), orders, like)

    def read(self, handle: File, device: torch.device) -> Pending:
        return ReadJob(self.pool, lambda: streams.to_device(self.read_now(handle), device))

    def read_now(self, file: File) -> Packed:
        content = self.load(file.name)
        if zlib.crc32(content) != file.crc:
            raise Fault(f"{file.name} is not what was written")
        parts = load(content)
        return file.like.with_parts(
            {key: part.permute(inverse(file.orders[key])) for key, part in parts.items()}
        )

    def delete(self, handle: File) -> None:
        with contextlib.suppress(OSError):  # gone already, or a disk that fails: nothing to win
            self.remove(handle.name)

    def store(self, name: str, content: bytes) -> None:
        raise NotImplementedError

    def load(self, name: str) -> bytes:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        raise NotImplementedError


@dataclass
class DiskTier(FileTier):
    """Files in a folder of this store's own inside `directory`.

    directory: None is the folder given to `open`.
    """

    directory: Path | None = None
    folder: OwnFolder = field(init=False, repr=False)

    name = "disk"

    def open(self, folder: Path | None) -> None:
        parent = self.directory or folder
        assert parent is not None
        self.folder = OwnFolder(parent, "store.directory")
        super().open(folder)

    def close(self) -> None:
        super().close()
        self.folder.remove()

    def store(self, name: str, content: bytes) -> None:
        with complete_file(self.folder.path / name) as partial:
            partial.write_bytes(content)

    def load(self, name: str) -> bytes:
        return (self.folder.path / name).read_bytes()

    def remove(self, name: str) -> None:
        (self.folder.path / name).unlink()


def order_of(tensor: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
