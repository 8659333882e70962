"""Together with what people combine a step cache with: compiled blocks, weights kept elsewhere,
half precision, several videos at once.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from by_hand import cached
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from test_exactness import FULL, SKIPPING, generate

import ditcache
from ditcache.errors import DitcacheError

POLICIES = {name: SKIPPING[name] for name in ("interval", "taylorseer", "fbcache", "dbcache")}
POLICIES["seacache"] = SKIPPING["seacache"]
POLICIES["dbcache"] = {**SKIPPING["dbcache"], "max_skips": 1}


@pytest.fixture
def own(bundle):
    """A pipeline with a transformer of its own, whatever a test does to it."""
    parts = {k: v for k, v in bundle.pipe.components.items() if k != "transformer_2"}
    pipe = type(bundle.pipe)(**{**parts, "transformer": copy.deepcopy(parts["transformer"])})
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch._dynamo.reset()


def skipped_shares(cache):
    return [d.computed for d in cache.trace.decisions]


# torch.compile


@pytest.mark.parametrize("granularity", ["stack", "per_block", 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_d28_blocks_compile_whole_and_once(own, policy, granularity):
    """Decisions stay outside: no graph break in a block, no recompilation from step to step."""
    from torch._dynamo.testing import CompileCounter

    with cached(own, policy, head=1, granularity=granularity, **POLICIES[policy]) as cache:
        eager = generate(own)
        decided = skipped_shares(cache)
    counter = CompileCounter()  # runs what it was given as it is
    own.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    plain = generate(own)
    frames = counter.frame_count
    assert 0 < frames <= len(own.transformer.blocks)
    with (
        cached(own, policy, head=1, granularity=granularity, **POLICIES[policy]) as cache,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for _ in range(2):
            assert torch.equal(generate(own), eager)
            assert skipped_shares(cache) == decided
    assert counter.frame_count == frames
    with cached(own, policy, **FULL[policy]):
        assert torch.equal(generate(own), plain)


@pytest.mark.parametrize("how", ["wrapped", "in place", "in place, later"])
def test_a_transformer_compiled_as_one_is_refused(own, how):
    """The decisions would be compiled along."""
    if how == "wrapped":
        own.transformer = torch.compile(own.transformer, backend="eager")
    elif how == "in place":
        own.transformer.compile(backend="eager")
    else:
        ditcache.enable_cache(own, "interval")
        own.transformer.compile(backend="eager")
    with pytest.raises(DitcacheError, match="compile_repeated_blocks"):
        if how == "in place, later":
            generate(own)
        else:
            ditcache.enable_cache(own, "interval")


# Weights kept elsewhere


@pytest.fixture
def onloads(monkeypatch):
    """Names of the modules whose weights were fetched, in order."""
    fetched = []

    def group(self, *args, original=ModuleGroup.onload_, **kwargs):
        fetched.extend(id(module) for module in self.modules)
        return original(self, *args, **kwargs)

    def aligned(self, module, *args, original=AlignDevicesHook.pre_forward, **kwargs):
        fetched.append(id(module))
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(ModuleGroup, "onload_", group)
    monkeypatch.setattr(AlignDevicesHook, "pre_forward", aligned)
    return fetched


def offload(transformer, kind):
    if kind == "accelerate":
        cpu_offload(transformer, execution_device=torch.device("cpu"))
        return
    apply_group_offloading(
        transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1,
    )


KINDS = ["block_level", "leaf_level", "accelerate"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["interval", "fbcache"])
@pytest.mark.parametrize("offload_first", [True, False])
def test_d29_a_skipped_unit_fetches_no_weights(own, onloads, policy, kind, offload_first):
    with cached(own, policy, head=1, **POLICIES[policy]) as cache:
        expected = generate(own)
    if offload_first:
        offload(own.transformer, kind)
    blocks = list(own.transformer.blocks)
    inside = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
    fetched_by_step = []
    cache = ditcache.enable_cache(own, policy, head=1, **POLICIES[policy])
    if not offload_first:
        offload(own.transformer, kind)

    def note(module, args, output):
        fetched_by_step.append({inside[name] for name in onloads if name in inside})
        onloads.clear()

    handle = own.transformer.register_forward_hook(note)
    assert torch.equal(generate(own), expected)
    handle.remove()
    decided = skipped_shares(cache)
    assert len(fetched_by_step) == len(decided) and not all(decided)
    always = {0} if policy == "fbcache" else set()
    for computed, fetched in zip(decided, fetched_by_step, strict=True):
        assert fetched == (set(range(len(blocks))) if computed else always)
    ditcache.disable_cache(own)
    if kind == "accelerate":
        remove_hook_from_submodules(own.transformer)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_compile_and_offload_and_cache(own, onloads, kind):
    with cached(own, "interval", every=2, head=1) as cache:
        expected = generate(own)
    own.transformer.compile_repeated_blocks(backend="eager")
    offload(own.transformer, kind)
    with cached(own, "interval", every=2, head=1) as cache:
        assert torch.equal(generate(own), expected)
    assert not all(skipped_shares(cache)) and onloads


# Precision, batches, several pipelines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision(own, policy, dtype):
    own.transformer.to(dtype)
    plain = generate(own)
    with cached(own, policy, **FULL[policy]):
        assert torch.equal(generate(own), plain)
    with cached(own, policy, head=1, **POLICIES[policy]) as cache:
        first = generate(own)
        assert torch.equal(generate(own), first) and first.isfinite().all()
    assert not all(skipped_shares(cache))
    assert (first - plain).norm() < plain.norm()


@pytest.mark.parametrize("policy", POLICIES)
def test_several_prompts_and_videos_per_prompt(own, policy):
    prompts = ["a red star moves left", "a blue circle moves up on a green background"]
    settings = {"generator": [torch.Generator().manual_seed(i) for i in range(4)]}

    def again():
        settings["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
        return own(
            prompts,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=6,
            guidance_scale=4.0,
            num_videos_per_prompt=2,
            output_type="latent",
            max_sequence_length=64,
            **settings,
        ).frames

    plain = again()
    assert len(plain) == 4
    with cached(own, policy, **FULL[policy]):
        assert torch.equal(again(), plain)
    with cached(own, policy, head=1, **POLICIES[policy]) as cache:
        batched = again()
    assert not all(skipped_shares(cache)) and (batched - plain).norm() < plain.norm()


# Several processes


def vote(rank, folder, restless):
    """One of two processes whose latents differ; writes down what was decided."""
    from by_hand import by_hand, moving_latents

    from ditcache.cache.forecasters.hold import Hold

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    pipe = ditcache.load("tiny").pipe
    still = moving_latents(0)

    def latents(step):
        return moving_latents(step) if rank in restless else still

    group = torch.distributed.group.WORLD
    cache = ditcache.enable_cache(
        pipe, "fbcache", Hold(), threshold=0.6, head=1, tail=0, group=group
    )
    by_hand(pipe, latents=latents)
    decided = "".join(str(int(d.computed)) for d in cache.trace.decisions)
    (folder / f"{len(restless)}-{rank}").write_text(decided)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("restless", [(), (1,)])
def test_d30_ranks_decide_as_one(tmp_path, restless):
    """If one of them computes, all do; nobody waits for the other."""
    torch.multiprocessing.spawn(vote, args=(tmp_path, restless), nprocs=2)
    first, second = sorted(tmp_path.glob(f"{len(restless)}-*"))
    assert first.read_text() == second.read_text()
    if restless:
        assert first.read_text().count("1") > 4
    else:
        assert "0" in first.read_text()
