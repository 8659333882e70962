"""A cache touches one transformer and one run: other branches, runs, pipelines and names stay as they
are. Peers' defects by their number in the list the project works from (D4, D5, ...).
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from by_hand import by_hand, cached, decisions
from safetensors.torch import load_file
from test_exactness import SKIPPING, generate

import ditcache
from ditcache.cache.policies.base import Policy
from ditcache.errors import ConfigError, DitcacheError

AGREEING = ("easycache", "seacache")  # uncond follows cond's decision


def poison(cache, branch, *, signals):
    """Make what a branch keeps NaN: what stands in for residuals, and the policy's references too if
    `signals`.
    """
    for key, tensor in cache.store.entries.items():
        if key.branch == branch and (signals or key.slot.isdigit() or key.slot == "delta"):
            tensor.fill_(torch.nan)
    for (_, of, _), state in cache.run.generation.units.items():
        for value in state.values.values() if signals and of == branch else ():
            if isinstance(value, torch.Tensor):
                value.fill_(torch.nan)


def poisoned_run(pipe, cache, branch, *, signals):
    def before(step, name):
        if step > 0 and name == branch:
            poison(cache, branch, signals=signals)

    return by_hand(pipe, before=before)


@pytest.mark.parametrize(
    ("policy", "branch"),
    [
        (policy, branch)
        for policy in SKIPPING
        for branch in ("cond", "uncond")
        if (policy, branch) != ("cfg_delta", "cond")  # it reuses nothing there
    ],
)
def test_branches_never_mix(pipe, policy, branch):
    """Poison what one branch would reuse: it shows there and nowhere else."""
    other = "uncond" if branch == "cond" else "cond"
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    clean = by_hand(pipe)
    poisoned = poisoned_run(pipe, cache, branch, signals=False)
    assert all(torch.equal(a, b) for a, b in zip(clean[other], poisoned[other], strict=True))
    assert any(out.isnan().any() for out in poisoned[branch])
    assert not any(out.isnan().any() for out in clean[branch])


@pytest.mark.filterwarnings("ignore:step cache. a signal is not finite")
@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("policy", sorted(SKIPPING.keys() - {"cfg_delta"}))
def test_branches_decide_for_themselves(pipe, policy, branch):
    """Poison references and accumulators as well. Only where uncond follows cond's decision may a
    poisoned cond make it compute, and then it computes what an uncached run does.
    """
    other = "uncond" if branch == "cond" else "cond"
    plain = by_hand(pipe)
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    clean = by_hand(pipe)
    before = decisions(cache, other)
    poisoned = poisoned_run(pipe, cache, branch, signals=True)
    if policy in AGREEING and branch == "cond":
        assert decisions(cache, other) == decisions(cache, branch) == "111111" != before
        clean = plain
    assert all(torch.equal(a, b) for a, b in zip(clean[other], poisoned[other], strict=True))


def test_the_policies_whose_branches_agree(pipe):
    found = set()
    for policy, knobs in SKIPPING.items():
        with cached(pipe, policy, **knobs) as cache:
            if cache.settings.policy.branches_agree:
                found.add(policy)
    assert found == set(AGREEING)


@pytest.mark.parametrize("policy", SKIPPING)
def test_d4_a_run_never_sees_the_run_before(pipe, policy):
    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    alone = generate(pipe, seed=1)
    generate(pipe, seed=2, steps=6 if policy == "planned" else 9)  # plans are for one length
    assert torch.equal(generate(pipe, seed=1), alone)
    generate(pipe, seed=2, height=48)
    assert torch.equal(generate(pipe, seed=1), alone)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=5, callback_on_step_end=interrupt_at_3)
    assert torch.equal(generate(pipe, seed=1), alone)
    assert cache.store.stats()["bytes"] == 0


@pytest.mark.parametrize("policy", SKIPPING)
def test_d4_a_run_never_sees_one_that_failed_inside_a_block(pipe, policy):
    def fail(module, args):
        if cache.trace.decisions and cache.trace.decisions[-1].step == 4:
            raise RuntimeError("no memory")

    cache = ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    alone = generate(pipe, seed=1)
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        generate(pipe, seed=2)
    handle.remove()
    assert list(pipe.transformer.blocks) == list(pipe.transformer.blocks[:])  # blocks, not units
    assert torch.equal(generate(pipe, seed=1), alone)
    assert cache.store.stats()["bytes"] == 0


def test_d4_an_interrupt_inside_a_block_leaves_no_units_behind(pipe):
    """torch runs no forward hook after a KeyboardInterrupt."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    ditcache.enable_cache(pipe, "interval")
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe)
    handle.remove()
    assert list(pipe.transformer.blocks) == list(pipe.transformer.blocks[:])


