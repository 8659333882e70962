"""Cross-attention to a caption without its padding, which is most of a small model's forward.

Wan pads captions with zero embeddings to 512 tokens and attends to all of them. Equal keys share
one softmax weight, so one padding token with a bias of log K stands for K of them: the same
function up to rounding. Letters: B batch, L caption tokens, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcache.bridge.samples import Caption


class ShortText:
    """Processor of every `attn2` of one transformer. `read` before each forward.

    Image tokens, where there are any, stand in front of the caption's and have keys of their own.
    """

    _attention_backend = None
    _parallel_config = None
    bias: Tensor
    length: int

    def read(self, caption: Caption) -> Tensor:
        """text [B, L, D] -> what to call the transformer with, [B, L + 1, D]."""
        count, self.length = caption.lengths, caption.text.shape[1] + 1
        own = torch.arange(self.length - 1, device=count.device)[None] < count[:, None]
        padding = (caption.padded_to - count).clamp_min(1).float().log()
        bias = torch.where(own, 0.0, -math.inf)
        self.bias = torch.cat([bias, padding[:, None]], 1)[:, None, None]
        return F.pad(caption.text, (0, 0, 0, 1))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        text = encoder_hidden_states[:, -self.length :]
        query = attn.norm_q(attn.to_q(hidden_states))
        mixed = attend(attn, query, attn.norm_k(attn.to_k(text)), attn.to_v(text), self.bias)
        if attn.add_k_proj is not None:
            image = encoder_hidden_states[:, : -self.length]
            key = attn.norm_added_k(attn.add_k_proj(image))
            mixed = mixed + attend(attn, query, key, attn.add_v_proj(image), None)
        return attn.to_out[1](attn.to_out[0](mixed))


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, H * D] of each -> [B, N, H * D]"""
    query, key, value = (
        x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    bias = None if bias is None else bias.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key.to(query), value.to(query), bias)
    return mixed.transpose(1, 2).flatten(2)


@contextmanager
def short_text(transformer: nn.Module) -> Iterator[ShortText]:
    """Within, the transformer takes `ShortText.read(caption)` as its text."""
    attentions: list[Any] = [block.attn2 for block in transformer.blocks]  # type: ignore[union-attr]
    before = [attention.processor for attention in attentions]
    processor = ShortText()
    try:
        for attention in attentions:
            attention.set_processor(processor)
        yield processor
    finally:
        for attention, own in zip(attentions, before, strict=True):
            attention.set_processor(own)
