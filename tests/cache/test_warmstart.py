"""Later segments of a long video start with residuals of earlier ones, under every rule that holds
for a step cache.
"""

import pytest
import torch
from by_hand import by_hand, cached, decisions, moving_latents
from test_exactness import GRANULARITIES, SKIPPING, knobs_for

import ditcache
from ditcache.cache.policies.base import Policy
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.errors import ConfigError
from ditcache.store.device import DeviceStore
from ditcache.store.tiered import TieredStore

ENTRY = 80 * 160 * 4  # bytes of a residual of the embedded model


def of_segment(cache, segment, branch="cond", unit=0):
    """Per step: `1` computed, `0` skipped, `w` warm."""
    own = [d for d in cache.trace.decisions if d.segment == segment]
    own = [d for d in own if (d.branch, d.unit) == (branch, unit)]
    return "".join("w" if d.reason == "warm" else str(int(d.computed)) for d in own)


def video(pipe, cache, segments=2, **settings):
    """Outputs per segment, all of which go through the same latents."""
    with cache.one_video():
        return [by_hand(pipe, **settings) for _ in range(segments)]


def same(first, second):
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))  # fmt: skip


@pytest.mark.parametrize("policy", SKIPPING)
def test_around_every_policy(pipe, policy):
    """No step or no earlier segment: bit for bit the policy alone. Otherwise the first steps are
    what the segment before computed, and fewer units compute.
    """
    knobs = {"head": 1, **SKIPPING[policy]}
    with cached(pipe, policy, **knobs) as cache:
        plain, alone, decided = by_hand(pipe), cache.trace, decisions(cache)
    with cached(pipe, policy, warmstart=WarmStart(steps=0), **knobs) as cache:
        assert all(same(plain, outputs) for outputs in video(pipe, cache))
        assert cache.trace.computed == 2 * alone.computed
    with cached(pipe, policy, warmstart=WarmStart(steps=2), **knobs) as cache:
        first, second = video(pipe, cache)
        assert same(plain, first)
        assert of_segment(cache, 0) == decided
        assert of_segment(cache, 1)[0] == "w" and cache.trace.computed < 2 * alone.computed
        for branch in plain:
            assert torch.allclose(second[branch][0], plain[branch][0], atol=1e-4)
        assert cache.store.stats()["entries"] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity(pipe, granularity):
    knobs = knobs_for("interval", granularity, SKIPPING)
    with cached(pipe, "interval", head=2, warmstart="reuse", **knobs) as cache:
        first, second = video(pipe, cache, branches=("cond",))
        units = {d.unit for d in cache.trace.decisions}
        assert {of_segment(cache, 1, unit=unit)[:2] for unit in units} == {"ww"}
    assert torch.allclose(second["cond"][1], first["cond"][1], atol=1e-3)


def test_only_a_computed_residual_of_the_window_is_reused(pipe):
    warmstart = WarmStart(steps=2, window=2)
    with cached(pipe, "interval", every=1, warmstart=warmstart) as cache:
        video(pipe, cache, 6, steps=3, branches=("cond",))
        seen = [of_segment(cache, segment) for segment in range(6)]
    assert seen == ["111", "ww1", "ww1", "111", "ww1", "ww1"]


def test_what_left_the_window_left_the_store(pipe):
    store, held = DeviceStore(), []
    warmstart = WarmStart(steps=2, window=1)
    with cached(pipe, "interval", every=1, warmstart=warmstart, store=store) as cache:
        with cache.one_video():
            for _ in range(4):
                by_hand(pipe, steps=3)
                held.append({(*key[:4], key.slot) for key in store.entries})
        assert store.entries == {}
    assert len(held[0]) == 4  # two steps, two branches, nothing of the generation itself
    assert held[0] == held[1] != held[2] == held[3]


def test_pipeline_runs_outside_of_one_video_share_nothing(pipe):
    with cached(pipe, "interval", every=2, head=1, warmstart="reuse") as cache:
        first, second = by_hand(pipe), by_hand(pipe)
        assert "w" not in of_segment(cache, 0)
        video(pipe, cache, 1)
        third = video(pipe, cache, 1)[0]  # another video
        assert "w" not in of_segment(cache, 0)
    assert same(first, second) and same(first, third)


def test_branches_start_with_their_own(pipe):
    with cached(pipe, "interval", every=1, warmstart=WarmStart(steps=1)) as cache:
        first, second = video(pipe, cache, steps=2)
    assert not torch.allclose(first["cond"][0], first["uncond"][0], atol=1e-2)
    for branch in first:
        assert torch.allclose(first[branch][0], second[branch][0], atol=1e-4)


def test_another_shape_computes(pipe):
    warm = cached(pipe, "interval", every=2, head=1, warmstart="reuse")
    with warm as cache, cache.one_video():
        by_hand(pipe)
        by_hand(pipe, latents=lambda step: moving_latents(step, batch=2))
        assert "w" not in of_segment(cache, 1)


