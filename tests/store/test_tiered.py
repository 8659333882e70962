"""The tiered store against a plain dictionary, under random sequences of operations."""

import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.store.base import Key
from ditcache.store.tiered import TieredStore

KEYS = st.builds(
    Key,
    st.integers(0, 1),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["cond", "uncond"]),
    st.integers(0, 1),
    st.sampled_from(["0", "1"]),
)
SIZES = st.integers(0, 6).map(lambda n: 300 * n)  # floats; up to 7200 bytes
MEMORY = [  # gpu, cpu
    (8000, 12000), (8000, None), (0, 9000), (15000, 0), (2000, 30000), (None, 0), (1000, 2000),
]  # fmt: skip
DISK = [
    (8000, 12000, 40000), (0, 0, None), (0, 0, 24576), (8000, 0, None), (0, 8000, 65536),
    (3000, 3000, None), (4000, 0, 8192),
]  # fmt: skip


def key(unit=0, slot="0", generation=1):
    return Key(generation, "a", "cond", unit, slot)


def ones(value, count=1000):
    return torch.full((count,), float(value))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, SIZES),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("prefetch"), st.lists(KEYS, max_size=5), st.just(0)),
        st.tuples(st.just("drop"), KEYS, st.integers(0, 5)),
    ),
    max_size=60,
)


@settings(max_examples=650, deadline=None)
@given(st.sampled_from(MEMORY), OPERATIONS)
def test_memory_tiers_behave_like_a_dictionary_that_may_lose_entries(budgets, operations):
    with TieredStore(*budgets, disk=0) as store:
        against_a_dictionary(store, operations)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(DISK), OPERATIONS)
def test_tiers_with_a_disk_behave_like_a_dictionary_that_may_lose_entries(budgets, operations):
    with tempfile.TemporaryDirectory() as folder:
        with TieredStore(*budgets, directory=folder) as store:
            biggest = watched_files(store)
            against_a_dictionary(store, operations)
            budget = store.homes.tiers[-1].budget
            assert budget is None or max(biggest, default=0) <= budget
        assert list(Path(folder).iterdir()) == []


def against_a_dictionary(store, operations):
    """Contents are right or None, and None only after an eviction; budgets hold at every call."""
    model = {}
    for number, (operation, key, size) in enumerate(operations):
        if operation == "put":
            model[key] = ones(number, size)
            store.put(key, model[key].clone())
        elif operation == "get":
            found, right = store.get(key), model.get(key)
            if found is not None:
                assert right is not None and torch.equal(found, right)
            elif right is not None:
                assert any(tiers(store, "evictions").values())
                del model[key]
        elif operation == "prefetch":
            store.prefetch(key)
        else:
            store.drop(*key[:size])
            model = {k: t for k, t in model.items() if k[:size] != key[:size]}
        check_bytes(store.homes)
    assert not any(tiers(store, "faults").values())


def check_bytes(homes):
    """They add up, with copies and moves under way, and never went over a budget."""
    for level, tier in enumerate(homes.tiers):
        held = sum(entry.nbytes for entry in homes.at[level].values())
        assert held == homes.held[level]
        copies = homes.staging.copies.values() if level == 0 else ()
        leaving = [f.source.nbytes for f in homes.flights if f.source and f.source.tier is tier]
        dead = [
            f.entry.nbytes
            for f in homes.flights
            if f.entry is not None and not f.entry.alive and f.tier is tier
        ]
        assert tier.used == held + sum(copy.nbytes for copy in copies) + sum(leaving) + sum(dead)
        assert tier.budget is None or tier.peak <= tier.budget


def watched_files(store):
    """A list that grows by the bytes in the disk tier's folder whenever a file was written."""
    seen, tier = [], store.homes.tiers[-1]
    plain = tier.store

    def watched(name, content):
        plain(name, content)
        seen.append(size_of(tier))

    tier.store = watched
    return seen


def size_of(tier):
    """Bytes of a disk tier's files; one may be gone before it is looked at."""
    total = 0
    for path in list(tier.folder.path.iterdir()):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def tiered(tmp_path):
    """Makes stores of 4000-byte entries that are closed again: budgets in entries."""
    stores = []

    def make(gpu=0, cpu=0, disk=0, **more):
        memory = {name: n if n is None else 4000 * n for name, n in (("gpu", gpu), ("cpu", cpu))}
        files = {"disk": disk if disk is None else 8192 * disk}
        files |= {"directory": str(tmp_path)} if disk != 0 else {}
        store = TieredStore(**memory, **files, **more)
        store.open()
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


def tiers(store, name):
    return {tier: counts[name] for tier, counts in store.stats()["tiers"].items()}


