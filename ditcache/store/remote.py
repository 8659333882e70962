"""The tier behind the disk: a directory that fsspec can reach, such as `s3://bucket/cache`."""

from __future__ import annotations

import contextlib
import posixpath
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditcache.errors import ConfigError, first_line
from ditcache.store.disk import FileTier


@dataclass
class RemoteTier(FileTier):
    """Files in a folder of this store's own inside `url`, removed with it. After a crash they stay:
    a lock that ends with its process does not exist out there.
    """

    url: str = ""
    files: Any = field(init=False, repr=False)  # fsspec's file system
    folder: str = field(init=False)

    name = "remote"

    def open(self, folder: Path | None) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ConfigError(
                "store.remote: needs fsspec; pip install 'ditcache[remote]'"
            ) from None
        try:
            self.files, root = url_to_fs(self.url)
            self.folder = posixpath.join(root, f"ditcache-store-{uuid.uuid4().hex}")
            self.files.makedirs(self.folder)
        except Exception as error:  # each file system has its own
            raise ConfigError(
                f"store.remote: cannot write in {self.url}: {first_line(error)}"
            ) from None
        super().open(folder)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(Exception):  # out of reach: nothing more can be done
            self.files.rm(self.folder, recursive=True)

    def store(self, name: str, content: bytes) -> None:
        path = posixpath.join(self.folder, name)
        self.files.pipe_file(f"{path}.partial", content)
        self.files.mv(f"{path}.partial", path)

    def load(self, name: str) -> bytes:
        return self.files.cat_file(posixpath.join(self.folder, name))

    def remove(self, name: str) -> None:
        self.files.rm_file(posixpath.join(self.folder, name))
