"""The same video whatever the store: every policy on device-only, tiny budgets and disk-only."""

import pytest
import torch
from by_hand import by_hand, cached, decisions
from test_exactness import SKIPPING, generate, knobs_for

import ditcache
from ditcache.cache.forecasters.fitted import Fitted
from ditcache.cache.forecasters.hermite import Hermite
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.forecasters.two_anchor import TwoAnchor
from ditcache.store.base import Key
from ditcache.store.device import DeviceStore
from ditcache.store.tiered import TieredStore

ENTRY = 80 * 128 * 4  # bytes of a residual of the embedded model
STORES = {
    "tiny": {"gpu": 2 * ENTRY, "cpu": 2 * ENTRY, "disk": None},
    "disk": {"gpu": 0, "cpu": 0, "disk": None},
}


def tiers(store, name):
    return {tier: counts[name] for tier, counts in store.stats()["tiers"].items()}


@pytest.mark.parametrize("policy", SKIPPING)
def test_d32_the_same_video_whatever_the_tiers(pipe, policy, tmp_path):
    knobs = {"head": 1, **knobs_for(policy, 3, SKIPPING)}
    with cached(pipe, policy, **knobs) as cache:
        plain, decided = generate(pipe), cache.trace.decisions
    assert cache.trace.computed < len(decided)
    for name, budgets in STORES.items():
        with TieredStore(**budgets, directory=str(tmp_path)) as store:
            with cached(pipe, policy, store=store, **knobs) as cache:
                assert torch.equal(generate(pipe), plain), name
                assert cache.trace.decisions == decided
            stats = store.stats()
            assert stats["entries"] == stats["bytes"] == 0 and stats["hits"] > 0
            assert not any(tiers(store, "evictions").values())
    assert list(tmp_path.iterdir()) == []


def test_tiny_budgets_cross_every_boundary(pipe, tmp_path):
    with TieredStore(**STORES["tiny"], directory=str(tmp_path)) as store:
        with cached(pipe, "taylorseer", granularity="per_block", every=2, head=1, store=store):
            by_hand(pipe)
        spills, hits = tiers(store, "spills"), tiers(store, "hits")
        assert spills["gpu"] > spills["cpu"] > 0 and hits["disk"] > 0
        peaks = tiers(store, "bytes_peak")
        assert peaks["gpu"] <= 2 * ENTRY and peaks["cpu"] <= 2 * ENTRY


@pytest.mark.parametrize("forecaster", [Hold(), Taylor(2), TwoAnchor(), Hermite()])
def test_every_forecaster_runs_on_any_store(pipe, forecaster, tmp_path):
    def outputs(store):
        with cached(
            pipe, "interval", forecaster, every=2, head=1, granularity=3, store=store
        ) as cache:
            return by_hand(pipe), decisions(cache)

    plain, decided = outputs(DeviceStore())
    assert "0" in decided
    for budgets in STORES.values():
        with TieredStore(**budgets, directory=str(tmp_path)) as store:
            found, again = outputs(store)
        assert again == decided
        assert all(torch.equal(a, b) for branch in plain for a, b in zip(plain[branch], found[branch], strict=True))  # fmt: skip


def test_fitted_runs_on_any_store(pipe, tmp_path):
    """Its dampings are the plan's, one by one, whatever its residuals went through."""

    def outputs(store):
        knobs = {"granularity": "per_block", "head": 1, "store": store, **SKIPPING["planned"]}
        with cached(pipe, "planned", Fitted(), **knobs) as cache:
            return by_hand(pipe), decisions(cache)

    plain, decided = outputs(DeviceStore())
    assert "0" in decided
    for budgets in STORES.values():
        with TieredStore(**budgets, directory=str(tmp_path)) as store:
            found, again = outputs(store)
            assert tiers(store, "hits")["disk"] > 0
        assert again == decided
        assert all(torch.equal(a, b) for branch in plain for a, b in zip(plain[branch], found[branch], strict=True))  # fmt: skip


