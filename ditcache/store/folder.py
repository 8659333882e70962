"""A folder of one's own inside one that several processes may use at once.

Beside it lies a lock file that its process holds for as long as it lives, however it ends. So a
lock that can be taken belongs to a process that is gone, and what it left is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from ditcache.errors import ConfigError, first_line

try:
    import fcntl
except ImportError:  # not POSIX: leftovers of a crash stay until someone removes them
    fcntl = None  # type: ignore[assignment]

PREFIX = "ditcache-store-"


class OwnFolder:
    """`path` is empty at first and removed, with everything in it, by `remove` or at exit."""

    def __init__(self, parent: Path, setting: str):
        """setting: name for messages. Raises ConfigError if nothing can be written in `parent`."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(parent)
            lock, name = locked_file(parent)
            self.path = Path(name).with_suffix("")
            self.path.mkdir(0o700)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise ConfigError(f"{setting}: cannot write in {parent}: {reason}") from None
        self.remove = weakref.finalize(self, remove, self.path, lock)


def locked_file(parent: Path) -> tuple[int, str]:
    """A new lock file, held: its descriptor and path."""
    while True:
        lock, name = tempfile.mkstemp(".lock", PREFIX, parent)
        if take(lock) and os.path.exists(name):  # else another process cleaned it up meanwhile
            return lock, name
        os.close(lock)


def take(lock: int) -> bool:
    """Whether the lock is ours now; it stays so until the descriptor is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_leftovers(parent: Path) -> None:
    """Remove the folders of processes that are gone."""
    for path in dead_locks(parent):
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)


def dead_locks(parent: Path) -> Iterator[Path]:
    """Lock files whose process is gone, each held while it is looked at."""
    for path in parent.glob(f"{PREFIX}*.lock") if fcntl is not None else ():
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours
            lock = os.open(path, os.O_RDWR)
            try:
                if take(lock):
                    yield path
            finally:
                os.close(lock)


def remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.with_suffix(".lock").unlink(missing_ok=True)
    os.close(lock)
