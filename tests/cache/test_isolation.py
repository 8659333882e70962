"""A cache touches one transformer and one run: other branches, runs, pipelines and names stay as they
are. Peers' defects by their number in the list the project works from (D4, D5, ...).
"""

import copy

import pytest
import torch
from test_exactness import PROMPT, generate

import ditcache
from ditcache.cache.policies.base import Policy
from ditcache.errors import ConfigError, DitcacheError


def test_branches_never_mix(pipe):
    """Poison one branch's state with NaN: the other does not change."""
    cache = ditcache.enable_cache(pipe, "taylorseer", head=2, tail=1)
    clean = velocities(pipe, "cond")
    poisoned = velocities(pipe, "cond", poison="uncond", cache=cache)
    assert len(clean) == len(poisoned) == 8
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert any(v.isnan().any() for v in velocities(pipe, "uncond", poison="uncond", cache=cache))


def velocities(pipe, branch, poison=None, cache=None):
    """Outputs of one branch over eight steps on fixed latents, both branches being run."""
    torch.manual_seed(0)
    latents, outputs = torch.randn(1, 16, 5, 8, 8), []
    states = torch.randn(1, 512, pipe.transformer.config.text_dim)
    pipe.transformer._reset_stateful_cache()
    with torch.no_grad():
        for step in range(8):
            for name in ("cond", "uncond"):
                if poison == name and step > 0:
                    for key, tensor in cache.store.entries.items():
                        if key.branch == name:
                            tensor.fill_(torch.nan)
                with pipe.transformer.cache_context(name, step_index=step, num_inference_steps=8):
                    out = pipe.transformer(
                        hidden_states=latents,
                        timestep=torch.tensor([900 - 100 * step]),
                        encoder_hidden_states=states * (name == "cond"),
                        return_dict=False,
                    )[0]
                if name == branch:
                    outputs.append(out)
    return outputs


@pytest.mark.parametrize("policy", ["interval", "taylorseer", "fbcache"])
def test_d4_a_run_never_sees_the_run_before(pipe, policy):
    knobs = {"threshold": 0.2} if policy == "fbcache" else {}
    cache = ditcache.enable_cache(pipe, policy, **knobs)
    alone = generate(pipe, seed=1)
    generate(pipe, seed=2, steps=9)
    assert torch.equal(generate(pipe, seed=1), alone)
    generate(pipe, seed=2, height=48)
    assert torch.equal(generate(pipe, seed=1), alone)
    with pytest.raises(KeyboardInterrupt):
        pipe(
            PROMPT,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=6,
            guidance_scale=4.0,
            callback_on_step_end=interrupt_at_3,
            generator=torch.Generator().manual_seed(5),
        )
    assert torch.equal(generate(pipe, seed=1), alone)
    assert cache.store.stats()["bytes"] == 0


def interrupt_at_3(pipe, index, timestep, tensors):
    if index == 3:
        raise KeyboardInterrupt
    return tensors


@pytest.mark.parametrize("policy", ["interval", "fbcache"])
def test_d5_settings_that_do_not_fit_the_model_are_refused(pipe, policy):
    count = len(pipe.transformer.blocks)
    with pytest.raises(DitcacheError, match=f"1 to {count}, got 99"):
        ditcache.enable_cache(pipe, policy, granularity=99)

    class Greedy(Policy):
        probe = count

    with pytest.raises(DitcacheError, match=f"{count} blocks"):
        ditcache.enable_cache(pipe, Greedy())
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList


def test_d6_pipelines_of_one_class_are_independent(pipe, checkpoints):
    from diffusers import WanPipeline

    other = WanPipeline.from_pretrained(checkpoints["wan"])
    third = WanPipeline.from_pretrained(checkpoints["wan"])
    attributes = set(vars(type(pipe.transformer))), type(pipe.transformer).forward
    plain = generate(other)
    ditcache.enable_cache(pipe, "taylorseer")
    ditcache.enable_cache(other, "fbcache", threshold=0.5)
    cached = generate(other)
    ditcache.disable_cache(pipe)
    assert torch.equal(generate(other), cached)
    assert torch.equal(generate(third), plain)
    ditcache.disable_cache(other)
    assert torch.equal(generate(other), plain)
    assert (set(vars(type(pipe.transformer))), type(pipe.transformer).forward) == attributes


