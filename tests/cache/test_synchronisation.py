"""Reading a number off a tensor waits for the device. Static policies never do; dynamic ones do it
once per decision.
"""

from itertools import pairwise

import pytest
import torch
from by_hand import by_hand, decisions, moving_latents
from test_exactness import DYNAMIC, SKIPPING, STATIC

import ditcache
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.forecasters.hermite import Hermite
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.forecasters.two_anchor import TwoAnchor
from ditcache.cache.policies.planned import Planned

READING = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "__contains__",
)


@pytest.fixture
def readings(monkeypatch):
    """A list that grows by a name at every reading of a tensor."""
    found = []

    def counting(name, method):
        def read(self, *args, **kwargs):
            found.append(name)
            return method(self, *args, **kwargs)

        return read

    for name in READING:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    return found


def readings_by_step(pipe, readings):
    """How many at each forward after those of the first step."""
    counts = []

    def before(step, branch):
        counts.append((step, len(readings)))

    by_hand(pipe, before=before, latents=LATENTS.__getitem__)
    counts.append((6, len(readings)))
    return [after - first for (step, first), (_, after) in pairwise(counts) if step > 0]


LATENTS = [moving_latents(step) for step in range(6)]


def test_the_counter_counts(readings):
    value = torch.ones(1)
    float(value), bool(value), int(value), value.item(), value.tolist()
    assert {"__float__", "__bool__", "__int__", "item", "tolist"} <= set(readings)


def test_the_transformer_alone_reads_nothing(pipe, readings):
    assert set(readings_by_step(pipe, readings)) == {0}


@pytest.mark.parametrize("policy", STATIC)
def test_static_policies_never_wait_for_the_device(pipe, readings, policy):
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    assert set(readings_by_step(pipe, readings)) == {0}
    assert "0" in decisions(cache, "uncond")


@pytest.mark.parametrize("granularity", ["per_block", "output"])
@pytest.mark.parametrize(
    "forecaster",
    [Taylor(2), Taylor(1, axis="log_snr"), Hermite(), TwoAnchor()],
    ids=["taylor", "log_snr", "hermite", "two_anchor"],
)
def test_forecasters_never_wait_for_the_device(pipe, readings, forecaster, granularity):
    cache = ditcache.enable_cache(
        pipe, "interval", forecaster, granularity, cfg=CfgDelta(every=4), every=2, head=2
    )
    assert set(readings_by_step(pipe, readings)) == {0}
    assert "0" in decisions(cache)


def test_a_plan_of_ones_own_never_waits_for_the_device(pipe, readings):
    plan = Planned(compute=3)
    plan.plan = {"mask": "#.#..#", "damping": [0.3, 0.5, 1.0], "sigmas": []}
    plan.fitted = lambda calibration: plan
    cache = ditcache.enable_cache(pipe, plan, "fitted", head=1)
    assert set(readings_by_step(pipe, readings)) == {0}
    assert decisions(cache) == "101001"


@pytest.mark.parametrize("policy", DYNAMIC)
def test_dynamic_policies_wait_once_per_decision(pipe, readings, policy):
    """Where uncond follows cond not even that, and no more for many units than for one."""
    cache = ditcache.enable_cache(
        pipe, policy, head=2, tail=1, **{**SKIPPING[policy], "granularity": "per_block"}
    )
    counts = readings_by_step(pipe, readings)
    asked = [d for d in cache.trace.decisions if d.unit == 0 and d.step > 0]
    assert len(counts) == len(asked)
    assert all(
        count == (decision.signal is not None)
        for count, decision in zip(counts, asked, strict=True)
    )
    assert sum(counts) > 0
