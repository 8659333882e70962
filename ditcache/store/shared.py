"""A folder of tensors under names that say what they are, which several machines fill and use.

It belongs to no process and is never cleaned. A file appears under its name only when it is
complete, and what is read is believed only if its checksum is right.
"""

from __future__ import annotations

import posixpath
import uuid
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from ditcache.errors import ConfigError, first_line
from ditcache.store.disk import inverse, order_of

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "ditcache-shared"
UNDER_WAY = 2  # tensors being written at most; a third one waits


class SharedFolder:
    """counts: what was found, not found, written, and what failed."""

    def __init__(self, url: str):
        """Raises ConfigError if nothing can be written at `url`."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ConfigError("store.share: needs fsspec; pip install 'ditcache[remote]'") from None
        try:
            self.files, root = url_to_fs(url)
            self.folder = posixpath.join(root, FOLDER)
            self.files.makedirs(self.folder, exist_ok=True)
        except Exception as error:  # each file system has its own
            raise ConfigError(f"store.share: cannot write in {url}: {first_line(error)}") from None
        self.pool = ThreadPoolExecutor(1, "ditcache-shared")
        self.pending: list[Future] = []
        self.counts = dict.fromkeys(("hits", "misses", "written", "faults"), 0)

    def path(self, name: str) -> str:
        return posixpath.join(self.folder, f"{name}.safetensors")

    def get(self, name: str, device: torch.device) -> Tensor | None:
        """The tensor of that name on `device`, strides and all; None if there is none or it is
        damaged.
        """
        try:
            if not self.files.exists(self.path(name)):
                self.counts["misses"] += 1
                return None
            parts = load(self.files.cat_file(self.path(name)))
            if checksum(parts["x"]) != int(parts["crc"]):
                raise ValueError(f"{name} is not what was written")
            tensor = parts["x"].permute(inverse(parts["order"].tolist())).to(device)
        except Exception as error:  # whatever a file system or a damaged file comes up with
            self.fault(error)
            return None
        self.counts["hits"] += 1
        return tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """Start to write it, unless it is there."""
        while len(self.pending) >= UNDER_WAY:
            self.land()
        self.pending.append(self.pool.submit(self.write, name, tensor.cpu()))

    def write(self, name: str, tensor: Tensor) -> bool:
        path = self.path(name)
        if self.files.exists(path):
            return False
        order = order_of(tensor)
        flat = tensor.permute(order).contiguous()
        about = {"crc": torch.tensor(checksum(flat)), "order": torch.tensor(order)}
        partial = posixpath.join(self.folder, f".{uuid.uuid4().hex}.partial")
        try:
            self.files.pipe_file(partial, save({"x": flat, **about}))
            self.files.mv(partial, path)
        except BaseException:
            if self.files.exists(partial):
                self.files.rm_file(partial)
            raise
        return True

    def land(self) -> None:
        """Wait for the oldest write."""
        try:
            self.counts["written"] += self.pending.pop(0).result()
        except Exception as error:
            self.fault(error)

    def fault(self, error: Exception) -> None:
        self.counts["faults"] += 1
        if self.counts["faults"] == 1:
            warnings.warn(
                f"store: the shared folder failed ({first_line(error)}); what it lost is computed, "
                "and further faults are only counted",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        while self.pending:
            self.land()
        self.pool.shutdown()


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
