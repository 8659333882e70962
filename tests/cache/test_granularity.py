"""What is cached as one thing: the transformer's whole output, and the blocks that always run in
front of a unit and behind it.
"""

import pytest
import torch
from by_hand import by_hand, cached, decisions, moving_latents
from random_checkpoints import small_transformer
from test_exactness import SKIPPING, knobs_for

import ditcache
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.errors import DitcacheError

LATENTS = moving_latents(0).nbytes  # fp32
EVERY_2 = {"every": 2, "head": 1, "tail": 0}


def blocks_run(pipe, cache, **how):
    """(step, branch) -> indices of the blocks that ran."""
    ran: dict = {}

    def note(index):
        def hook(*_):
            call = pipe.transformer.blocks.driver.call
            ran.setdefault((call.step, call.branch), []).append(index)

        return hook

    blocks = pipe.transformer.blocks[:]
    handles = [block.register_forward_hook(note(i)) for i, block in enumerate(blocks)]
    by_hand(pipe, **how)
    for handle in handles:
        handle.remove()
    return ran


# output


def test_easycache_keeps_five_tensors_of_the_latents_size(pipe):
    """A residual per branch; of cond also the last input, output and the input before."""
    cache = ditcache.enable_cache(pipe, "easycache", head=2, threshold=0.4)
    by_hand(pipe)
    assert "0" in decisions(cache) and "0" in decisions(cache, "uncond")
    assert cache.store.stats()["bytes_peak"] == 5 * LATENTS


@pytest.mark.parametrize(("forecaster", "tensors"), [(Hold(), 1), (Taylor(1), 2), (Taylor(2), 3)])
def test_d18_output_granularity_keeps_tensors_of_the_latents_size(pipe, forecaster, tensors):
    cache = ditcache.enable_cache(pipe, "interval", forecaster, "output", every=2, head=3)
    by_hand(pipe, steps=9)
    assert cache.store.stats()["bytes_peak"] == 2 * tensors * LATENTS
    assert cache.store.stats()["bytes"] == 0


def test_a_held_output_is_the_input_plus_the_last_difference_exactly(pipe):
    plain = by_hand(pipe)
    ditcache.enable_cache(pipe, "interval", granularity="output", **EVERY_2)
    outputs = by_hand(pipe)
    for branch in ("cond", "uncond"):
        for step in (0, 2, 4):
            kept = plain[branch][step] - moving_latents(step)
            assert torch.equal(outputs[branch][step], plain[branch][step])
            assert torch.equal(outputs[branch][step + 1], moving_latents(step + 1) + kept)


def test_taylorseer_on_outputs_follows_the_line_through_two_of_them(pipe):
    plain = by_hand(pipe)["cond"]
    knobs = {"every": 2, "head": 1, "tail": 0}
    ditcache.enable_cache(pipe, "taylorseer", granularity="output", **knobs)
    outputs = by_hand(pipe)["cond"]
    kept = [plain[step] - moving_latents(step) for step in range(6)]
    assert torch.equal(outputs[1], moving_latents(1) + kept[0])
    expected = moving_latents(3) + kept[2] + (kept[2] - kept[0]) / 2
    assert torch.allclose(outputs[3], expected, atol=1e-4)


@pytest.mark.parametrize("policy", sorted(SKIPPING.keys() - {"cfg_delta"}))
def test_no_cached_block_runs_where_the_output_is_forecast(pipe, policy):
    """Those a policy looks at do, and norm and head behind the blocks, whose result is not used."""
    cache = ditcache.enable_cache(pipe, policy, head=1, **knobs_for(policy, "output", SKIPPING))
    ran = blocks_run(pipe, cache)
    probe = list(range(cache.settings.policy.probe))
    for branch in ("cond", "uncond"):
        for step, digit in enumerate(decisions(cache, branch)):
            assert ran.get((step, branch), []) == (list(range(8)) if digit == "1" else probe)
        assert "0" in decisions(cache, branch)


@pytest.mark.parametrize("policy", ["interval", "taylorseer", "easycache"])
def test_the_caller_gets_the_form_it_asked_for(pipe, policy):
    ditcache.enable_cache(pipe, policy, head=1, **knobs_for(policy, "output", SKIPPING))
    in_tuples = by_hand(pipe)["cond"]
    in_classes = by_hand(pipe, return_dict=True)["cond"]
    assert {type(out).__name__ for out in in_classes} == {"Transformer2DModelOutput"}
    for a, b in zip(in_tuples, in_classes, strict=True):
        assert torch.equal(a, b.sample) and torch.equal(a, b[0])