def test_the_least_recently_used_goes_down_and_past_the_last_is_gone(tiered):
    store = tiered(gpu=2, cpu=1, disk=2)
    for unit in range(6):
        store.put(key(unit), ones(unit))
    assert tiers(store, "entries") == {"gpu": 1, "cpu": 1, "disk": 2}
    assert tiers(store, "spills") == {"gpu": 5, "cpu": 4, "disk": 0}
    assert tiers(store, "evictions") == {"gpu": 0, "cpu": 0, "disk": 2}
    found = [store.get(key(unit)) for unit in range(6)]
    assert [None if t is None else t[0].item() for t in found] == [None, None, 2, 3, 4, 5]
    assert tiers(store, "hits") == {"gpu": 1, "cpu": 1, "disk": 2}
    assert tiers(store, "misses") == {"gpu": 5, "cpu": 4, "disk": 2}
    stats = store.stats()
    assert (stats["hits"], stats["misses"], stats["entries"]) == (4, 2, 4)


def test_asking_for_an_entry_keeps_it_where_it_is(tiered):
    store = tiered(gpu=0, cpu=2)
    store.put(key(0), ones(0))
    store.put(key(1), ones(1))
    assert store.get(key(0)) is not None
    store.put(key(2), ones(2))
    assert store.get(key(0)) is not None and store.get(key(1)) is None


def test_writing_again_takes_the_place_of_the_old(tiered):
    store = tiered(gpu=1, disk=4)
    for value in range(5):
        store.put(key(0), ones(value))
        store.put(key(1), ones(-value))
    assert store.get(key(0))[0] == 4 and store.get(key(1))[0] == -4
    assert store.stats()["entries"] == 2


def test_an_entry_that_is_too_large_for_a_tier_passes_it_by(tiered):
    store = tiered(gpu=1, cpu=3, disk=0)
    store.put(key(0), ones(1, 2000))
    store.put(key(1), ones(1, 9000))
    assert tiers(store, "entries") == {"gpu": 0, "cpu": 1}
    assert tiers(store, "evictions") == {"gpu": 0, "cpu": 1}
    assert store.get(key(1)) is None


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 5).permute(2, 0, 1),
        torch.randn(4, 6)[:, ::2],
        torch.randn(3, 1).expand(3, 4),
        torch.tensor(3.0),
        torch.empty(0, 3),
        torch.randn(5).bfloat16(),
        torch.arange(7),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    ],
)
def test_what_comes_back_is_bit_for_bit_what_was_put(tiered, tier, tensor):
    store = tiered(**{tier: 2})
    store.put(key(), tensor)
    found = store.get(key())
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert found.clone().stride() == tensor.clone().stride()  # sums depend on the order in memory
    assert found.contiguous().view(-1).tolist().__repr__() == tensor.reshape(-1).tolist().__repr__()


def test_a_view_does_not_hold_the_rest_of_its_memory(tiered):
    store = tiered(gpu=2)
    store.put(key(), torch.zeros(10**6)[:1000])
    assert store.get(key()).untyped_storage().nbytes() == 4000 == store.stats()["bytes"]


@contextmanager
def gate(store, monkeypatch, name="load"):
    """The disk waits until the event is set."""
    event, tier = threading.Event(), store.homes.tiers[-1]
    plain = getattr(tier, name)

    def slow(*args):
        event.wait(10)
        return plain(*args)

    monkeypatch.setattr(tier, name, slow)
    yield event
    event.set()


def wait_until(condition):
    end = time.perf_counter() + 10
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.001)


def filled(tiered, **budgets):
    """Room for two copies in the first tier, the oldest entries on disk."""
    store = tiered(gpu=16, disk=None, **budgets)
    for unit in range(18):
        store.put(key(unit), ones(unit))
    wait_until(lambda: store.opened().flights == [])
    return store


def test_prefetching_brings_entries_near_without_waiting(tiered, monkeypatch):
    store = filled(tiered)
    with gate(store, monkeypatch) as arrives:
        store.prefetch([key(0), key(1)])
        assert tiers(store, "bytes")["gpu"] == 16 * 4000  # counted while under way
        arrives.set()
    assert store.get(key(0))[0] == 0 and store.get(key(1))[0] == 1
    assert tiers(store, "hits") == {"gpu": 2, "disk": 0}
    assert tiers(store, "move_seconds")["disk"] > 0


def test_a_get_waits_only_for_what_has_not_arrived(tiered, monkeypatch):
    store = filled(tiered)
    with gate(store, monkeypatch) as arrives:
        store.prefetch([key(0)])
        assert store.get(key(17))[0] == 17
        threading.Timer(0.05, arrives.set).start()
        start = time.perf_counter()
        assert store.get(key(0))[0] == 0
        assert time.perf_counter() - start > 0.03


