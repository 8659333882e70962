"""The proof that a rollout with the cache is exact: it equals one forward over all frames under a
banded mask, in every layer.

A query of chunk i, which ends before frame e, sees a key's frame f < e if it lies in the window
(f >= e - (W - S)) or the sink (f < S), or if nothing has been evicted yet (e <= W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ditcache.kv.attach import kv_attention
from ditcache.kv.make import make_cache
from ditcache.kv.settings import KVSettings
from ditcache.models.attention import rotate

GRID = 8  # latents a side that are checked; the cache knows nothing of their number
TOLERANCE = 1e-5  # of the largest output
CONTROL = 1e-3  # at least so far must the negative control be


@dataclass
class Verdict:
    """Largest differences over the largest output. error: cached against masked. blind: against a
    mask without any context, which must differ. unwindowed: against one without a window (None: the
    check evicts nothing). coded: cached with the codec, or from the store, against exact.
    """

    lengths: list[int]
    error: float
    blind: float
    unwindowed: float | None
    coded: float | None

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and self.blind >= CONTROL


def band(lengths: Sequence[int], window: int | None, sink: int) -> Tensor:
    """bool [frames, frames]: which key's frame a query's frame sees."""
    ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths))[:, None]
    frame = torch.arange(int(ends[-1]))[None]
    seen = frame < ends
    if window is None:
        return seen
    return seen & ((ends <= window) | (frame >= ends - (window - sink)) | (frame < sink))


class Masked:
    """Processor of self-attention over a whole video under a mask of tokens, apart from the cache's
    own so that each can prove the other.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mask: Tensor):
        self.mask = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (p(hidden_states) for p in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        mixed = dispatch_attention_fn(query, key, value, attn_mask=self.mask)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).type_as(query)))


@torch.no_grad()
def masked_forward(
    transformer: Any, latents: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor
) -> Tensor:
    """One forward over latents [1, C, F, H, W]. timesteps [F]; mask [F, F]."""
    blocks, patch = transformer.blocks, transformer.config.patch_size
    unit = (latents.shape[3] // patch[1]) * (latents.shape[4] // patch[2])
    whole = mask.repeat_interleave(unit, 0).repeat_interleave(unit, 1).to(latents.device)
    before = [block.attn1.processor for block in blocks]
    try:
        for block in blocks:
            block.attn1.set_processor(Masked(whole))
        when = timesteps.repeat_interleave(unit)[None].to(latents.device)
        return transformer(latents, when, text, return_dict=False)[0]
    finally:
        for block, processor in zip(blocks, before, strict=True):
            block.attn1.set_processor(processor)


@torch.no_grad()
def cached_rollout(
    transformer: Any,
    latents: Tensor,
    lengths: Sequence[int],
    newest: float,
    text: Tensor,
    kv: KVSettings,
    store: Any = None,
) -> Tensor:
    """The same chunk by chunk: a noisy pass, which must leave no trace, then the clean one; the
    last chunk at `newest`.
    """
    patch = transformer.config.patch_size
    unit = (latents.shape[3] // patch[1]) * (latents.shape[4] // patch[2])
    cache = make_cache(len(transformer.blocks), kv, unit, latents.shape[2], store)
    outputs, begin = [], 0
    with kv_attention(transformer, cache, positions=kv.positions) as attention:
        for index, length in enumerate(lengths):
            own = latents[:, :, begin : begin + length]
            attention.frame_offset = begin
            at = [1000.0, newest if index == len(lengths) - 1 else 0.0]
            cache.enable_append_mode()
            for x, timestep in zip((own.flip(2) + 1, own), at, strict=True):
                when = torch.tensor([timestep], device=own.device)
                out = transformer(x, when, text, return_dict=False)[0]
                cache.enable_overwrite_mode()
            outputs.append(out)
            begin += length
    cache.reset()
    return torch.cat(outputs, dim=2)


def examine(
    transformer: Any,
    text: Tensor,
    lengths: list[int],
    kv: KVSettings,
    *,
    newest: float,
    seed: int = 0,
    store: Any = None,
) -> Verdict:
    """Check one expert on noise of `lengths` latent frames. text [1, N, D]. Exact in fp32 only."""
    plain = KVSettings(kv.window, kv.sink, kv.positions)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, transformer.config.in_channels, sum(lengths), GRID, GRID)
    latents = torch.randn(shape, generator=generator).to(text)
    timesteps = torch.zeros(sum(lengths))
    timesteps[-lengths[-1] :] = newest
    cached = cached_rollout(transformer, latents, lengths, newest, text, plain)

    def masked(mask: Tensor) -> Tensor:
        return masked_forward(transformer, latents, timesteps, text, mask)

    whole = masked(band(lengths, kv.window, kv.sink))
    scale = float(whole.abs().max())

    def difference(other: Tensor) -> float:
        return float((cached - other).abs().max()) / scale

    chunks = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    alone = masked(chunks[:, None] == chunks[None])
    evicts = kv.window is not None and sum(lengths) > kv.window
    coded = None
    if kv != plain:
        other = cached_rollout(transformer, latents, lengths, newest, text, kv, store)
        coded = difference(other)
    return Verdict(
        lengths,
        difference(whole),
        difference(alone),
        difference(masked(band(lengths, None, 0))) if evicts else None,
        coded,
    )
