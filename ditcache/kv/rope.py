"""Wan's rotary tables for a chunk that is not the first.

diffusers' `transformer.rope` always begins at frame 0. What it returns is replaced, in a forward
hook, by the same with other temporal rows; its spatial part, and ChronoEdit's rule that two frames
lie `temporal_skip_len` apart, stay the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditcache.kv.storage import KVCacheError
from ditcache.models.attention import Rotary


def frame_rows(rope: nn.Module, frames: int, offset: int) -> list[range]:
    """Rows of the temporal table that `frames` frames from `offset` on have."""
    skip = getattr(rope, "temporal_skip_len", None)
    if skip is not None and frames == 2:
        return [range(offset, offset + skip, skip - 1)]
    return [range(offset, offset + frames)]


def at_rows(rope: Any, rotary: Rotary, frames: int, rows: list[range]) -> Rotary:
    """Tables (cos, sin) [1, N, 1, D] of `frames` frames -> those of the frames in `rows` of the
    temporal table. Raises KVCacheError for rows that are not in it.
    """
    rows = [part for part in rows if part]
    first, last = min(part[0] for part in rows), max(part[-1] for part in rows)
    length = rope.freqs_cos.shape[0]
    if first < 0:
        raise KVCacheError(f"frame_offset: must be >= 0, got {first}")
    if last >= length:
        raise KVCacheError(
            f"frame_offset: latent frame {last} is past the end of this model's position table "
            f"({length} frames, rope_max_seq_len); make a shorter rollout, or count positions from "
            "the window's start (kv.positions=relative)"
        )
    tables, width = [], time_width(rope)
    for table, own in zip((rope.freqs_cos, rope.freqs_sin), rotary, strict=True):
        space = own.unflatten(1, (frames, -1))[0, 0, :, 0, width:]  # [tokens of a frame, .]
        chosen = [table[part.start : part.stop : part.step, :width] for part in rows]
        time = torch.cat(chosen).to(own)  # [rows, width]
        count, tokens = len(time), len(space)
        whole = torch.cat(
            [time[:, None].expand(-1, tokens, -1), space[None].expand(count, -1, -1)], dim=-1
        )
        tables.append(whole.reshape(1, count * tokens, 1, -1))
    return tables[0], tables[1]


def time_width(rope: Any) -> int:
    """Columns of the tables that turn with time; the others turn with height and width."""
    size = rope.attention_head_dim
    return getattr(rope, "t_dim", size - 2 * (size // 3))  # ChronoEdit's has none


def tokens_per_frame(rotary: Rotary, frames: int) -> int:
    return rotary[0].shape[1] // frames


def hidden_frames(rope: Any, hidden: Tensor) -> int:
    """Frames of tokens of latents [B, C, T, H, W]."""
    return hidden.shape[2] // rope.patch_size[0]
