"""The driver's rules, which hold for every policy; peers' defects by their number in the reference
(D1, D2, ...).
"""

import json

import pytest
import torch
from by_hand import TOKENS, by_hand, cached, decisions, moving_latents
from random_checkpoints import small_transformer
from test_exactness import DYNAMIC, PROMPT, SKIPPING, STATIC, generate, knobs_for

import ditcache
from ditcache.cache.driver import needed
from ditcache.cache.forecasters.fitted import Fitted
from ditcache.cache.forecasters.hermite import Hermite
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.forecasters.two_anchor import TwoAnchor
from ditcache.cache.policies.base import Policy
from ditcache.errors import ConfigError, DitcacheError

SKIP_ALL = {"every": 100, "head": 1, "tail": 0}


def steps_computed(cache, branch="cond", unit=0):
    return [
        d.step for d in cache.trace.decisions if d.computed and (d.branch, d.unit) == (branch, unit)
    ]


def test_interval_counts_from_the_last_head_step(pipe):
    cache = ditcache.enable_cache(pipe, "interval", every=3, head=2, tail=1)
    generate(pipe, steps=10)
    assert steps_computed(cache) == [0, 1, 4, 7, 9]
    assert steps_computed(cache, "uncond") == [0, 1, 4, 7, 9]


def test_longest_run_of_skips(pipe):
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL, max_skips=2)
    generate(pipe, steps=8)
    assert steps_computed(cache) == [0, 3, 6]


def test_budget_of_skips(pipe):
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL, budget=3)
    generate(pipe, steps=8)
    assert steps_computed(cache) == [0, 4, 5, 6, 7]
    assert steps_computed(cache, "uncond") == [0, 4, 5, 6, 7]


def test_the_budget_holds_across_a_gap(pipe):
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL, budget=2)
    run_steps(pipe, [0, 1, 4, 5, 6])
    assert [d.step for d in cache.trace.decisions if not d.computed] == [1, 5]


def run_steps(pipe, steps, num_steps=9):
    states = torch.randn(1, 512, pipe.transformer.config.text_dim)
    with torch.no_grad():
        for step in steps:
            with pipe.transformer.cache_context(
                "cond", step_index=step, num_inference_steps=num_steps
            ):
                pipe.transformer(
                    hidden_states=torch.randn(1, 16, 5, 8, 8),
                    timestep=torch.tensor([500]),
                    encoder_hidden_states=states,
                    return_dict=False,
                )


def test_d3_guidance_1_counts_every_step_once(pipe):
    cache = ditcache.enable_cache(pipe, "interval", every=2, head=1, tail=0)
    generate(pipe, steps=8, guidance=1.0)
    assert [d.branch for d in cache.trace.decisions] == ["cond"] * 8
    assert steps_computed(cache) == [0, 2, 4, 6]


def test_d11_a_mask_of_the_wrong_length_or_start_is_refused(pipe):
    class Mask(Policy):
        def __init__(self, mask):
            self.steps = mask

        def mask(self, schedule):
            return self.steps

    for mask, message in (
        ([True] * 5, "5 steps, the run has 6"),
        ([False] + [True] * 5, "first step"),
    ):
        ditcache.enable_cache(pipe, Mask(mask))
        with pytest.raises(ConfigError, match=message):
            generate(pipe)
        ditcache.disable_cache(pipe)


@pytest.mark.parametrize("policy", SKIPPING)
def test_d13_a_changed_shape_computes(pipe, policy):
    """ChronoEdit drops frames in the middle of a run."""

    def dropping(step):
        latents = moving_latents(step)
        return latents if step < 3 else latents[:, :, ::4]

    cache = ditcache.enable_cache(pipe, policy, head=1, tail=0, **SKIPPING[policy])
    outputs = by_hand(pipe, latents=dropping)
    assert all(out.isfinite().all() for branch in outputs.values() for out in branch)
    for branch in ("cond", "uncond"):
        assert decisions(cache, branch)[3] == "1"
        found = {d.step: d.reason for d in cache.trace.decisions if d.branch == branch}
        assert found[0] == "first" and found[3] == "shape"


