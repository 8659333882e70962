"""Where nothing is skipped, nothing changes: every policy, every granularity, on an unmodified
diffusers pipeline.
"""

from types import SimpleNamespace

import pytest
import torch

import ditcache
from ditcache.cli import conf_dir

PROMPT = "a yellow circle moves down on a checkered green background"
FULL = {"interval": {"every": 1}, "taylorseer": {"every": 1}, "fbcache": {"threshold": 0.0}}
SKIPPING = {"interval": {"every": 2}, "taylorseer": {"every": 2}, "fbcache": {"threshold": 0.9}}
GRANULARITIES = ["stack", "per_block", 3]


def generate(pipe, prompt=PROMPT, *, seed=3, steps=6, guidance=4.0, height=64, width=64, **more):
    return pipe(
        prompt,
        height=height,
        width=width,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **more,
    ).frames


def test_every_policy_is_listed_here():
    policies = {path.stem for path in (conf_dir() / "cache").glob("*.yaml")} - {"none"}
    assert policies == set(FULL) == set(SKIPPING)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("policy", FULL)
def test_nothing_skipped_is_bit_exact(pipe, policy, granularity):
    plain = generate(pipe)
    cache = ditcache.enable_cache(pipe, policy, granularity=granularity, **FULL[policy])
    assert torch.equal(generate(pipe), plain)
    assert cache.trace.computed == len(cache.trace.decisions) > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("policy", FULL)
def test_disabling_is_bit_exact(pipe, policy, granularity):
    plain = generate(pipe)
    blocks, forward = pipe.transformer.blocks, pipe.transformer.forward
    ditcache.enable_cache(pipe, policy, granularity=granularity, head=1, **SKIPPING[policy])
    assert not torch.equal(generate(pipe), plain)
    ditcache.disable_cache(pipe)
    assert pipe.transformer.blocks is blocks
    assert pipe.transformer.forward == forward
    assert torch.equal(generate(pipe), plain)


def test_threshold_zero_never_reuses_even_on_identical_inputs(pipe):
    from ditcache.cache.policies.fbcache import FBCache

    still = SimpleNamespace(
        state={"reference": torch.ones(1, 4, 8)}, probe_residual=torch.ones(1, 4, 8), signal=None
    )
    assert FBCache(threshold=0.0).should_compute(still)
    assert not FBCache(threshold=1e-6).should_compute(still)


def test_warm_up_as_long_as_the_run_is_bit_exact(pipe):
    plain = generate(pipe)
    ditcache.enable_cache(pipe, "taylorseer", head=6)
    assert torch.equal(generate(pipe), plain)


def test_no_cache_attaches_nothing(pipe):
    blocks = pipe.transformer.blocks
    ditcache.enable_cache(pipe, "none")
    assert pipe.transformer.blocks is blocks


def test_skipping_changes_little_and_repeats_exactly(pipe):
    plain = generate(pipe, steps=12)
    cache = ditcache.enable_cache(pipe, "taylorseer")
    first = generate(pipe, steps=12)
    assert cache.trace.computed < len(cache.trace.decisions)
    assert torch.equal(generate(pipe, steps=12), first)
    assert 0 < (first - plain).norm() / plain.norm() < 0.3
