"""Whatever a disk does, the answer is the right tensor or None, one warning and a counter."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_tiered import key, ones, tiers

from ditcache.errors import ConfigError
from ditcache.store import disk
from ditcache.store.tiered import TieredStore

ROOT = Path(__file__).parents[2]
WARNING = r"store: the disk tier failed .*; what it lost is computed again"


@pytest.fixture
def store(tmp_path):
    """Ten entries on disk, and nothing else."""
    store = TieredStore(gpu=0, cpu=0, disk=None, directory=str(tmp_path))
    for unit in range(10):
        store.put(key(unit), ones(unit))
    yield store
    store.close()
    assert list(tmp_path.iterdir()) == []


def files(store):
    """The entries' files, in the order in which they were written."""
    folder = store.homes.tiers[-1].folder.path
    return sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))


def found(store, units=range(10)):
    """Per unit: whether it is there; what is there must be right."""
    tensors = {unit: store.get(key(unit)) for unit in units}
    assert all(t is None or torch.equal(t, ones(unit)) for unit, t in tensors.items())
    return [tensors[unit] is not None for unit in units]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, 2000),
    "emptied": lambda path: os.truncate(path, 0),
    "a byte flipped": lambda path: flip(path, -100),
    "a byte of the header flipped": lambda path: flip(path, 10),
    "deleted": Path.unlink,
    "replaced": lambda path: shutil.copy(path.with_name("9.safetensors"), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss(store, damage):
    for unit in (2, 3, 7):
        DAMAGE[damage](files(store)[unit] if damage != "deleted" else path_of(store, unit))
    with pytest.warns(RuntimeWarning, match=WARNING) as warned:
        assert found(store) == [unit not in (2, 3, 7) for unit in range(10)]
    assert len(warned) == 1
    assert tiers(store, "faults") == {"disk": 3} and store.stats()["misses"] == 3
    assert store.stats()["entries"] == 7
    store.put(key(2), ones(2))
    assert found(store, [2]) == [True]


def path_of(store, unit):
    return store.homes.tiers[-1].folder.path / f"{unit}.safetensors"


def test_a_damaged_file_that_was_prefetched_is_a_miss(tmp_path):
    with TieredStore(gpu=16 * 4000, cpu=0, directory=str(tmp_path)) as store:
        for unit in range(18):
            store.put(key(unit), ones(unit))
        store.homes.land_all()
        flip(files(store)[0], -1)
        store.prefetch([key(0), key(1)])
        with pytest.warns(RuntimeWarning, match=WARNING):
            assert found(store, range(18)) == [False] + [True] * 17


def test_a_folder_that_vanishes_is_ten_misses(store):
    shutil.rmtree(store.homes.tiers[-1].folder.path)
    with pytest.warns(RuntimeWarning, match=WARNING) as warned:
        assert not any(found(store))
        store.put(key(0), ones(0))
    assert len(warned) == 1 and tiers(store, "faults") == {"disk": 11}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_takes_no_more_loses_only_what_it_was_given(store, monkeypatch, number):
    def fail(self, content):
        self.touch()  # a part of it is there
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.warns(RuntimeWarning, match=os.strerror(number)) as warned:
        for unit in (3, 10, 11):
            store.put(key(unit), ones(unit))
    assert len(warned) == 1 and tiers(store, "faults") == {"disk": 3}
    assert found(store, range(12)) == [unit not in (3, 10, 11) for unit in range(12)]
    assert store.stats()["bytes"] == 9 * 8192
    assert len(list(store.homes.tiers[-1].folder.path.iterdir())) == 9
    monkeypatch.undo()
    store.put(key(3), ones(3))
    assert found(store, [3]) == [True]


@pytest.mark.skipif(
    not (os.access("/dev/full", os.W_OK) if os.path.exists("/dev/full") else False),
    reason="needs /dev/full",
)
def test_a_disk_that_is_really_full(store, monkeypatch):
    plain = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: plain(Path("/dev/full"), data))
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        store.put(key(10), ones(10))
    assert found(store, range(11)) == [True] * 10 + [False]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    done = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True)
    if not done or done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip() if done else 'no mount'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_file_system_keeps_what_fits(small_disk):
    with TieredStore(gpu=0, cpu=0, disk=None, directory=str(small_disk)) as store:
        with pytest.warns(RuntimeWarning, match="No space left on device") as warned:
            for unit in range(30):
                store.put(key(unit), ones(unit))
        kept = found(store, range(30))
        assert len(warned) == 1 and 0 < sum(kept) < 30 and kept[0] and not kept[-1]
        assert tiers(store, "faults") == {"disk": 30 - sum(kept)}
        assert not list(store.homes.tiers[-1].folder.path.glob(".*"))  # no half-written file
        store.drop()
        store.put(key(40), ones(40))  # there is room again
        assert found(store, [40]) == [True]
    assert list(small_disk.iterdir()) == []


