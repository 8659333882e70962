"""CFG-delta: on some steps uncond is cond plus the difference seen when both last ran."""

import pytest
import torch
from by_hand import by_hand, decisions, moving_latents
from test_exactness import generate, uncached

import ditcache
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.policies.base import Policy
from ditcache.errors import ConfigError


class Mask(Policy):
    """Given digits, one per step."""

    def __init__(self, digits):
        self.digits = digits

    def mask(self, schedule):
        return [digit == "1" for digit in self.digits]


def reasons(cache, branch):
    return [d.reason for d in cache.trace.decisions if d.branch == branch]


@pytest.mark.parametrize(
    ("every", "head", "tail", "expected"),
    [
        (1, 1, 1, "1111111111"),
        (2, 1, 1, "1010101011"),
        (3, 2, 1, "1100100101"),
        (4, 1, 0, "1000100010"),
        (99, 1, 1, "1000000001"),
        (99, 4, 3, "1111000111"),
        (99, 0, 0, "1000000000"),
    ],
)
def test_uncond_is_left_out_on_the_right_steps(pipe, every, head, tail, expected):
    cache = ditcache.enable_cache(
        pipe, "cfg_delta", cfg=CfgDelta(every=every), head=head, tail=tail
    )
    by_hand(pipe, steps=10)
    assert decisions(cache, "uncond") == expected
    assert decisions(cache, "cond") == "1" * 10
    assert [r == "cfg" for r in reasons(cache, "uncond")] == [d == "0" for d in expected]


def test_uncond_is_cond_plus_the_kept_difference_exactly(pipe):
    plain = by_hand(pipe)
    ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=3), head=1, tail=1)
    outputs = by_hand(pipe)
    cond, uncond = outputs["cond"], outputs["uncond"]
    assert all(torch.equal(a, b) for a, b in zip(cond, plain["cond"], strict=True))
    for step, source in enumerate([0, 0, 0, 3, 3, 5]):
        if step == source:
            assert torch.equal(uncond[step], plain["uncond"][step])
        else:
            assert torch.equal(uncond[step], cond[step] + (uncond[source] - cond[source]))
            assert not torch.equal(uncond[step], plain["uncond"][step])


def test_the_guided_output_is_cond_less_the_difference(pipe):
    """cond - (guidance - 1) * difference, as the pipeline would have it."""
    ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=2), head=1)
    outputs = by_hand(pipe)
    cond, uncond = outputs["cond"], outputs["uncond"]
    guided = uncond[1] + 4.0 * (cond[1] - uncond[1])
    assert torch.allclose(guided, cond[1] - 3.0 * (uncond[0] - cond[0]), atol=1e-5)


@pytest.mark.parametrize("policy", ["cfg_delta", "fbcache", "easycache"])
def test_no_block_runs_where_uncond_is_left_out(pipe, policy):
    """Not even those that always run, since nobody looks at what they give."""
    ran = []
    cache = ditcache.enable_cache(pipe, policy, cfg=CfgDelta(every=2), head=1)
    handles = [
        block.register_forward_hook(lambda *_: ran.append(pipe.transformer.blocks.driver.call))
        for block in pipe.transformer.blocks[:]
    ]
    by_hand(pipe)
    for handle in handles:
        handle.remove()
    counts = {(step, b): 0 for step in range(6) for b in ("cond", "uncond")}
    for call in ran:
        counts[call.step, call.branch] += 1
    left_out = [d.step for d in cache.trace.decisions if d.reason == "cfg"]
    assert left_out == [1, 3]
    assert [counts[step, "uncond"] for step in left_out] == [0, 0]
    assert cache.trace.blocks == 12 * len(pipe.transformer.blocks)
    assert cache.trace.blocks_computed == sum(counts.values())


def test_it_stands_beside_taylorseer(pipe):
    """Each acts where the other does not, and cond does not notice."""
    ditcache.enable_cache(pipe, "taylorseer", every=3, head=2)
    alone = by_hand(pipe, steps=10)
    ditcache.disable_cache(pipe)
    cache = ditcache.enable_cache(pipe, "taylorseer", cfg="delta", every=3, head=2)
    together = by_hand(pipe, steps=10)
    assert decisions(cache) == "1100100101"
    assert reasons(cache, "uncond")[:2] == ["first", "head"]
    assert [step for step, r in enumerate(reasons(cache, "uncond")) if r == "cfg"] == [2, 4, 6, 8]
    assert all(torch.equal(a, b) for a, b in zip(alone["cond"], together["cond"], strict=True))
    assert all(out.isfinite().all() for out in together["uncond"])


