"""The driver's rules, which hold for every policy; peers' defects by their number in the reference
(D1, D2, ...).
"""

import json

import pytest
import torch
from test_exactness import generate

import ditcache
from ditcache.cache.policies.base import Policy
from ditcache.errors import ConfigError

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


def test_d13_a_changed_shape_computes(pipe):
    """ChronoEdit drops frames in the middle of a run."""
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL)
    states = torch.randn(1, 512, pipe.transformer.config.text_dim)
    with torch.no_grad():
        for step, frames in enumerate([8, 8, 2, 2]):
            for name in ("cond", "uncond"):
                with pipe.transformer.cache_context(name, step_index=step, num_inference_steps=5):
                    out = pipe.transformer(
                        hidden_states=torch.randn(1, 16, frames, 8, 8),
                        timestep=torch.tensor([500]),
                        encoder_hidden_states=states,
                        return_dict=False,
                    )[0]
                assert out.isfinite().all()
    assert [
        (d.step, d.reason) for d in cache.trace.decisions if d.computed and d.branch == "cond"
    ] == [
        (0, "first"),
        (2, "shape"),
    ]


def test_a_step_left_out_computes(pipe):
    cache = ditcache.enable_cache(pipe, "interval", **SKIP_ALL)
    run_steps(pipe, [0, 1, 4, 5])
    computed = [(d.step, d.reason) for d in cache.trace.decisions if d.computed]
    assert computed == [(0, "first"), (4, "gap")]


@pytest.mark.parametrize("granularity", ["stack", "per_block", 3])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_d18_bytes_are_order_plus_one_tensors_per_unit_and_branch(pipe, order, granularity):
    from ditcache.cache.forecasters.taylor import Taylor

    cache = ditcache.enable_cache(pipe, "interval", Taylor(order=order), granularity=granularity)
    generate(pipe, steps=9)
    tokens, width = (
        80,
        pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim,
    )
    units = len({d.unit for d in cache.trace.decisions})
    assert cache.store.stats()["bytes_peak"] == 2 * units * (order + 1) * tokens * width * 4


def test_d10_nothing_is_kept_after_a_run(pipe):
    for policy in ("interval", "taylorseer", "fbcache"):
        cache = ditcache.enable_cache(pipe, policy, granularity="per_block")
        generate(pipe)
        assert cache.store.stats()["bytes"] == cache.store.stats()["entries"] == 0
        ditcache.disable_cache(pipe)


def test_d10_the_first_expert_is_freed_at_the_boundary(checkpoints):
    bundle = ditcache.load(
        "wan2.2_t2v", path=str(checkpoints["wan2.2_t2v"]), dtype="float32", device="cpu"
    )
    cache = ditcache.enable_cache(bundle, "interval", every=2, head=1, tail=0)
    held = []

    def watch(pipe, index, timestep, tensors):
        held.append({key.expert for key in cache.store.entries})
        return tensors

    bundle.pipe(
        "a cat",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
    )
    ditcache.disable_cache(bundle)
    assert held[0] == {"transformer"} and {"transformer_2"} in held
    assert all(len(experts) <= 1 for experts in held)
    low = [d for d in cache.trace.decisions if d.expert == "transformer_2" and d.branch == "cond"]
    assert low[0].reason == "first" and low[0].step == len(
        [d for d in cache.trace.decisions if d.expert == "transformer" and d.branch == "cond"]
    )


def test_d22_a_signal_that_is_not_finite_computes():
    from ditcache.cache.signal import relative_l1

    with pytest.warns(UserWarning, match="not finite"):
        signal = relative_l1(torch.full((1, 2, 3), torch.nan), torch.ones(1, 2, 3))
    assert not signal < 1e9


def test_d24_the_last_step_is_computed_by_default(pipe):
    for policy in ("interval", "taylorseer", "fbcache"):
        cache = ditcache.enable_cache(pipe, policy)
        generate(pipe, steps=9)
        assert steps_computed(cache)[-1] == 8
        ditcache.disable_cache(pipe)


def test_d25_one_restless_sample_computes():
    from ditcache.cache.signal import relative_l1

    reference = torch.ones(2, 3, 4)
    value = reference.clone()
    value[1] += 0.5
    assert relative_l1(value, reference) == pytest.approx(0.5)


def test_d26_statistics_are_json(pipe):
    cache = ditcache.enable_cache(pipe, "fbcache")
    generate(pipe)
    stats = json.loads(json.dumps(cache.stats))
    assert stats["policy"] == "FBCache"
    row = stats["units"]["transformer/cond/0"]
    assert row["computed"] + row["skipped"] == len(row["signals"]) == 6
