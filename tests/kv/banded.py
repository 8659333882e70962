"""What the rollout tests share: a small model whose attention matters, and the same video in one
forward under a mask.
"""

import torch
from diffusers import WanTransformer3DModel
from torch.nn.functional import scaled_dot_product_attention

HEIGHT, WIDTH, CHANNELS = 4, 8, 16
TOKENS = HEIGHT * WIDTH // 4  # of a latent frame
FRAMES = 12


def attentive_transformer(layers: int = 3) -> WanTransformer3DModel:
    """Random weights; queries and keys enlarged so that attention is far from uniform."""
    torch.manual_seed(3)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=48,
        freq_dim=64,
        ffn_dim=192,
        num_layers=layers,
        rope_max_seq_len=256,
        cross_attn_norm=True,
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn1.norm_q, block.attn1.norm_k):
                part.weight.mul_(1.5)
    return model.requires_grad_(False)


def noise(frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS, frames, HEIGHT, WIDTH, generator=generator)


def text(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(100 + seed))


def band(chunks, window=None, sink=0) -> torch.Tensor:
    """Written from the rule, frame by frame: bool [frames, frames], True where a query's frame sees
    a key's.
    """
    frames = sum(chunks)
    mask, first = torch.zeros(frames, frames, dtype=torch.bool), 0
    for length in chunks:
        end = first + length
        for seen in range(end):
            kept = window is None or end <= window or seen >= end - (window - sink) or seen < sink
            mask[first:end, seen] = kept
        first = end
    return mask


class Masked:
    """Attention processor under a mask of tokens, written apart from the package's own."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mask):
        self.mask = mask

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        query, key, value = (
            attn.to_q(hidden_states),
            attn.to_k(hidden_states),
            attn.to_v(hidden_states),
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        cos, sin = (x.transpose(1, 2) for x in rotary_emb)

        def turn(x):
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            angles = torch.complex(cos[..., 0::2], sin[..., 1::2])
            return torch.view_as_real(pairs * angles).flatten(-2)

        out = scaled_dot_product_attention(turn(query), turn(key), value, attn_mask=self.mask)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def masked_forward(model, latents, timesteps, states, chunks, window=None, sink=0):
    """One forward over all frames. timesteps: one per frame."""
    mask = band(chunks, window, sink)
    mask = mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    before = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.processor = Masked(mask)
    try:
        when = torch.tensor(timesteps).repeat_interleave(TOKENS)[None]
        return model(latents, when, states, return_dict=False)[0]
    finally:
        for block, processor in zip(model.blocks, before, strict=True):
            block.attn1.processor = processor