def test_a_slow_disk_is_only_slow(tmp_path, monkeypatch):
    for name in ("write_bytes", "read_bytes"):
        plain = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda self, *data, plain=plain: (time.sleep(0.02), plain(self, *data))[1]
        )
    with TieredStore(gpu=3 * 4000, cpu=0, directory=str(tmp_path)) as store, no_warnings():
        for unit in range(8):
            store.put(key(unit), ones(unit))
            store.prefetch([key(unit - 4)])
        assert all(found(store, range(8)))
        assert tiers(store, "move_seconds")["disk"] > 0.1
        assert tiers(store, "bytes_peak")["gpu"] <= 3 * 4000


class no_warnings(warnings.catch_warnings):
    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("error")


@pytest.mark.parametrize("directory", ["/proc/nowhere", "{file}/inside", "{file}"])
def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path, directory):
    (tmp_path / "file").touch()
    store = TieredStore(directory=directory.format(file=tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^store\.directory: cannot write in .*: \w") as error:
        store.open()
    assert "\n" not in str(error.value)
    assert store.homes is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"store\.directory: .*Permission denied"):
        TieredStore(directory=str(tmp_path)).open()
    tmp_path.chmod(0o700)


def test_a_read_only_file_system_at_the_start_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("ditcache.store.folder.tempfile.mkstemp", fail)
    with pytest.raises(ConfigError, match=r"store\.directory: .*Read-only file system"):
        TieredStore(directory=str(tmp_path)).open()


CHILD = """
import sys, time, torch
from pathlib import Path
from ditcache.store.base import Key
from ditcache.store.tiered import TieredStore

plain = Path.write_bytes
def half(self, content):  # and no more
    if len(list(self.parent.iterdir())) == 3:
        plain(self, content[:1000])
        print("writing", flush=True)
        time.sleep(60)
    return plain(self, content)
Path.write_bytes = half
store = TieredStore(gpu=0, cpu=0, directory=sys.argv[1])
for unit in range(9):
    store.put(Key(1, "a", "cond", unit, "0"), torch.full((1000,), -1.0))
"""


def test_what_a_killed_process_left_goes_with_the_next_and_the_living_are_spared(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "writing\n"
        (theirs,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert len(list(theirs.glob("[0-9]*"))) == 3 and list(theirs.glob(".*partial*"))
        with TieredStore(gpu=0, cpu=0, directory=str(tmp_path)) as ours:
            for unit in range(9):
                ours.put(key(unit), ones(unit))
            assert all(found(ours, range(9)))
            assert len(list(theirs.glob("[0-9]*"))) == 3  # it lives
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert theirs.exists()
        with TieredStore(directory=str(tmp_path)) as ours:
            assert not theirs.exists()
            assert len(list(tmp_path.iterdir())) == 2  # our folder and its lock
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_on_one_directory_do_not_see_each_other(tmp_path):
    with (
        TieredStore(gpu=0, cpu=0, directory=str(tmp_path)) as one,
        TieredStore(gpu=0, cpu=0, directory=str(tmp_path)) as two,
    ):
        for unit in range(5):
            one.put(key(unit), ones(unit))
            two.put(key(unit), ones(-unit))
        one.drop()
        assert not any(found(one, range(5)))
        assert [two.get(key(unit))[0].item() for unit in range(5)] == [0, -1, -2, -3, -4]
        assert not any([*tiers(one, "faults").values(), *tiers(two, "faults").values()])


def test_files_end_with_the_store_even_if_nobody_closes_it(tmp_path):
    store = TieredStore(gpu=0, cpu=0, directory=str(tmp_path))
    store.put(key(), ones(1))
    del store
    import gc

    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_any_error_of_a_read_is_a_fault(store, monkeypatch):
    monkeypatch.setattr(disk, "load", lambda content: 1 / 0)
    with pytest.warns(RuntimeWarning, match="division by zero"):
        assert found(store, [0]) == [False]
