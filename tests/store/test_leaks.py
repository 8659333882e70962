"""A long run stays where its budgets are: bytes, memory, threads, file descriptors."""

import os
import threading

import pytest
from test_tiered import key, ones, tiers

from ditcache.store.tiered import TieredStore

PROC = os.path.exists("/proc/self/fd")


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not PROC, reason="needs /proc")
def test_thirty_generations_with_fresh_keys_stay_at_the_budgets(tmp_path):
    """Nothing is dropped between generations; 9 MB each go into 4 + 8 + 16 MB."""
    budgets = {"gpu": 4 * 10**6, "cpu": 8 * 10**6, "disk": 16 * 10**6}
    seen, full = [], None
    with TieredStore(**budgets, directory=str(tmp_path)) as store:
        for generation in range(1, 31):
            for unit in range(90):
                store.put(key(unit, generation=generation), ones(unit, 25000))
                store.prefetch([key(unit - 60, generation=generation)])
                store.get(key(unit - 50, generation=generation))
            files = len(list(store.homes.tiers[-1].folder.path.iterdir()))
            seen.append(
                (resident(), threading.active_count(), len(os.listdir("/proc/self/fd")), files)
            )
            held, peaks = tiers(store, "entries"), tiers(store, "bytes_peak")
            assert all(peaks[name] <= budgets[name] for name in budgets)
            if generation > 5:
                assert held == full
            full = held
    memory, threads, descriptors, files = zip(*seen[5:], strict=True)
    assert max(memory) <= 1.05 * memory[0]
    assert len(set(threads)) == 1 and max(descriptors) <= min(descriptors) + 2
    assert max(files) <= 16 * 10**6 // 102400 + 2


@pytest.mark.skipif(not PROC, reason="needs /proc")
def test_closing_gives_back_threads_and_descriptors(tmp_path):
    def counts():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = counts()
    for _ in range(20):
        with TieredStore(gpu=8000, cpu=0, directory=str(tmp_path)) as store:
            for unit in range(5):
                store.put(key(unit), ones(unit))
    assert counts() == before
    assert list(tmp_path.iterdir()) == []
