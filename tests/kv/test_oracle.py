"""The oracle: a rollout with the cache equals one forward over the whole video under a banded mask,
for every partition, window and sink, in every layer; and differs where it must.
"""

import pytest
import torch
from banded import FRAMES, TOKENS, attentive_transformer, masked_forward, noise, text

from ditcache.kv.attach import kv_attention
from ditcache.kv.rolling import RollingKVCache

EXACT = 1e-6
TELLING = 1000 * EXACT
PARTITIONS = ([3, 3, 3, 3], [1, 3, 3, 3, 2])
WINDOWS = ((None, 0), (6, 0), (9, 0), (5, 0), (6, 3), (7, 1), (6, 2))


@pytest.fixture(scope="module")
def model():
    return attentive_transformer()


@torch.no_grad()
def rollout(
    model, chunks, window=None, sink=0, *, newest=0.0, positions="absolute", offset=0, noisy=3
):
    """Every chunk at t=0 with noisy passes before it that its clean pass must replace; the last one
    at `newest`. -> all outputs [1, C, T, H, W].
    """
    cache = RollingKVCache(len(model.blocks), window and window * TOKENS, sink * TOKENS)
    latents, outputs, start = noise(sum(chunks)), [], 0
    with kv_attention(model, cache, positions=positions) as kv:
        for index, length in enumerate(chunks):
            kv.frame_offset = offset + start
            cache.enable_append_mode()
            for again in range(noisy):
                other = noise(length, seed=50 + noisy * index + again)
                model(other, torch.tensor([1000.0 - 100 * again]), text(), return_dict=False)
                cache.enable_overwrite_mode()
            when = newest if index == len(chunks) - 1 else 0.0
            own = latents[:, :, start : start + length]
            outputs.append(model(own, torch.tensor([when]), text(), return_dict=False)[0])
            start += length
    return torch.cat(outputs, dim=2)


def masked(model, chunks, window=None, sink=0, newest=0.0):
    when = [0.0] * (FRAMES - chunks[-1]) + [newest] * chunks[-1]
    return masked_forward(model, noise(FRAMES), when, text(), chunks, window, sink)


def largest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize("chunks", PARTITIONS, ids=str)
def test_cached_equals_masked(model, chunks, window, sink):
    """With the newest chunk still noisy, against timesteps per token."""
    difference = largest(
        rollout(model, chunks, window, sink, newest=937.5),
        masked(model, chunks, window, sink, newest=937.5),
    )
    assert difference <= EXACT, difference


@pytest.mark.parametrize("chunks", PARTITIONS, ids=str)
def test_cached_equals_masked_with_everything_clean(model, chunks):
    assert largest(rollout(model, chunks), masked(model, chunks)) <= EXACT


def test_positions_and_offsets(model):
    """Only distances count; relative positions are the same without a sink."""
    absolute = rollout(model, [3] * 4, 6, noisy=1)
    assert largest(absolute, rollout(model, [3] * 4, 6, offset=100, noisy=1)) <= EXACT
    assert largest(absolute, rollout(model, [3] * 4, 6, positions="relative", noisy=1)) <= EXACT
    unbounded = rollout(model, [1, 3, 3, 3, 2], noisy=1)
    relative = rollout(model, [1, 3, 3, 3, 2], positions="relative", noisy=1)
    assert largest(unbounded, relative) <= EXACT


def test_negative_controls(model):
    """What must differ does, a thousand times over the tolerance."""
    six, sunk = rollout(model, [3] * 4, 6, noisy=1), rollout(model, [3] * 4, 6, 3, noisy=1)
    controls = {
        "a window against none": largest(six, masked(model, [3] * 4)),
        "another partition": largest(six, masked(model, [1, 3, 3, 3, 2], 6)),
        "a sink against none": largest(sunk, six),
        "relative against absolute, with a sink": largest(
            sunk, rollout(model, [3] * 4, 6, 3, positions="relative", noisy=1)
        ),
        "a clean pass left out": largest(six, without_clean_pass(model)),
        "every chunk at position 0": largest(six, at_position_0(model)),
    }
    assert min(controls.values()) >= TELLING, controls


@torch.no_grad()
def without_clean_pass(model):
    cache, outputs = RollingKVCache(len(model.blocks), 6 * TOKENS), []
    with kv_attention(model, cache):
        for index in range(4):
            cache.enable_append_mode()
            own = noise(FRAMES)[:, :, 3 * index : 3 * index + 3]
            outputs.append(model(own, torch.tensor([0.0]), text(), return_dict=False)[0])
            cache.enable_overwrite_mode()
            model(noise(3, 9), torch.tensor([625.0]), text(), return_dict=False)
    return torch.cat(outputs, dim=2)


@torch.no_grad()
def at_position_0(model):
    cache, outputs = RollingKVCache(len(model.blocks), 6 * TOKENS), []
    with kv_attention(model, cache, frame_offset=0):
        for index in range(4):
            own = noise(FRAMES)[:, :, 3 * index : 3 * index + 3]
            outputs.append(model(own, torch.tensor([0.0]), text(), return_dict=False)[0])
    return torch.cat(outputs, dim=2)


@torch.no_grad()
def test_in_double_precision_nothing_is_left(model):
    """fp64 attention: what is left in fp32 is summation order. (Norms and tables stay fp32.)"""
    model = attentive_transformer().double()
    latents, cache, outputs = noise(FRAMES).double(), RollingKVCache(3, 6 * TOKENS, 3 * TOKENS), []
    states = text().double()
    with kv_attention(model, cache):
        for start in range(0, FRAMES, 3):
            own = latents[:, :, start : start + 3]
            outputs.append(model(own, torch.zeros(1).double(), states, return_dict=False)[0])
    whole = masked_forward(model, latents, [0.0] * FRAMES, states, [3] * 4, 6, 3)
    assert largest(torch.cat(outputs, dim=2), whole) <= 1e-9
