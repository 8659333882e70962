"""Where nothing is skipped, nothing changes: every policy, every granularity, on an unmodified
diffusers pipeline.
"""

from functools import cache as remembered
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from by_hand import by_hand, decisions, moving_latents

import ditcache
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cli import conf_dir

PROMPT = "a yellow circle moves down on a checkered green background"
PLANS = str(Path(__file__).with_name("plans.yaml"))
FULL = {  # knobs with which a policy computes everything
    "interval": {"every": 1},
    "taylorseer": {"every": 1},
    "fbcache": {"threshold": 0.0},
    "teacache": {"rel_l1_thresh": 0.0, "coefficients": [1.0, 0.0]},
    "magcache": {"threshold": 0.0, "ratios": [1.0]},
    "easycache": {"threshold": 0.0},
    "seacache": {"threshold": 0.0},
    "dbcache": {"threshold": 0.0, "back": 1},
    "dicache": {"threshold": 0.0},
    "scm": {"preset": None, "compute": [6], "skip": [1]},
    "planned": {"compute": 6, "calibration": PLANS},
    "cfg_delta": {"cfg": CfgDelta(every=1)},
}
SKIPPING = {  # knobs with which it skips something in a run of six steps with head=1
    "interval": {"every": 2},
    "taylorseer": {"every": 2},
    "fbcache": {"threshold": 0.9},
    "teacache": {"rel_l1_thresh": 0.35, "coefficients": [1.0, 0.0]},
    "magcache": {
        "threshold": 0.3, "max_run": 1, "retention": 0.0,
        "ratios": [1.0, 0.95, 0.9, 0.9, 0.85, 0.8],
    },
    "easycache": {"threshold": 0.4},
    "seacache": {"threshold": 0.9},
    "dbcache": {"threshold": 0.9, "back": 1},
    "dicache": {"threshold": 0.5},
    "scm": {"preset": None, "compute": [2, 1], "skip": [1]},
    "planned": {"compute": 4, "calibration": PLANS},
    "cfg_delta": {"cfg": CfgDelta(every=3)},
}  # fmt: skip
DYNAMIC = ["fbcache", "easycache", "seacache", "dbcache", "dicache"]
STATIC = sorted(SKIPPING.keys() - {*DYNAMIC})
THRESHOLDS = [name for name, knobs in FULL.items() if {"threshold", "rel_l1_thresh"} & knobs.keys()]
GRANULARITIES = ["stack", "per_block", 3, "output"]


def knobs_for(policy, granularity, knobs=FULL):
    """`output` stands in for what blocks at the back would compute, so there must be none."""
    more = {"back": 0} if granularity == "output" and policy == "dbcache" else {}
    return {**knobs[policy], "granularity": granularity, **more}


def generate(pipe, prompt=PROMPT, *, seed=3, steps=6, guidance=4.0, height=64, width=64, **more):
    return pipe(
        prompt,
        height=height,
        width=width,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        max_sequence_length=64,  # less to attend to than by default
        **{"generator": torch.Generator().manual_seed(seed), **more},
    ).frames


@remembered
def uncached(pipe, **settings):
    """`generate` on a pipeline without a cache, once per test session and settings."""
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList
    return generate(pipe, **settings)


def test_every_policy_is_listed_here():
    """All but `none` and `custom`, which has no policy of its own."""
    policies = {path.stem for path in (conf_dir() / "cache").glob("*.yaml")} - {"none", "custom"}
    assert policies == set(FULL) == set(SKIPPING)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("policy", FULL)
def test_d32_nothing_skipped_is_bit_exact(pipe, policy, granularity):
    plain = uncached(pipe)
    cache = ditcache.enable_cache(pipe, policy, **knobs_for(policy, granularity))
    assert torch.equal(generate(pipe), plain)
    assert cache.trace.computed == len(cache.trace.decisions) > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("policy", FULL)
def test_d32_disabling_is_bit_exact(pipe, policy, granularity):
    plain = uncached(pipe)
    blocks, forward = pipe.transformer.blocks, pipe.transformer.forward
    ditcache.enable_cache(pipe, policy, head=1, **knobs_for(policy, granularity, SKIPPING))
    assert not torch.equal(generate(pipe), plain)
    ditcache.disable_cache(pipe)
    assert pipe.transformer.blocks is blocks
    assert pipe.transformer.forward == forward
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("policy", FULL)
def test_d32_warm_up_as_long_as_the_run_is_bit_exact(pipe, policy):
    plain = uncached(pipe)
    cache = ditcache.enable_cache(pipe, policy, head=6, **SKIPPING[policy])
    assert torch.equal(generate(pipe), plain)
    assert cache.trace.computed == len(cache.trace.decisions) == 12


@pytest.mark.filterwarnings("ignore:step cache. a signal is not finite")
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_d32_threshold_zero_never_reuses_even_on_identical_inputs(pipe, policy):
    """With identical inputs EasyCache's slope is 0 / 0, which also computes."""
    cache = ditcache.enable_cache(pipe, policy, head=1, **FULL[policy])
    by_hand(pipe, latents=lambda step: moving_latents(3))
    assert decisions(cache) == decisions(cache, "uncond") == "111111"


def test_d32_threshold_zero_of_a_policy_that_saw_no_change_at_all():
    from ditcache.cache.policies.fbcache import FBCache

    still = SimpleNamespace(
        state={"reference": torch.ones(1, 4, 8)}, probe_residual=torch.ones(1, 4, 8), signal=None
    )
    assert FBCache(threshold=0.0).should_compute(still)
    assert not FBCache(threshold=1e-6).should_compute(still)


def test_no_cache_attaches_nothing(pipe):
    blocks = pipe.transformer.blocks
    ditcache.enable_cache(pipe, "none")
    assert pipe.transformer.blocks is blocks


@pytest.mark.parametrize("policy", SKIPPING)
def test_guidance_1_works_and_counts_every_step_once(pipe, policy):
    plain = uncached(pipe, guidance=1.0)
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    video = generate(pipe, guidance=1.0)
    assert [(d.branch, d.step) for d in cache.trace.decisions] == [("cond", s) for s in range(6)]
    skipped = decisions(cache).count("0")
    assert cache.stats["units"]["transformer/cond/0"]["skipped"] == skipped
    assert list(cache.stats["units"]) == ["transformer/cond/0"]
    assert (skipped > 0) == (not torch.equal(video, plain))
    assert (skipped > 0) == (policy != "cfg_delta")


def test_skipping_changes_little_and_repeats_exactly(pipe):
    plain = generate(pipe, steps=12)
    cache = ditcache.enable_cache(pipe, "taylorseer")
    first = generate(pipe, steps=12)
    assert cache.trace.computed < len(cache.trace.decisions)
    assert torch.equal(generate(pipe, steps=12), first)
    assert 0 < (first - plain).norm() / plain.norm() < 0.3
