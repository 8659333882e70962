"""A cache touches one transformer and one run: other branches, runs, pipelines and names stay as they
are. Peers' defects by their number in the list the project works from (D4, D5, ...).
"""

import copy

import pytest
import torch
from test_exactness import PROMPT, SKIPPING, generate

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


@pytest.mark.parametrize("policy", SKIPPING)
def test_d4_a_run_never_sees_the_run_before(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
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


@pytest.mark.parametrize("policy", SKIPPING)
def test_d22_kept_tensors_are_not_the_live_ones(pipe, policy):
    """A block that works in place would otherwise change what is kept."""
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    live, compared = {}, []

    def keep_alive(module, args, out):
        for tensor in (args[0], out):
            live[tensor.untyped_storage().data_ptr()] = tensor

    def compare(pipe, index, timestep, tensors):
        kept = {t.untyped_storage().data_ptr() for t in cache.store.entries.values()}
        compared.append((len(kept), len(kept & set(live))))
        live.clear()
        return tensors

    handles = [block.register_forward_hook(keep_alive) for block in pipe.transformer.blocks]
    generate(pipe, callback_on_step_end=compare)
    for handle in handles:
        handle.remove()
    assert max(count for count, _ in compared) > 0
    assert all(shared == 0 for _, shared in compared)


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


def test_a_hook_that_removes_itself_does_not_take_the_cache_along(pipe):
    """diffusers' group offload registers a hook for the first forward only."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Once(ModelHook):
        def post_forward(self, module, output):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("once", recurse=False)
            return output

    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Once(), "once")
    cache = ditcache.enable_cache(pipe, "interval", every=2, head=1, tail=0)
    generate(pipe)
    assert [d.computed for d in cache.trace.decisions if d.branch == "cond"] == [True, False] * 3


@pytest.mark.parametrize("offload_first", [True, False])
def test_offload_hooks_and_the_cache_leave_each_other_alone(pipe, offload_first):
    """accelerate wraps `forward` and restores it after every run; order must not matter."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        forwards = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.forwards += 1
            return args, kwargs

    plain = generate(pipe)
    if offload_first:
        add_hook_to_module(pipe.transformer, Counting())
    cache = ditcache.enable_cache(pipe, "interval", every=2, head=1)
    if not offload_first:
        add_hook_to_module(pipe.transformer, Counting())
    first = generate(pipe)
    assert Counting.forwards == 12 and cache.trace.computed < len(cache.trace.decisions)
    remove_hook_from_module(pipe.transformer)
    add_hook_to_module(pipe.transformer, Counting())
    assert torch.equal(generate(pipe), first)
    assert cache.trace.computed < len(cache.trace.decisions)
    ditcache.disable_cache(pipe)
    assert torch.equal(generate(pipe), plain)
    assert Counting.forwards == 36
    remove_hook_from_module(pipe.transformer)


def test_two_caches_may_share_a_store(pipe, checkpoints):
    """Both name their expert `transformer`; keys must still differ."""
    from diffusers import WanPipeline

    from ditcache.store.device import DeviceStore

    other = WanPipeline.from_pretrained(checkpoints["wan"])
    other.transformer = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.01)
    alone = [lockstep([part]) for part in (pipe, other)]
    store = DeviceStore()
    caches = [
        ditcache.enable_cache(part, "interval", every=2, head=1, store=store)
        for part in (pipe, other)
    ]
    assert caches[0].store is caches[1].store
    together = lockstep([pipe, other])
    separate = []
    for part in (pipe, other):
        ditcache.disable_cache(part)
        ditcache.enable_cache(part, "interval", every=2, head=1)
        separate.append(lockstep([part])[0])
        ditcache.disable_cache(part)
    for a, b, plain in zip(together, separate, alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(a, plain[0], strict=True))


def lockstep(pipes, steps=6):
    """Outputs per pipeline of a run in which they take turns at every step."""
    torch.manual_seed(0)
    states = torch.randn(1, 512, 64)
    outputs = [[] for _ in pipes]
    with torch.no_grad():
        for step in range(steps):
            latents = torch.full((1, 16, 5, 8, 8), 1.0 + 0.1 * step)
            for pipe, seen in zip(pipes, outputs, strict=True):
                with pipe.transformer.cache_context(
                    "cond", step_index=step, num_inference_steps=steps
                ):
                    seen.append(
                        pipe.transformer(
                            hidden_states=latents, timestep=torch.tensor([900 - 100 * step]),
                            encoder_hidden_states=states, return_dict=False,
                        )[0]
                    )  # fmt: skip
    return outputs


def test_diffusers_own_cache_is_not_stacked_upon(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(DitcacheError, match="one of diffusers' own caches"):
        ditcache.enable_cache(pipe, "interval")
    pipe.transformer.disable_cache()


def test_gradient_checkpointing_is_refused(pipe):
    ditcache.enable_cache(pipe, "interval")
    pipe.transformer.enable_gradient_checkpointing()
    with (
        pytest.raises(DitcacheError, match="gradient checkpointing"),
        pipe.transformer.cache_context("cond", step_index=0, num_inference_steps=4),
    ):
        pipe.transformer(
            hidden_states=torch.randn(1, 16, 5, 8, 8), timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 512, pipe.transformer.config.text_dim),
        )  # fmt: skip
    pipe.transformer.disable_gradient_checkpointing()


def test_settings_without_a_policy_are_refused(pipe):
    with pytest.raises(ConfigError, match="none takes no forecaster"):
        ditcache.enable_cache(pipe, "none", forecaster="taylor")
    with pytest.raises(ConfigError, match="none takes no 'head'"):
        ditcache.enable_cache(pipe, "none", head=3)


def test_registered_names_do_not_hide_ours():
    with pytest.raises(ConfigError, match="already has this name"):
        ditcache.register_policy("interval")(Policy)


def test_two_loads_are_two_pipelines():
    a, b = ditcache.load("tiny"), ditcache.load("tiny")
    assert a.pipe is not b.pipe
