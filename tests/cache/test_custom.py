"""Policies of the user's own: registered, as an instance, per unit; and stores that lose things."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_exactness import SKIPPING, generate, uncached

import ditcache
from ditcache.cache.policies.base import REGISTERED, Policy
from ditcache.errors import ConfigError, DitcacheError
from ditcache.store.device import DeviceStore


@dataclass
class EveryOtherUnit(Policy):
    """Skips odd units on odd steps."""

    per_unit: ClassVar[bool] = True
    modulus: int = 2

    def should_compute(self, ctx):
        assert ctx.num_units > 1 and ctx.hidden.ndim == 3 and ctx.e0.shape[1] == 6
        assert ctx.encoder_hidden.shape[1] == 64
        return (ctx.step + ctx.unit_index) % self.modulus == 0


def test_a_registered_policy_takes_its_knobs(pipe):
    ditcache.register_policy("other")(EveryOtherUnit)
    try:
        cache = ditcache.enable_cache(pipe, "other", granularity="per_block", modulus=3, tail=0)
        generate(pipe, steps=6)
        skipped = {(d.step, d.unit) for d in cache.trace.decisions if not d.computed}
        assert skipped == {(s, u) for s in range(1, 6) for u in range(8) if (s + u) % 3}
        ditcache.disable_cache(pipe)
        with pytest.raises(ConfigError, match="modulos"):
            ditcache.enable_cache(pipe, "other", modulos=3)
    finally:
        del REGISTERED["other"]


def test_an_instance_works_and_refuses_knobs_it_cannot_take(pipe):
    with pytest.raises(ConfigError, match="EveryOtherUnit takes no 'modulus' here"):
        ditcache.enable_cache(pipe, EveryOtherUnit(), modulus=3)
    cache = ditcache.enable_cache(pipe, EveryOtherUnit(), granularity=4, tail=0)
    generate(pipe, steps=4)
    assert cache.trace.computed < len(cache.trace.decisions)


def test_only_policies_can_be_registered():
    with pytest.raises(ConfigError, match="does not derive"):
        ditcache.register_policy("nonsense")(dict)


def test_a_policy_that_decides_nothing_says_so(pipe):
    ditcache.enable_cache(pipe, Policy())
    with pytest.raises(TypeError, match="neither mask nor should_compute"):
        generate(pipe)


@dataclass
class LeakyStore(DeviceStore):
    """Answers None every third time."""

    def __post_init__(self):
        self.asked = 0

    def get(self, key):
        self.asked += 1
        return None if self.asked % 3 == 0 else super().get(key)


@pytest.mark.parametrize("granularity", ["stack", "per_block"])
def test_what_the_store_loses_is_computed(pipe, granularity):
    plain = generate(pipe, steps=10)
    cache = ditcache.enable_cache(pipe, "taylorseer", granularity=granularity, store=LeakyStore())
    close = generate(pipe, steps=10)
    assert any(d.reason == "missing" for d in cache.trace.decisions)
    assert (close - plain).norm() / plain.norm() < 0.3


@dataclass
class ForgetfulStore(DeviceStore):
    """Never has anything."""

    def get(self, key):
        return None


@pytest.mark.parametrize("policy", SKIPPING)
def test_a_store_that_loses_everything_is_bit_exact(pipe, policy):
    plain = uncached(pipe)
    store = ForgetfulStore()
    cache = ditcache.enable_cache(pipe, policy, store=store, head=1, **SKIPPING[policy])
    assert torch.equal(generate(pipe), plain)
    assert cache.trace.computed == len(cache.trace.decisions)


@pytest.mark.parametrize("policy", SKIPPING)
def test_a_store_that_loses_some_things_gives_a_video_all_the_same(pipe, policy):
    ditcache.enable_cache(pipe, policy, store=LeakyStore(), head=1, **SKIPPING[policy])
    assert generate(pipe).isfinite().all()


def test_a_pipeline_without_a_transformer_is_refused():
    with pytest.raises(DitcacheError, match="has no transformer"):
        ditcache.enable_cache(object(), "interval")


def test_one_transformer_alone_can_be_cached(bundle):
    cache = ditcache.enable_cache(bundle.pipe.transformer, "interval", every=2, tail=0, head=1)
    with torch.no_grad():
        for step in range(4):
            with bundle.pipe.transformer.cache_context(
                "cond", step_index=step, num_inference_steps=4
            ):
                bundle.pipe.transformer(
                    hidden_states=torch.randn(1, 16, 5, 8, 8),
                    timestep=torch.tensor([500]),
                    encoder_hidden_states=torch.randn(
                        1, 512, bundle.pipe.transformer.config.text_dim
                    ),
                )
    ditcache.disable_cache(bundle.pipe.transformer)
    assert [d.computed for d in cache.trace.decisions] == [True, False, True, False]