def test_limits_on_skips_hold(pipe):
    warmstart = WarmStart(steps=5)
    for knobs, expected in (
        ({"max_skips": 2}, "ww1ww1"),
        ({"budget": 3}, "www111"),
        ({"tail": 4}, "ww1111"),
    ):
        with cached(pipe, "interval", every=1, warmstart=warmstart, **{"tail": 1, **knobs}) as cache:  # fmt: skip
            video(pipe, cache, branches=("cond",))
            assert of_segment(cache, 1) == expected, knobs


def test_a_store_that_keeps_nothing_gives_the_policy_alone(pipe):
    knobs = {"every": 2, "head": 1}
    with TieredStore(gpu=16, cpu=0, disk=0) as store:
        with cached(pipe, "interval", store=store, **knobs) as cache:
            plain = by_hand(pipe)
        with cached(pipe, "interval", store=store, warmstart="reuse", **knobs) as cache:
            assert all(same(plain, outputs) for outputs in video(pipe, cache))


def test_the_same_video_whatever_the_tiers(pipe, tmp_path):
    def run(store):
        knobs = {"every": 2, "head": 2, "granularity": 2, "store": store}
        with cached(pipe, "taylorseer", warmstart=WarmStart(3, 2), **knobs) as cache:
            return video(pipe, cache, 3, branches=("cond",)), cache.trace.decisions

    plain, decided = run(DeviceStore())
    assert "warm" in {d.reason for d in decided}
    budget = 3 * ENTRY
    for sizes in ({"gpu": budget, "cpu": budget}, {"gpu": 0, "cpu": 0}):
        with TieredStore(**sizes, disk=None, directory=str(tmp_path)) as store:
            found, again = run(store)
            counts = store.stats()["tiers"]
        assert again == decided
        assert all(same(a, b) for a, b in zip(plain, found, strict=True))
        assert counts["disk"]["hits"] > 0 and not counts["disk"]["evictions"]
        assert all(tier["bytes_peak"] <= (tier["budget"] or 2**40) for tier in counts.values())
    assert list(tmp_path.iterdir()) == []


class Watched(DeviceStore):
    """Notes what is prefetched and what is asked for, in the order of the calls."""

    def prefetch(self, keys):
        self.__dict__.setdefault("calls", []).append(("prefetch", list(keys)))

    def get(self, key):
        self.__dict__.setdefault("calls", []).append(("get", key))
        return super().get(key)


@pytest.mark.parametrize("granularity", ["stack", 3])
def test_the_window_is_prefetched_while_earlier_units_compute(pipe, granularity):
    store = Watched()
    knobs = {"every": 3, "head": 3, "granularity": granularity, "store": store}
    with cached(pipe, "interval", warmstart=WarmStart(steps=3), **knobs) as cache:
        video(pipe, cache)
    asked = [at for at, (name, key) in enumerate(store.calls) if name == "get" and key.slot[:4] == "step"]  # fmt: skip
    assert len(asked) == 3 * 2 * (1 if granularity == "stack" else 3)
    for at in asked:
        before = [keys for name, keys in store.calls[:at] if name == "prefetch"]
        assert store.calls[at][1] in before[-1]


def test_two_experts_keep_apart(checkpoints):
    """The first expert's are there again when the next segment starts."""
    pipe = ditcache.load(
        "wan2.2_t2v", path=str(checkpoints["wan2.2_t2v"]), dtype="float32", device="cpu"
    ).pipe
    pipe.register_to_config(boundary_ratio=0.88)
    seen = []
    with cached(pipe, "interval", every=1, tail=0, warmstart=WarmStart(steps=8, window=1)) as cache:
        with cache.one_video():
            for _ in range(2):
                pipe(
                    "a cat", height=32, width=32, num_frames=5, num_inference_steps=20,
                    output_type="latent", max_sequence_length=8, generator=torch.manual_seed(0),
                    callback_on_step_end=lambda *_: seen.append(cache.store.nbytes()) or {},
                )  # fmt: skip
        rows = [d for d in cache.trace.decisions if d.segment == 1 and d.branch == "cond"]
    assert [d.expert for d in rows] == ["transformer"] * 6 + ["transformer_2"] * 14
    assert [d.reason == "warm" for d in rows] == [True] * 8 + [False] * 12
    assert cache.store.stats()["bytes"] == 0
    assert len({*seen[8:20]}) == 1  # of the first expert nothing but what is left to segment 1


class Notes(Policy):
    """Computes everything and notes what it was told."""

    def should_compute(self, ctx):
        return True

    def record(self, ctx, computed):
        TOLD.append(computed)


TOLD: list[bool] = []


def test_a_policy_is_told_of_warm_steps_as_of_computed_ones(pipe):
    TOLD.clear()
    with cached(pipe, Notes(), warmstart=WarmStart(steps=2)) as cache:
        video(pipe, cache, steps=3, branches=("cond",))
    assert TOLD == [True] * 6
    with cached(pipe, Notes(), warmstart=WarmStart(steps=2)) as cache:
        video(pipe, cache, steps=3, branches=("cond",))
        assert of_segment(cache, 1) == "ww1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps: must be >= 0, got -1"),
        ({"window": 0}, "window: must be >= 1, got 0"),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmStart(**settings)


def test_none_takes_no_warmstart(pipe):
    with pytest.raises(ConfigError, match="none takes no warmstart"):
        ditcache.enable_cache(pipe, "none", warmstart="reuse")
