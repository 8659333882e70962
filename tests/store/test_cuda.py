"""Moves between a CUDA device and pinned memory, on a stream of their own."""

import pytest
import torch
from test_tiered import key, tiers

from ditcache.store.tiered import TieredStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20


def noise(seed, count=MIB // 4):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, device="cuda", generator=generator)


@pytest.mark.parametrize(
    "budgets", [(2, 0, None), (2, 3, None), (0, None, 0), (0, 0, None), (9, 4, None)]
)
def test_what_comes_back_is_what_was_put_on_the_same_device(budgets, tmp_path):
    gpu, cpu, disk = (None if n is None else n * MIB for n in budgets)
    directory = str(tmp_path) if disk != 0 else None
    with TieredStore(gpu, cpu, disk, directory) as store:
        for unit in range(12):
            store.put(key(unit), noise(unit))
            store.prefetch([key(unit - 3), key(unit - 2)])
        for unit in range(12):
            store.prefetch([key(unit + 1)])
            found = store.get(key(unit))
            assert found.device == torch.device("cuda", torch.cuda.current_device())
            assert torch.equal(found, noise(unit))
        peaks = tiers(store, "bytes_peak")
        assert peaks.get("gpu", 0) <= 9 * MIB and store.stats()["misses"] == 0


def test_host_copies_are_pinned_and_budgets_hold_on_the_device(tmp_path):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with TieredStore(gpu=4 * MIB, cpu=None, disk=0) as store:
        for unit in range(32):
            store.put(key(unit), noise(unit))
            assert torch.cuda.memory_allocated() - before <= 5 * MIB
        store.homes.land_all()
        entry = next(iter(store.homes.at[1].values()))
        assert entry.handle.parts["x"].is_pinned()
        assert tiers(store, "move_seconds")["cpu"] > 0
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_the_computation_does_not_wait_for_a_spill():
    """A tensor that is still being computed is copied after it is there."""
    with TieredStore(gpu=MIB, cpu=None, disk=0) as store:
        for unit in range(8):
            slow = torch.randn(2048, 2048, device="cuda")
            for _ in range(20):
                slow = slow @ slow / 2048
            store.put(key(unit), noise(unit) + 0 * slow.flatten()[: MIB // 4].nan_to_num(0))
        for unit in range(8):
            assert torch.equal(store.get(key(unit)), noise(unit))