def test_d7_a_second_cache_is_refused_and_settings_stay(pipe):
    from ditcache.cache.policies.interval import Interval

    policy = Interval(every=3)
    before = copy.deepcopy(policy)
    ditcache.enable_cache(pipe, policy)
    with pytest.raises(
        DitcacheError, match=r"already has a cache \(Interval\); call disable_cache first"
    ):
        ditcache.enable_cache(pipe, "fbcache")
    generate(pipe)
    assert policy == before


def test_d8_unknown_knobs_name_the_valid_ones(pipe):
    with pytest.raises(
        ConfigError, match=r"fbcache takes no 'treshold' here. Did you mean 'threshold'\?"
    ):
        ditcache.enable_cache(pipe, "fbcache", treshold=0.1)
    with pytest.raises(ConfigError, match=r"no policy 'taylorsee'. Did you mean 'taylorseer'\?"):
        ditcache.enable_cache(pipe, "taylorsee")
    with pytest.raises(ConfigError, match="every"):
        ditcache.enable_cache(pipe, "interval", every="often")


def test_d20_without_a_context_it_says_so(pipe):
    ditcache.enable_cache(pipe, "interval")
    with pytest.raises(DitcacheError, match="cache_context"):
        pipe.transformer(
            hidden_states=torch.randn(1, 16, 5, 8, 8),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 512, pipe.transformer.config.text_dim),
        )


def test_d22_kept_tensors_are_not_the_live_ones(pipe):
    """A block that works in place would otherwise change what is kept."""
    cache = ditcache.enable_cache(pipe, "fbcache", threshold=0.5)
    shared, live = [], {}

    def look(module, args, out):
        live.update({args[0].untyped_storage().data_ptr(): args[0]})
        live.update({out.untyped_storage().data_ptr(): out})  # kept alive until the forward ends
        if module is pipe.transformer.blocks[-1]:
            kept = {t.untyped_storage().data_ptr() for t in cache.store.entries.values()}
            shared.append(kept & set(live))
            live.clear()

    handles = [block.register_forward_hook(look) for block in pipe.transformer.blocks]
    generate(pipe, steps=4)
    for handle in handles:
        handle.remove()
    assert shared and not any(shared)


def test_names_and_state_dict_stay(pipe):
    names = [name for name, _ in pipe.transformer.named_modules()]
    keys = list(pipe.transformer.state_dict())
    ditcache.enable_cache(pipe, "taylorseer", granularity=3)
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert list(pipe.transformer.state_dict()) == keys
    assert len(pipe.transformer.blocks) == len(pipe.transformer.blocks[:])
    assert pipe.transformer.blocks[0] is next(iter(pipe.transformer.blocks))


def test_lora_loads_and_acts_while_a_cache_is_attached(pipe):
    width = pipe.transformer.blocks[0].attn1.to_q.weight.shape[0]
    torch.manual_seed(0)
    lora = {
        f"transformer.blocks.{block}.attn1.to_q.lora_{side}.weight": 0.3 * torch.randn(shape)
        for block in range(len(pipe.transformer.blocks))
        for side, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    plain = generate(pipe)
    ditcache.enable_cache(pipe, "interval", every=1, granularity=3)
    pipe.load_lora_weights(lora)
    attached = generate(pipe)
    ditcache.disable_cache(pipe)
    alone = generate(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(attached, alone)
    assert not torch.equal(attached, plain)
    assert torch.equal(generate(pipe), plain)


def test_nothing_is_attached_to_a_model_nobody_described():
    with pytest.raises(DitcacheError, match="not a model ditcache knows"):
        ditcache.enable_cache(torch.nn.Linear(2, 2), "interval")