@pytest.mark.parametrize("channels", [16, 36])
def test_half_precision_and_conditioning_channels(channels):
    """The residual is kept in fp32 and belongs to the noisy channels; the answer has the model's
    dtype.
    """
    transformer = small_transformer(in_channels=channels).to(torch.bfloat16).eval()
    cache = ditcache.enable_cache(transformer, "interval", granularity="output", **EVERY_2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, channels, 2, 4, 4, generator=generator).bfloat16()
    text = torch.randn(1, 8, transformer.config.text_dim, generator=generator).bfloat16()
    outputs, kept = [], []
    with torch.no_grad():
        for step in range(2):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=3):
                outputs.append(
                    transformer(
                        hidden_states=latents[step],
                        timestep=torch.tensor([900 - 300 * step]),
                        encoder_hidden_states=text,
                        return_dict=False,
                    )[0]
                )
            kept += [t.dtype for t in cache.store.entries.values()]
    difference = outputs[0].float() - latents[0][:, :16].float()
    assert decisions(cache) == "10" and set(kept) == {torch.float32}
    assert outputs[1].dtype == torch.bfloat16 and outputs[1].shape == outputs[0].shape
    assert torch.equal(outputs[1], (latents[1][:, :16].float() + difference).bfloat16())


def test_blocks_behind_an_output_make_no_sense(pipe):
    with pytest.raises(DitcacheError, match="output replaces what the blocks at the back compute"):
        ditcache.enable_cache(pipe, "dbcache", granularity="output", back=1)


@pytest.mark.parametrize("granularity", ["outputs", 0, -1, "whole"])
def test_a_granularity_nobody_knows(pipe, granularity):
    message = "granularity: must be 'stack', 'per_block', 'output' or a group size"
    with pytest.raises(ditcache.errors.ConfigError, match=message):
        ditcache.enable_cache(pipe, "interval", granularity=granularity)


# Blocks that always run


@pytest.mark.parametrize(("front", "back"), [(1, 0), (1, 1), (2, 3), (1, 6), (7, 0)])
@pytest.mark.parametrize("granularity", ["stack", "per_block", 2])
def test_blocks_at_both_ends_always_run(pipe, front, back, granularity):
    knobs = {"threshold": 9.0, "max_skips": 9, "head": 1, "tail": 0}
    cache = ditcache.enable_cache(
        pipe, "dbcache", front=front, back=back, granularity=granularity, **knobs
    )
    ran = blocks_run(pipe, cache)
    ends = [*range(front), *range(8 - back, 8)]
    assert [ran[step, "cond"] for step in range(6)] == [list(range(8))] + [ends] * 5
    assert cache.trace.blocks == 6 * 2 * 8
    assert cache.trace.blocks_computed == sum(len(indices) for indices in ran.values())


def test_blocks_at_the_back_work_on_the_forecast(pipe):
    """What enters them is the front's output plus the residual kept of the middle."""
    seen: dict = {"front": [], "middle": []}
    blocks = pipe.transformer.blocks[:]
    handles = [
        blocks[1].register_forward_hook(lambda m, a, out: seen["front"].append(out)),
        blocks[5].register_forward_pre_hook(lambda m, a: seen["middle"].append(a[0])),
    ]
    knobs = {"threshold": 9.0, "head": 1, "tail": 0, "front": 2, "back": 3}
    ditcache.enable_cache(pipe, "dbcache", **knobs)
    by_hand(pipe, branches=("cond",), which=[0, 1, 2])
    for handle in handles:
        handle.remove()
    kept = seen["middle"][0] - seen["front"][0]
    for step in (1, 2):
        assert torch.equal(seen["middle"][step], seen["front"][step] + kept)
    assert not torch.equal(seen["front"][1], seen["front"][0])


def test_dbcache_with_one_block_in_front_is_fbcache(pipe):
    knobs = {"threshold": 0.5, "head": 1, "max_skips": None}
    with cached(pipe, "fbcache", **knobs) as cache:
        expected, made = by_hand(pipe), decisions(cache)
    with cached(pipe, "dbcache", front=1, back=0, **knobs) as cache:
        found = by_hand(pipe)
        assert decisions(cache) == made and "0" in made
    assert all(torch.equal(a, b) for a, b in zip(expected["cond"], found["cond"], strict=True))


@pytest.mark.parametrize("back", [0, 2])
def test_d18_bytes_of_dbcache_are_a_reference_and_a_residual(pipe, back):
    knobs = {"threshold": 9.0, "head": 1, "back": back}
    cache = ditcache.enable_cache(pipe, "dbcache", **knobs)
    by_hand(pipe)
    config = pipe.transformer.config
    tokens = 80 * config.num_attention_heads * config.attention_head_dim * 4
    assert cache.store.stats()["bytes_peak"] == 2 * 2 * tokens


def test_cfg_delta_beside_blocks_at_both_ends(pipe):
    knobs = {"threshold": 9.0, "head": 1, "tail": 0, "front": 2, "back": 1}
    cache = ditcache.enable_cache(pipe, "dbcache", cfg=CfgDelta(every=2), **knobs)
    ran = blocks_run(pipe, cache)
    assert [(step, "uncond") in ran for step in range(6)] == [True, False] * 3