@pytest.mark.parametrize("policy", DYNAMIC)
def test_d13_what_was_measured_before_a_drop_is_not_used_after_it(pipe, policy):
    """From the drop on, as if the run had begun there."""

    def dropping(step):
        latents = moving_latents(step)
        return latents if step < 2 else latents[:, :, ::4]

    cache = ditcache.enable_cache(pipe, policy, head=0, **SKIPPING[policy])
    whole = by_hand(pipe, latents=dropping)
    tail = by_hand(pipe, latents=dropping, which=range(2, 6))
    for branch in ("cond", "uncond"):
        pairs = zip(whole[branch][2:], tail[branch], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert "0" in decisions(cache)


def test_a_step_left_out_computes(pipe):
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL)
    run_steps(pipe, [0, 1, 4, 5])
    computed = [(d.step, d.reason) for d in cache.trace.decisions if d.computed]
    assert computed == [(0, "first"), (4, "gap")]


@pytest.mark.parametrize("policy", SKIPPING)
def test_a_gap_computes_on_both_branches(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=1, tail=0, **SKIPPING[policy])
    by_hand(pipe, which=[0, 1, 4, 5])
    for branch in ("cond", "uncond"):
        (after,) = (d for d in cache.trace.decisions if d.branch == branch and d.step == 4)
        assert (after.computed, after.reason) == (True, "gap")


@pytest.mark.parametrize("policy", SKIPPING)
def test_d15_head_and_tail_count_steps(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=3, tail=2, **SKIPPING[policy])
    generate(pipe)
    for branch in ("cond", "uncond"):
        made = decisions(cache, branch)
        assert len(made) == 6 and made[:3] == "111" and made[4:] == "11"


@pytest.mark.parametrize("policy", sorted(SKIPPING.keys() - {"cfg_delta"}))
def test_d15_run_and_budget_count_steps(pipe, policy):
    """The rules are the driver's, so no policy can break them."""
    knobs = {**SKIPPING[policy], "head": 1, "tail": 0}
    with cached(pipe, policy, max_skips=1, **knobs) as cache:
        by_hand(pipe)
        assert all("00" not in decisions(cache, b) for b in ("cond", "uncond"))
        assert "0" in decisions(cache)
    with cached(pipe, policy, budget=1, **knobs) as cache:
        by_hand(pipe)
        assert [decisions(cache, b).count("0") for b in ("cond", "uncond")] == [1, 1]
    with cached(pipe, policy, budget=0, **knobs) as cache:
        by_hand(pipe)
        assert decisions(cache) == decisions(cache, "uncond") == "111111"


@pytest.mark.parametrize("granularity", ["stack", "per_block", 3])
@pytest.mark.parametrize(
    ("forecaster", "tensors"),
    [
        (Hold(), 1),
        *((Taylor(order=order), order + 1) for order in range(4)),
        *((Hermite(order=order), order + 1) for order in (1, 2, 3)),
        (TwoAnchor(), 4),
    ],
)
def test_d18_bytes_of_each_forecaster(pipe, forecaster, tensors, granularity):
    """Per unit and branch, of the tokens' size; nothing else is kept."""
    cache = ditcache.enable_cache(
        pipe, "interval", forecaster, granularity, every=2, head=2, tail=1
    )
    by_hand(pipe, steps=9)
    units = {"stack": 1, "per_block": 8, 3: 3}[granularity]
    one = TOKENS * width_of(pipe) * 4
    assert cache.store.stats()["bytes_peak"] == 2 * units * tensors * one
    assert {row["bytes"] for row in cache.stats["units"].values()} == {tensors * one}
    assert cache.store.stats()["bytes"] == cache.store.stats()["entries"] == 0


def test_d18_bytes_of_the_fitted_forecaster(pipe):
    cache = ditcache.enable_cache(pipe, "planned", Fitted(), **SKIPPING["planned"])
    generate(pipe)
    assert cache.store.stats()["bytes_peak"] == 2 * 2 * TOKENS * width_of(pipe) * 4


def width_of(pipe):
    return pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim


@pytest.mark.parametrize("tensors", [1, 2, 3, 4])
def test_needed_drops_only_what_no_skip_can_use(tensors):
    """Against the definition, on every pattern of eight steps."""
    for pattern in range(256):
        certain = [bool(pattern >> step & 1) for step in range(8)]
        for step, kept in enumerate(needed(certain, certain, tensors)):
            free = [later for later in range(step + 1, 8) if not certain[later]]
            newer = sum(certain[step + 1 : free[0]]) if free else None
            assert kept == (newer is not None and newer < tensors)


