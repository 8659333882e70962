"""Self-attention of Wan and ChronoEdit with keys and values in the open.

What a KV cache or a bridge needs of a block: its keys after their norm and before the rotary
embedding, its values, and the last word on what the queries attend to. Installed through diffusers'
attention processors. Letters: B batch, N tokens (S of them attended to), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ditcache.errors import DitcacheError

Rotary = tuple[Tensor, Tensor]
KeyValue = Callable[[Tensor, Tensor, Rotary], tuple[Tensor, Tensor]]


class SelfAttention:
    """Processor of one block's `attn1`: bit for bit diffusers' own as long as `key_value` is
    `rotated`.

    key_value(key [B, N, H, D] before rotary, value [B, N, H, D], (cos, sin)) -> (key [B, S, H, D]
    after rotary, value [B, S, H, D]) to attend to. A plain object: a module would enter the
    transformer's state_dict.
    """

    _attention_backend = None  # diffusers sets both on processors
    _parallel_config = None

    def __init__(self, key_value: KeyValue):
        self.key_value = key_value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and rotary_emb is not None
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (
                project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
            )
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value)
        )
        query = rotate(query, rotary_emb)
        key, value = self.key_value(key, value, rotary_emb)
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).type_as(query)))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, N, H, D] by Wan's tables [1, N, 1, D], which hold each angle twice: the first of a pair
    is read from cos, the second from sin.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    turned = torch.empty_like(x)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    return turned.type_as(x)


def rotated(key: Tensor, value: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """What diffusers' own processor attends to."""
    return rotate(key, rotary), value


@contextmanager
def open_self_attention(
    transformer: nn.Module, key_value: Callable[[int], KeyValue]
) -> Iterator[None]:
    """Within, block i's self-attention asks `key_value(i)`. Puts the processors back at the end,
    also after an exception. Raises DitcacheError for blocks without an `attn1` of Wan's kind.
    """
    blocks = list(getattr(transformer, "blocks", []))
    if not blocks or not all(hasattr(getattr(b, "attn1", None), "norm_k") for b in blocks):
        raise DitcacheError(
            f"{type(transformer).__name__}: its blocks have no self-attention like Wan's "
            "(`blocks[i].attn1` with `norm_k`), so that keys and values cannot be reached"
        )
    attentions = [block.attn1 for block in blocks]
    before = [attention.processor for attention in attentions]
    try:
        for index, attention in enumerate(attentions):
            own = SelfAttention(key_value(index))
            own._attention_backend = getattr(before[index], "_attention_backend", None)
            own._parallel_config = getattr(before[index], "_parallel_config", None)
            attention.set_processor(own)
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.set_processor(processor)