@pytest.mark.parametrize("forecaster", ["hold", "taylor"])
def test_uncond_reuses_its_newest_residual_beside_cfg_delta(pipe, forecaster):
    """What a branch left out did not compute cannot take the place of what it did: at step 4 the
    residual of step 2 must stand in, not that of step 0.
    """
    digits = "101101"
    knobs = {"granularity": "output", "head": 1, "tail": 1}
    cache = ditcache.enable_cache(pipe, Mask(digits), forecaster, cfg=CfgDelta(every=2), **knobs)
    uncond = by_hand(pipe)["uncond"]
    assert reasons(cache, "uncond") == ["first", "cfg", "policy", "cfg", "policy", "tail"]
    assert decisions(cache, "uncond") == "101001"
    latents = [moving_latents(step) for step in range(6)]
    residual = [out - seen for out, seen in zip(uncond, latents, strict=True)]
    expected = residual[2]
    if forecaster == "taylor":
        expected = residual[2] + (residual[2] - residual[0])
    assert torch.allclose(uncond[4], latents[4] + expected, atol=1e-4)


def test_guidance_1_leaves_it_without_effect(pipe):
    plain = uncached(pipe, guidance=1.0)
    cache = ditcache.enable_cache(pipe, "cfg_delta", head=1)
    assert torch.equal(generate(pipe, guidance=1.0), plain)
    assert decisions(cache) == "111111" and decisions(cache, "uncond") == ""
    assert cache.store.stats()["bytes_peak"] == 0


def test_a_pipeline_that_runs_uncond_first_skips_nothing(pipe):
    plain = by_hand(pipe)
    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=3), head=1)
    outputs = by_hand(pipe, branches=("uncond", "cond"))
    assert decisions(cache) == decisions(cache, "uncond") == "111111"
    assert all(torch.equal(a, b) for a, b in zip(outputs["uncond"], plain["uncond"], strict=True))


def test_one_tensor_of_the_latents_size_is_kept(pipe):
    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=3), head=1)
    by_hand(pipe)
    assert cache.store.stats()["bytes_peak"] == moving_latents(0).nbytes
    assert cache.store.stats()["bytes"] == 0


def test_nothing_is_kept_after_a_run_whose_last_uncond_was_left_out(pipe):
    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=99), head=1, tail=0)
    generate(pipe)
    assert cache.run.generation is None
    assert cache.store.stats()["bytes"] == 0


def test_d13_a_changed_shape_runs_both_branches(pipe):
    def dropping(step):
        return moving_latents(step) if step < 3 else moving_latents(step)[:, :, ::4]

    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=99), head=1, tail=0)
    outputs = by_hand(pipe, latents=dropping)
    assert decisions(cache, "uncond") == "100100"
    difference = outputs["uncond"][3] - outputs["cond"][3]
    assert torch.equal(outputs["uncond"][5], outputs["cond"][5] + difference)


def test_a_gap_runs_both_branches(pipe):
    """A step that does not follow the last one forces a compute, whatever the setting."""
    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=99), head=1, tail=0)
    by_hand(pipe, steps=9, which=[0, 1, 5, 6])
    assert decisions(cache, "uncond") == "1010"


def test_a_new_video_begins_without_the_difference_of_the_last(pipe):
    cache = ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=99), head=0, tail=0)
    generate(pipe)
    generate(pipe, seed=4)
    assert decisions(cache, "uncond") == "100000"


@pytest.mark.parametrize("return_dict", [True, False])
def test_it_answers_in_the_form_the_caller_asked_for(pipe, return_dict):
    ditcache.enable_cache(pipe, "cfg_delta", cfg=CfgDelta(every=3), head=1)
    outputs = by_hand(pipe, return_dict=return_dict)
    if return_dict:
        kinds = {type(out).__name__ for branch in outputs.values() for out in branch}
        assert kinds == {"Transformer2DModelOutput"}
        outputs = {name: [out.sample for out in branch] for name, branch in outputs.items()}
    cond, uncond = outputs["cond"], outputs["uncond"]
    assert torch.equal(uncond[1], cond[1] + (uncond[0] - cond[0]))


def test_a_negative_or_zero_distance_is_refused():
    with pytest.raises(ValueError, match="every: must be >= 1, got 0"):
        CfgDelta(every=0)


def test_an_option_nobody_knows(pipe):
    with pytest.raises(ConfigError, match=r"cache/cfg: no option 'dleta'. Did you mean 'delta'\?"):
        ditcache.enable_cache(pipe, "interval", cfg="dleta")
    with pytest.raises(ConfigError, match="none takes no cfg"):
        ditcache.enable_cache(pipe, "none", cfg="delta")


def test_every_is_cfg_deltas(pipe):
    """`cfg_delta` brings it along, and its policy has no key of that name."""
    cache = ditcache.enable_cache(pipe, "cfg_delta", every=5)
    assert cache.settings.cfg == CfgDelta(every=5)
    ditcache.disable_cache(pipe)
    cache = ditcache.enable_cache(pipe, "interval", every=5, cfg="delta")
    assert cache.settings.policy.every == 5 and cache.settings.cfg == CfgDelta()