@pytest.mark.parametrize("head", [1, 2, 4])
@pytest.mark.parametrize("forecaster", [Hold(), Taylor(order=2), TwoAnchor()])
def test_leaving_out_what_is_not_needed_changes_no_output(pipe, monkeypatch, forecaster, head):
    knobs = {"preset": None, "compute": [3, 2], "skip": [1, 2], "head": head}
    outputs = []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(
                "ditcache.cache.driver.needed", lambda certain, *_: [True] * len(certain)
            )
        with cached(pipe, "scm", forecaster, **knobs) as cache:
            outputs.append(by_hand(pipe, steps=9)["cond"])
            assert "0" in decisions(cache)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_nothing_is_kept_where_nothing_can_be_skipped(pipe):
    cache = ditcache.enable_cache(pipe, "interval", every=1)
    generate(pipe)
    assert cache.store.stats()["bytes_peak"] == 0


@pytest.mark.parametrize("granularity", ["per_block", "output"])
@pytest.mark.parametrize("policy", SKIPPING)
def test_d10_nothing_is_kept_after_a_run(pipe, policy, granularity):
    cache = ditcache.enable_cache(pipe, policy, head=1, **knobs_for(policy, granularity, SKIPPING))
    generate(pipe)
    assert cache.store.stats()["bytes_peak"] > 0
    assert cache.store.stats()["bytes"] == cache.store.stats()["entries"] == 0
    assert cache.run.generation is None
    assert pipe.transformer.blocks.driver.call is None


def test_d22_a_signal_that_is_not_finite_computes():
    from ditcache.cache.signal import relative_l1

    with pytest.warns(UserWarning, match="not finite"):
        signal = relative_l1(torch.full((1, 2, 3), torch.nan), torch.ones(1, 2, 3))
    assert not signal < 1e9


@pytest.mark.parametrize("policy", SKIPPING)
def test_d24_the_last_step_is_computed_by_default(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, **SKIPPING[policy])
    generate(pipe)
    assert cache.settings.tail == 1
    assert decisions(cache)[-1] == decisions(cache, "uncond")[-1] == "1"


@pytest.mark.parametrize("policy", SKIPPING)
def test_d25_a_batch_of_two_videos(pipe, policy):
    """Each is the video it would be alone, where decisions do not depend on the content."""
    prompts, seeds = [PROMPT, "a red star"], [3, 8]
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    both = generate(pipe, prompts, generator=noise)
    assert "0" in decisions(cache, "uncond") and both.isfinite().all()
    for prompt, seed, video in zip(prompts, seeds, both, strict=True):
        alone = generate(pipe, prompt, seed=seed)[0]
        if policy in STATIC:
            assert (video - alone).norm() / alone.norm() < 1e-3


def test_d25_one_restless_sample_computes():
    from ditcache.cache.signal import relative_l1

    reference = torch.ones(2, 3, 4)
    value = reference.clone()
    value[1] += 0.5
    assert relative_l1(value, reference) == pytest.approx(0.5)


@pytest.mark.parametrize("policy", SKIPPING)
def test_d26_statistics_are_json(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    generate(pipe)
    stats = json.loads(json.dumps(cache.stats))
    assert stats["policy"] == type(cache.settings.policy).__name__
    assert set(stats["units"]) == {"transformer/cond/0", "transformer/uncond/0"}
    for row in stats["units"].values():
        assert row["computed"] + row["skipped"] == len(row["signals"]) == 6
    assert all(json.loads(json.dumps(row)) == row for row in cache.trace.rows())


def test_d19_no_blocks_is_an_error():
    transformer = small_transformer()
    transformer.blocks = torch.nn.ModuleList()
    with pytest.raises(DitcacheError, match="has no blocks to cache"):
        ditcache.enable_cache(transformer, "interval")


def test_d21_a_policy_that_cannot_measure_says_so(pipe):
    """diffusers' SeaCache would compute everything and say nothing."""
    ditcache.enable_cache(pipe.transformer, "seacache")
    with pytest.raises(ConfigError, match="SeaCache needs the pipeline's sigmas"):
        run_steps(pipe, [0, 1])
    ditcache.disable_cache(pipe.transformer)
    ditcache.enable_cache(pipe.transformer, "teacache", coefficients=[1.0, 0.0])
    with pytest.raises(ConfigError, match="TeaCache needs a pipeline with a scheduler"):
        run_steps(pipe, [0, 1])
    ditcache.disable_cache(pipe.transformer)


@pytest.mark.parametrize("policy", SKIPPING)
def test_d21_statistics_say_why_nothing_was_skipped(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=5, tail=1, **SKIPPING[policy])
    generate(pipe)
    assert {row["skipped"] for row in cache.stats["units"].values()} == {0}
    reasons = [d.reason for d in cache.trace.decisions if d.branch == "cond"]
    assert reasons == ["first", *["head"] * 4, "tail"]
