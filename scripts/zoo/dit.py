"""The zoo's `WanTransformer3DModel`, trained by flow matching jointly with the text encoder.

Letters: B batch, C channels, T H W latent frames and sides, L text tokens, D text width.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from zoo import text, vae, world

TEXT_TOKENS = 28  # longest caption kept in training


def make_transformer() -> WanTransformer3DModel:
    """Random weights; head size 32 keeps the rotary split exact for later members of the family."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=5, attention_head_dim=32, in_channels=vae.CHANNELS,
        out_channels=vae.CHANNELS, text_dim=text.DIM, freq_dim=128, ffn_dim=384, num_layers=8, rope_max_seq_len=128,
    )  # fmt: skip


class PaddedCrossAttention:
    """Cross-attention to the caption and ONE padding token that stands for `K` of them by a bias of log K.

    `WanPipeline` pads prompts with zero embeddings and attends to all of them; equal keys share one softmax weight,
    so this is the same function of the latents at a tenth of the cost. `bias` [B, 1, 1, L + 1] is set per batch.
    """

    bias: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias.to(query.dtype))
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3).type_as(query))


class Denoiser(nn.Module):
    """Transformer and text encoder as one module to train, average and checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.transformer = make_transformer()
        self.text_encoder: UMT5EncoderModel = text.make_text_encoder(len(tokenizer))

    def use_training_attention(self) -> PaddedCrossAttention:
        """Switch cross-attention to the one-padding-token form; returns the processor that holds the bias."""
        processor = PaddedCrossAttention()
        for block in self.transformer.blocks:
            block.attn2.set_processor(processor)
        return processor

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """token ids [B, L] -> embeddings [B, L + 1, D]; padding and the extra last position are zero."""
        mask = tokens != 0
        states = self.text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
        return F.pad(states, (0, 0, 0, 1))


def padding_bias(tokens: torch.Tensor, padded_to: torch.Tensor) -> torch.Tensor:
    """Additive attention bias [B, 1, 1, L + 1] for captions `tokens` [B, L] padded to `padded_to` [B] tokens."""
    real = tokens != 0
    count = (padded_to - real.sum(1)).clamp_min(1).float().log()
    bias = torch.where(real, 0.0, -math.inf)
    return torch.cat([bias, count[:, None]], 1)[:, None, None]


def add_stray_words(
    tokens: torch.Tensor, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Into one caption of twelve, insert a few letters or words that mean nothing here, so that they mean nothing.

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
    meaningful = [*world.OBJECT_COLOURS, *world.BACKGROUNDS, *world.TEXTURES, *world.SHAPES, *world.DIRECTIONS]
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{word}" for word in meaningful]))


def draw_sigma(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Three quarters logit-normal shifted by 3 (the shift used in sampling), one quarter uniform."""
    normal = 1 / (1 + np.exp(-rng.standard_normal(count)))
    shifted = 3 * normal / (1 + 2 * normal)
    return torch.from_numpy(np.where(rng.random(count) < 0.25, rng.random(count), shifted)).float()


def flow_loss(
    model: Denoiser, attention: PaddedCrossAttention, latents: torch.Tensor, tokens: torch.Tensor,
    sigma: torch.Tensor, padded_to: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Mean squared error of the velocity `noise - latents` at `sigma` [B]; bf16 autocast."""
    attention.bias = padding_bias(tokens, padded_to)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * latents + level * noise
    with torch.autocast(latents.device.type, torch.bfloat16):
        states = model.text_states(tokens)
        velocity = model.transformer(noisy, sigma * 1000, states, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - latents)
