"""A transformer on a rolling cache: the contracts of the cache proposed to diffusers, and taken off
bit for bit.
"""

import pytest
import torch
from random_checkpoints import small_transformer

from ditcache.errors import DitcacheError
from ditcache.kv.attach import kv_attention
from ditcache.kv.rolling import RollingKVCache
from ditcache.kv.storage import KVCacheError

CLASSES = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
TOKENS = 4  # of a chunk of one latent frame of 4x4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_transformer().eval().requires_grad_(False)


def latents(frames: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def forward(model, seed=0, frames=1, timestep=500.0):
    text = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(7))
    return model(latents(frames, seed), torch.tensor([timestep]), text, return_dict=False)[0]


def held(cache):
    """Keys and values of all blocks."""
    return [(block.cached_key, block.cached_value) for block in cache.block_caches]


def assert_equal(held_then, held_now, then=slice(None), now=slice(None)):
    for before, after in zip(held_then, held_now, strict=True):
        for kind in range(2):
            assert torch.equal(before[kind][:, then], after[kind][:, now])


def length(cache):
    return {x.shape[1] for block in held(cache) for x in block}


@torch.no_grad()
def test_contract_1_append_without_bound(model):
    cache, before = RollingKVCache(3), None
    with kv_attention(model, cache):
        for index in range(4):
            forward(model, index)
            assert length(cache) == {(index + 1) * TOKENS}
            if before is not None:
                assert_equal(before, held(cache), now=slice(0, index * TOKENS))
            before = held(cache)


@torch.no_grad()
def test_contract_2_a_window_of_one_chunk(model):
    cache, alone = RollingKVCache(3, TOKENS), RollingKVCache(3)
    with kv_attention(model, cache) as kv:
        for index in range(4):
            kv.cache = cache
            forward(model, index)
            assert length(cache) == {TOKENS}
            kv.cache, kv.frame_offset = alone, index  # nothing of the chunk before is left
            alone.reset()
            forward(model, index)
            assert_equal(held(alone), held(cache))
            kv.frame_offset = None


@torch.no_grad()
def test_contract_3_a_window_of_three_chunks(model):
    cache = RollingKVCache(3, 3 * TOKENS)
    with kv_attention(model, cache):
        for index in range(5):
            before = held(cache) if index else None
            forward(model, index)
            assert length(cache) == {min(index + 1, 3) * TOKENS}
            if index > 2:
                assert_equal(before, held(cache), slice(TOKENS, None), slice(0, 2 * TOKENS))
                now = held(cache)
                assert all(
                    not torch.equal(b[0][:, -TOKENS:], n[0][:, -TOKENS:])
                    for b, n in zip(before, now, strict=True)
                )


@torch.no_grad()
def test_contract_4_overwrite(model):
    cache = RollingKVCache(3)
    with kv_attention(model, cache):
        forward(model, 0)
        first = held(cache)
        cache.enable_overwrite_mode()
        forward(model, 1)
        second = held(cache)
        assert length(cache) == {TOKENS}
        assert all(
            not torch.equal(a[i], b[i]) for a, b in zip(first, second, strict=True) for i in (0, 1)
        )
        cache.enable_append_mode()
        forward(model, 2)
        appended = held(cache)
        cache.enable_overwrite_mode()
        forward(model, 3)
        assert length(cache) == {2 * TOKENS}
        assert_equal(second, held(cache), now=slice(0, TOKENS))
        for before, after in zip(appended, held(cache), strict=True):
            for kind in (0, 1):
                assert not torch.equal(before[kind][:, TOKENS:], after[kind][:, TOKENS:])


@torch.no_grad()
def test_contract_5_the_context_is_used(model):
    outputs = []
    for context in (False, True):
        cache = RollingKVCache(3)
        with kv_attention(model, cache) as kv:
            if context:
                forward(model, 0)
            kv.frame_offset = 1
            outputs.append(forward(model, 1))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_contract_6_reset(model):
    cache = RollingKVCache(3)
    with kv_attention(model, cache):
        forward(model)
        cache.enable_overwrite_mode()
        cache.reset()
        assert held(cache) == [(None, None)] * 3 and not cache.overwrite_newest
        forward(model)
        assert length(cache) == {TOKENS}


@torch.no_grad()
def test_contract_7_the_offset_matters_with_context_and_cancels_without(model):
    """Without context only distances between the chunk's own frames count, so a test on an empty
    cache would see rounding; with context the distance to it does.
    """

    def at(offset, context):
        cache = RollingKVCache(3)
        with kv_attention(model, cache) as kv:
            if context:
                kv.frame_offset = 0
                forward(model, 0, frames=2)
            kv.frame_offset = offset
            return forward(model, 1, frames=2)

    assert (at(0, False) - at(40, False)).abs().max() <= 1e-5
    assert (at(2, True) - at(40, True)).abs().max() > 1e-3