FRESH = """
import sys
sys.path[:0] = {paths}
import torch
torch.set_num_threads({threads})
import ditcache
from safetensors.torch import save_file
from test_exactness import SKIPPING, generate
videos = {{}}
pipe = ditcache.load("tiny").pipe
for policy, knobs in SKIPPING.items():
    ditcache.enable_cache(pipe, policy, head=1, **knobs)
    videos[policy] = generate(pipe, "a red star", seed=8)
    ditcache.disable_cache(pipe)
save_file(videos, "{file}")
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Policy -> the video of another process, which has seen no other."""
    file = tmp_path_factory.mktemp("fresh") / "videos.safetensors"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path]
    script = FRESH.format(paths=paths, file=file, threads=torch.get_num_threads())
    quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads of two processes on few cores
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=quiet)
    return load_file(file)


@pytest.mark.parametrize("policy", SKIPPING)
def test_d4_the_second_video_equals_that_of_a_fresh_process(pipe, policy, alone):
    ditcache.enable_cache(pipe, policy, head=1, **SKIPPING[policy])
    generate(pipe, seed=7)
    assert torch.equal(generate(pipe, "a red star", seed=8), alone[policy])


def interrupt_at_3(pipe, index, timestep, tensors):
    if index == 3:
        raise KeyboardInterrupt
    return tensors


@pytest.mark.parametrize("policy", SKIPPING)
def test_d5_settings_that_do_not_fit_the_model_are_refused(pipe, policy):
    count = len(pipe.transformer.blocks)
    with pytest.raises(DitcacheError, match=f"1 to {count}, got 99"):
        ditcache.enable_cache(pipe, policy, **{**SKIPPING[policy], "granularity": 99})
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList


@pytest.mark.parametrize(
    ("policy", "knobs"),
    [
        ("dbcache", {"front": 8}),
        ("dbcache", {"front": 9}),
        ("dbcache", {"front": 4, "back": 4}),
        ("dbcache", {"front": 5, "back": 6}),
        ("dbcache", {"front": 1, "back": 7}),
        ("dicache", {"depth": 8}),
        ("dicache", {"depth": 20}),
    ],
)
def test_d5_more_blocks_that_always_run_than_the_model_has(pipe, policy, knobs):
    """Also as many: then nothing would be left to cache."""
    count = len(pipe.transformer.blocks)
    with pytest.raises(DitcacheError, match=f"always computes .* the model has {count} blocks"):
        ditcache.enable_cache(pipe, policy, **knobs)
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList


def test_d5_a_policy_of_ones_own_that_wants_every_block(pipe):
    class Greedy(Policy):
        probe = len(pipe.transformer.blocks)

    with pytest.raises(DitcacheError, match=f"{Greedy.probe} blocks"):
        ditcache.enable_cache(pipe, Greedy())


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


@pytest.mark.parametrize("policy", SKIPPING)
def test_d7_a_second_cache_is_refused_and_settings_stay(pipe, policy):
    with cached(pipe, policy, head=1, **SKIPPING[policy]) as cache:
        chosen = cache.settings.policy
    before, name = copy.deepcopy(chosen), type(chosen).__name__
    knobs = {"cfg": SKIPPING[policy]["cfg"]} if policy == "cfg_delta" else {}
    again = ditcache.enable_cache(pipe, chosen, head=1, **knobs)
    with pytest.raises(
        DitcacheError, match=rf"already has a cache \({name}\); call disable_cache first"
    ):
        ditcache.enable_cache(pipe, "fbcache")
    generate(pipe)
    assert chosen == before == again.settings.policy


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