def test_what_was_evicted_is_computed_the_same_way_every_time(pipe):
    def run():
        with TieredStore(gpu=5 * ENTRY, cpu=0, disk=0) as store:
            with cached(
                pipe, "interval", every=2, head=1, granularity="per_block", store=store
            ) as cache:
                video = generate(pipe)
            return video, [(d.computed, d.reason) for d in cache.trace.decisions], store.stats()

    (first, decided, stats), (second, again, _) = run(), run()
    assert torch.equal(first, second) and decided == again
    assert (True, "missing") in decided
    assert stats["tiers"]["gpu"]["evictions"] > 0 and stats["misses"] > 0


def test_a_store_that_keeps_nothing_gives_the_uncached_video(pipe):
    plain = generate(pipe)
    with TieredStore(gpu=16, cpu=0, disk=0) as store:
        with cached(pipe, "taylorseer", every=2, head=1, store=store) as cache:
            assert torch.equal(generate(pipe), plain)
        assert cache.trace.computed == len(cache.trace.decisions)


class Watched(DeviceStore):
    """Notes what is prefetched and what is asked for, in the order of the calls."""

    def prefetch(self, keys):
        self.__dict__.setdefault("calls", []).append(("prefetch", list(keys)))

    def get(self, key):
        self.__dict__.setdefault("calls", []).append(("get", key))
        return super().get(key)


@pytest.mark.parametrize("granularity", ["stack", "per_block"])
def test_a_static_policy_prefetches_exactly_what_it_will_use(pipe, granularity):
    store = Watched()
    with cached(
        pipe, "interval", Taylor(1), every=3, head=1, tail=1, granularity=granularity, store=store
    ):
        by_hand(pipe, steps=9)
    wanted = {key for name, keys in store.calls if name == "prefetch" for key in keys}
    asked = {key for name, key in store.calls if name == "get"}
    assert asked and wanted == asked
    for at, (name, key) in enumerate(store.calls):
        if name == "get":  # the forward or unit before has announced it
            before = [keys for name, keys in store.calls[:at] if name == "prefetch"]
            assert key in before[-1]


def test_nothing_is_prefetched_once_nothing_will_skip(pipe):
    store = Watched()
    with cached(pipe, "interval", every=3, head=1, tail=3, store=store):
        by_hand(pipe, steps=6)
    assert [keys for name, keys in store.calls if name == "prefetch"][-6:] == [[]] * 6


def test_residuals_about_to_be_written_over_are_not_prefetched(pipe):
    store = Watched()
    with cached(pipe, "interval", Taylor(1), every=2, head=1, tail=0, store=store):
        by_hand(pipe, steps=7, branches=("cond",))
    prefetched = [keys for name, keys in store.calls if name == "prefetch"]
    slots = [[key.slot for key in keys] for keys in prefetched]
    # step 3 skips; 4 computes and writes over slot 0, so only 1 survives until 5, which skips
    assert slots[:5] == [["0"], ["0"], ["0", "1"], ["1"], ["0", "1"]]


@pytest.mark.parametrize("policy", ["fbcache", "dbcache", "dicache"])
def test_a_dynamic_policy_prefetches_for_the_next_possible_skip(pipe, policy):
    store = Watched()
    with cached(pipe, policy, head=1, store=store, **SKIPPING[policy]):
        by_hand(pipe)
    announced: set[Key] = set()
    for name, what in store.calls:
        if name == "prefetch":
            announced |= set(what)
        else:
            assert what in announced or store.entries.get(what) is None


def test_a_video_after_the_other_leaves_the_store_empty(pipe, tmp_path):
    with TieredStore(gpu=ENTRY, cpu=0, disk=None, directory=str(tmp_path)) as store:
        ditcache.enable_cache(pipe, "interval", every=2, head=1, store=store)
        for seed in (1, 2):
            generate(pipe, seed=seed)
        assert store.stats()["entries"] == 0
        ditcache.disable_cache(pipe)
        assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".lock"]


def test_costs_of_computing_reach_a_store_that_weighs_them(pipe, tmp_path):
    store = TieredStore(gpu=0, cpu=0, directory=str(tmp_path), skip_slow=True)
    with store, cached(pipe, "interval", every=2, head=1, store=store):
        seen = []
        by_hand(pipe, before=lambda step, branch: seen.append(dict(store.costs)))
    assert {key[2] for costs in seen for key in costs} == {"cond", "uncond"}
    assert all(cost > 0 for costs in seen for cost in costs.values())
    assert store.costs == {}  # they go with the state
