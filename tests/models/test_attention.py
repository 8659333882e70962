"""Self-attention in the open: what diffusers computes, and put back as it was."""

import pytest
import torch
from random_checkpoints import small_transformer
from torch import nn

from ditcache.errors import DitcacheError
from ditcache.models.attention import open_self_attention, rotated

CLASSES = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")


def inputs(frames: int) -> dict:
    generator = torch.Generator().manual_seed(frames)
    return {
        "hidden_states": torch.randn(1, 16, frames, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 20, 64, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 3, 8])
@pytest.mark.parametrize("cls", CLASSES)
def test_bit_equal_to_diffusers(cls, frames):
    model = small_transformer(cls).eval()
    stock = model(**inputs(frames))[0]
    with open_self_attention(model, lambda index: rotated):
        opened = model(**inputs(frames))[0]
    assert torch.equal(stock, opened)


@torch.no_grad()
def test_fused_projections():
    model = small_transformer().eval()
    for block in model.blocks:
        block.attn1.fuse_projections()
    stock = model(**inputs(3))[0]
    with open_self_attention(model, lambda index: rotated):
        assert torch.equal(stock, model(**inputs(3))[0])


@torch.no_grad()
def test_key_value_decides_per_block():
    model, seen = small_transformer().eval(), []

    def key_value(index):
        def keep(key, value, rotary):
            seen.append((index, tuple(key.shape)))
            return rotated(key, value * (index != 1), rotary)

        return keep

    stock = model(**inputs(3))[0]
    with open_self_attention(model, key_value):
        assert not torch.equal(stock, model(**inputs(3))[0])
    assert seen == [(i, (1, 48, 2, 24)) for i in range(3)]


def test_put_back_after_an_exception():
    model = small_transformer()
    before, names = [block.attn1.processor for block in model.blocks], set(model.state_dict())
    with pytest.raises(KeyError), open_self_attention(model, lambda index: rotated):
        assert set(model.state_dict()) == names
        raise KeyError
    assert [block.attn1.processor for block in model.blocks] == before


def test_other_models_are_refused():
    linear = open_self_attention(nn.Linear(2, 2), lambda index: rotated)
    with pytest.raises(DitcacheError, match="no self-attention like Wan's"), linear:
        pass