@torch.no_grad()
def test_the_offset_is_the_caches_unless_said_otherwise(model):
    """Nobody can forget it."""
    outputs = []
    for told in (True, False):
        cache = RollingKVCache(3)
        with kv_attention(model, cache) as kv:
            for start, frames in ((0, 1), (1, 2), (3, 2)):
                kv.frame_offset = start if told else None
                cache.enable_append_mode()
                forward(model, start, frames)
                cache.enable_overwrite_mode()
                outputs.append(forward(model, 10 + start, frames))
    for told, derived in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(told, derived)


@torch.no_grad()
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_an_empty_cache_changes_nothing_and_nothing_stays(cls, frames):
    torch.manual_seed(1)
    model = small_transformer(cls).eval()
    stock = forward(model, frames=frames)
    before = [block.attn1.processor for block in model.blocks]
    names = [name for name, _ in model.named_modules()]
    cache = RollingKVCache(3)
    with kv_attention(model, cache) as kv:
        assert torch.equal(stock, forward(model, frames=frames))
        kv.cache = None
        assert torch.equal(stock, forward(model, frames=frames))
        assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(KeyError), kv_attention(model, cache):
        forward(model, 1)
        raise KeyError
    assert torch.equal(stock, forward(model, frames=frames))
    assert [block.attn1.processor for block in model.blocks] == before
    assert not model.rope._forward_hooks


@torch.no_grad()
def test_chronoedit_keeps_its_two_distant_frames():
    """Its two frames stay 7 apart wherever they begin."""
    torch.manual_seed(1)
    model = small_transformer("ChronoEditTransformer3DModel").eval()
    model.requires_grad_(False)
    seen = []
    handle = model.blocks[0].attn1.register_forward_pre_hook(
        lambda module, args: seen.append(args[3]), with_kwargs=False
    )
    with kv_attention(model, RollingKVCache(3)) as kv:
        for frames, offset in ((2, 0), (2, 5), (3, 5)):
            kv.frame_offset, kv.cache = offset, RollingKVCache(3)
            forward(model, frames=frames)
    handle.remove()
    width = 24 - 2 * 8
    time = [rotary[0].unflatten(1, (-1, TOKENS))[0, :, 0, 0, :width] for rotary in seen]
    table = model.rope.freqs_cos[:, :width]
    for rows, used in zip(([0, 7], [5, 12], [5, 6, 7]), time, strict=True):
        assert torch.equal(used, table[rows])


@torch.no_grad()
def test_past_the_position_table(model):
    cache = RollingKVCache(3, 8 * TOKENS)
    with kv_attention(model, cache) as kv:
        for index in range(16):
            forward(model, index, frames=4)
        with pytest.raises(
            KVCacheError,
            match=r"latent frame 64 is past .* \(64 frames, rope_max_seq_len\).*kv.positions=relative",
        ):
            forward(model)
        assert cache.chunks == 16  # nothing was half done
        kv.frame_offset = -1
        with pytest.raises(KVCacheError, match="frame_offset: must be >= 0, got -1"):
            forward(model)
    cache = RollingKVCache(3, 4 * TOKENS)
    with kv_attention(model, cache, positions="relative"):
        for index in range(35):
            out = forward(model, index, frames=2)
    assert out.isfinite().all() and cache.evicted == 66 * TOKENS


def test_training_through_the_cache():
    """A student trained on its own rollouts: gradients of a chunk's last step, after which its
    clean pass and the next chunk write to the cache, before backward.
    """
    torch.manual_seed(0)
    model = small_transformer().train()
    cache, losses = RollingKVCache(3, 3 * TOKENS, TOKENS), []
    with kv_attention(model, cache):
        for index in range(5):
            cache.enable_append_mode()
            with torch.no_grad():
                forward(model, index)
            cache.enable_overwrite_mode()
            clean = forward(model, 10 + index)
            losses.append(clean.square().mean())
            with torch.no_grad():
                forward(model, 20 + index)
        sum(losses).backward()
    for name, parameter in model.named_parameters():
        if "attn1.to_" in name:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    for block in cache.block_caches:
        assert not any(x.requires_grad for x in block.kept.tensors)


def test_other_models_are_refused():
    with (
        pytest.raises(DitcacheError, match="no self-attention like Wan's"),
        kv_attention(torch.nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(KVCacheError, match="positions: must be absolute or relative, got 'x'"),
        kv_attention(small_transformer(), positions="x"),
    ):
        pass
