"""The zoo's `WanTransformer3DModel`, trained by flow matching jointly with the text encoder.

Letters: B batch, C channels, T H W latent frames and sides, L text tokens, D text width.
"""

import math
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ditcache.clips import world
from zoo import text, vae

Attention = TypeVar("Attention", bound="TrainingAttention")
TEXT_TOKENS = 28  # longest caption kept in training


def make_transformer() -> WanTransformer3DModel:
    """Random weights; head size 32 keeps the rotary split exact for later members of the family."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=vae.CHANNELS,
        out_channels=vae.CHANNELS,
        text_dim=text.DIM,
        freq_dim=128,
        ffn_dim=384,
        num_layers=8,
        rope_max_seq_len=128,
    )


class TrainingAttention:
    """The blocks' attention, made cheap to train on a CPU. `bias` is set per batch.

    Cross-attention sees the caption and ONE padding token that stands for `K` of them by a bias of
    log K, [B, 1, 1, L + 1]: `WanPipeline` pads prompts with zero embeddings and attends to all of
    them; equal keys share one softmax weight, so this is the same function at a tenth of the cost.
    Products are written out because the fused CPU kernel's backward takes most of a step at these
    sizes. Self-attention sees everything, or what `hidden` [N, N], additive, leaves it.
    """

    bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None
    ):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (query, key, attn.to_v(source))
        )
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        bias = self.hidden if encoder_hidden_states is None else self.bias
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [B, heads, N, size] by Wan's tables [1, N, 1, size], which hold each angle twice."""
    cos, sin = (table.transpose(1, 2)[..., 0::2] for table in rotary)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).to(x.dtype)


class Denoiser(nn.Module):
    """Transformer and text encoder as one module to train, average and checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.transformer = make_transformer()
        self.text_encoder: UMT5EncoderModel = text.make_text_encoder(len(tokenizer))

    def use_training_attention(self) -> TrainingAttention:
        """Switch the blocks to the one-padding-token form; returns the processor that holds the
        bias.
        """
        return set_attention(self.transformer, TrainingAttention())

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """token ids [B, L] -> embeddings [B, L + 1, D]; padding and the extra last position are
        zero.
        """
        mask = tokens != 0
        states = self.text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
        return F.pad(states, (0, 0, 0, 1))


def set_attention(transformer: nn.Module, processor: Attention) -> Attention:
    """One processor for all of the blocks' attention; returned, because it holds the bias."""
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    return processor


def padding_bias(tokens: torch.Tensor, padded_to: torch.Tensor) -> torch.Tensor:
    """Additive attention bias [B, 1, 1, L + 1] for captions `tokens` [B, L] padded to `padded_to`
    [B] tokens.
    """
    real = tokens != 0
    count = (padded_to - real.sum(1)).clamp_min(1).float().log()
    bias = torch.where(real, 0.0, -math.inf)
    return torch.cat([bias, count[:, None]], 1)[:, None, None]


def add_stray_words(
    tokens: torch.Tensor, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Into one caption of twelve, insert a few letters or words that mean nothing here, so that
    they mean nothing.

    tokens [B, L] is edited in place; the caption keeps its end token.
    """
    for row in tokens:
        length = int((row != 0).sum())
        if rng.random() >= 1 / 12 or length + 8 > len(row):
            continue
        stray = torch.from_numpy(rng.integers(3, len(tokenizer), size=int(rng.integers(1, 8))))
        stray = stray[~torch.isin(stray, caption_words(tokenizer))]
        at = int(rng.integers(length))
        row[:] = torch.cat([row[:at], stray, row[at:]])[: len(row)]
    return tokens


@cache
def caption_words(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Ids of the words that do mean something."""
    meaningful = [
        *world.OBJECT_COLOURS,
        *world.BACKGROUNDS,
        *world.TEXTURES,
        *world.SHAPES,
        *world.DIRECTIONS,
    ]
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{word}" for word in meaningful]))


def draw_sigma(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Three quarters logit-normal shifted by 3 (the shift used in sampling), one quarter
    uniform.
    """
    normal = 1 / (1 + np.exp(-rng.standard_normal(count)))
    shifted = 3 * normal / (1 + 2 * normal)
    return torch.from_numpy(np.where(rng.random(count) < 0.25, rng.random(count), shifted)).float()


def flow_loss(
    model: Denoiser,
    attention: TrainingAttention,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    sigma: torch.Tensor,
    padded_to: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the velocity `noise - latents` at `sigma` [B]; bf16 autocast."""
    attention.bias = padding_bias(tokens, padded_to)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * latents + level * noise
    with torch.autocast(latents.device.type, torch.bfloat16):
        states = model.text_states(tokens)
        velocity = model.transformer(noisy, sigma * 1000, states, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - latents)