def test_copies_make_way_for_entries_and_never_the_other_way_round(tiered):
    store = filled(tiered)
    before = tiers(store, "entries")
    for _ in range(3):
        store.prefetch([key(unit) for unit in range(4)])
    assert tiers(store, "entries") == before
    store.put(key(18), ones(18))
    store.put(key(19), ones(19))
    assert [store.get(key(unit))[0].item() for unit in range(20)] == list(range(20))
    assert store.stats()["misses"] == 0


def test_an_entry_on_its_way_down_can_be_had_at_once(tiered, monkeypatch):
    store = filled(tiered)
    with gate(store, monkeypatch, "store"):
        store.put(key(18), ones(18))
        assert store.homes.flights  # and the new entry did not wait for it
        going = store.homes.flights[0].entry.key
        assert store.get(going)[0] == going.unit


def test_where_entries_live_does_not_depend_on_how_fast_the_disk_is(tiered, monkeypatch):
    def run(delay):
        store = tiered(gpu=3, cpu=2, disk=3)
        plain = store.homes.tiers[-1].store
        monkeypatch.setattr(
            store.homes.tiers[-1], "store", lambda *args: (time.sleep(delay), plain(*args))
        )
        found = []
        for unit in [0, 1, 2, 3, 4, 5, 1, 6, 7, 0, 8, 9, 3, 4, 10, 11, 2]:
            found.append(store.get(key(unit)) is not None)
            store.put(key(unit), ones(unit))
            store.prefetch([key(unit - 1), key(unit - 5)])
        return found, [list(at) for at in store.homes.at]

    assert run(0) == run(0.01)


def test_what_is_slower_to_fetch_than_to_compute_is_a_miss_if_asked_for(tiered):
    store = tiered(disk=200, skip_slow=True)
    assert store.wants_cost and store.homes.tiers[-1].read_cost > 0
    store.put(key(), ones(1))
    assert store.get(key()) is not None  # the cost of computing is not known
    store.note_cost(key()[:4], 0.0)
    assert store.get(key()) is None
    store.note_cost(key()[:4], 1e6)
    assert store.get(key())[0] == 1
    assert store.stats()["skipped_slow"] == 1
    store.drop()
    assert store.costs == {}


@pytest.mark.parametrize(("codec", "error", "share"), [("bf16", 2**-8, 2), ("int8", 1 / 250, 4)])
def test_lossy_codecs_are_close_smaller_and_visible(tiered, codec, error, share):
    store = tiered(gpu=1, cpu=4, cpu_codec=codec)
    tensor = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    store.put(key(0), tensor)
    store.put(key(1), torch.zeros(1000))
    found = store.get(key(0))
    assert not torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert (found - tensor).abs().max() <= error * tensor.abs().max()
    assert tensor.nbytes / (share + 1) < tiers(store, "bytes")["cpu"] <= 1.1 * tensor.nbytes / share
    stats = store.stats()
    assert stats["lossy"] and stats["tiers"]["cpu"]["codec"] == codec
    assert "codec" not in stats["tiers"]["gpu"]


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(10), torch.tensor([float("inf")] * 8), torch.full((9,), float("nan"))],
)
def test_int8_leaves_alone_what_it_cannot_hold(tiered, tensor):
    store = tiered(cpu=1, cpu_codec="int8")
    store.put(key(), tensor)
    assert torch.equal(store.get(key()).nan_to_num(5), tensor.nan_to_num(5))


def test_a_store_can_be_used_without_opening_it_and_after_closing_it(tmp_path):
    store = TieredStore(gpu=0, cpu=0, directory=str(tmp_path))
    assert store.get(key()) is None and store.stats()["misses"] == 1
    store.put(key(), ones(1))
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert store.get(key()) is None
    store.close()


def test_a_remote_directory_comes_last(tiered, tmp_path):
    pytest.importorskip("fsspec")
    store = tiered(gpu=1, cpu=1, disk=1, remote=f"file://{tmp_path}/far")
    for unit in range(6):
        store.put(key(unit), ones(unit))
    assert tiers(store, "entries") == {"gpu": 0, "cpu": 1, "disk": 1, "remote": 4} or (
        tiers(store, "entries") == {"gpu": 1, "cpu": 1, "disk": 1, "remote": 3}
    )
    assert [store.get(key(unit))[0].item() for unit in range(6)] == list(range(6))
    store.close()
    assert list((tmp_path / "far").iterdir()) == []
