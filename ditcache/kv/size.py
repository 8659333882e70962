"""Bytes of keys and values, by arithmetic. Does not import torch."""

from __future__ import annotations

GROUP = 64  # entries that share a scale and an offset in int4


def group_of(head_dim: int) -> int:
    """Entries of a head that int4 codes together."""
    return GROUP if head_dim % GROUP == 0 else head_dim


def bytes_per_head(head_dim: int, itemsize: int, codec: str = "none") -> int:
    """Of one token's key, or value, in one head. int8: a code each and an fp16 scale; int4: half a
    byte each, an fp16 scale and an fp16 offset per group.
    """
    if codec == "int8":
        return head_dim + 2
    if codec == "int4":
        return head_dim // 2 + 4 * (head_dim // group_of(head_dim))
    return head_dim * itemsize


def kv_bytes(layers: int, heads: int, head_dim: int, tokens: int, size: int, codec: str) -> int:
    """Of all keys and values of `tokens` tokens in one expert and branch."""
    return 2 * layers * heads * tokens * bytes_per_head(head_dim, size, codec)
