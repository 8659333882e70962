"""Finished chunks quantised, the newest one as it is.

Only the codes of finished chunks are kept. To be read, a block's keys and values are written out
into buffers that all blocks of a cache share, so that memory really falls.
Letters: B batch, N tokens, H heads, D head size, G groups of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditcache.kv.size import group_of
from ditcache.kv.storage import KVCacheError, Slots, Storage, check_alike, empty, put

LEAST = 2.0**-24  # the smallest scale of fp16


@dataclass
class Scratch:
    """Buffers [B, S, H, D] for the keys and values of the block at work, and the blocks in order of
    their first use.
    """

    buffers: list[Tensor] = field(default_factory=list)
    members: list[Storage] = field(default_factory=list)

    def pair(self, newest: list[Tensor], room: int) -> list[Tensor]:
        """Made at first use, and anew for more room or another kind of tensor."""
        fits = self.buffers and all(
            had.shape[0] == has.shape[0]
            and had.shape[1] >= room
            and had.shape[2:] == has.shape[2:]
            and (had.dtype, had.device) == (has.dtype, has.device)
            for had, has in zip(self.buffers, newest, strict=True)
        )
        if not fits:
            self.buffers = [empty(x, room) for x in newest]
        return self.buffers


class Int8:
    """A code per entry and an fp16 scale per head and token: the largest magnitude over 127."""

    def __init__(self, like: Tensor, room: int):
        self.parts = [
            empty(like.to(torch.int8), room),
            empty(like[..., :1].to(torch.float16), room),
        ]

    def encode(self, x: Tensor) -> list[Tensor]:
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(LEAST).to(torch.float16)
        codes = (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        return [codes, scale]

    def decode(self, slots: slice, out: Tensor) -> None:
        codes, scale = (part[:, slots] for part in self.parts)
        out.copy_(codes).mul_(scale)


class Int4:
    """Half a byte per entry, and per group of a head an fp16 step and an fp16 least value."""

    def __init__(self, like: Tensor, room: int):
        self.group = group_of(like.shape[-1])
        groups = like.shape[-1] // self.group
        codes = like[..., : like.shape[-1] // 2].to(torch.uint8)
        ends = like[..., :1].expand(*like.shape[:-1], 2 * groups).to(torch.float16)
        self.parts = [empty(codes, room), empty(ends, room)]

    def encode(self, x: Tensor) -> list[Tensor]:
        grouped = x.float().unflatten(-1, (-1, self.group))
        low = grouped.amin(-1, keepdim=True).to(torch.float16)
        reach = (grouped.amax(-1, keepdim=True) - low.float()) / 15
        step = reach.clamp_min(LEAST).to(torch.float16)
        codes = ((grouped - low.float()) / step.float()).round().clamp(0, 15).to(torch.uint8)
        even, odd = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
        return [even | (odd << 4), torch.cat([step, low], dim=-1).flatten(-2)]

    def decode(self, slots: slice, out: Tensor) -> None:
        codes, ends = (part[:, slots] for part in self.parts)
        out.unflatten(-1, (-1, 2)).copy_(torch.stack([codes & 15, codes >> 4], dim=-1))
        step, low = ends.unflatten(-1, (-1, 1, 2)).unbind(-1)
        out.unflatten(-1, (-1, self.group)).mul_(step).add_(low)


KINDS: dict[str, type[Int8] | type[Int4]] = {"int8": Int8, "int4": Int4}


class Quantised:
    """A block's keys and values: codes, and the newest chunk in the model's dtype."""

    def __init__(self, codec: str, scratch: Scratch, key: Tensor, value: Tensor, room: int):
        if codec == "int4" and key.shape[-1] % 2:
            raise KVCacheError(f"int4 needs an even head size, got {key.shape[-1]}")
        self.codec, self.scratch, self.room = codec, scratch, room
        self.coded = [KINDS[codec](x, room) for x in (key, value)]
        self.newest: list[Tensor] = []
        self.slots: Slots = []

    @property
    def tensors(self) -> list[Tensor]:
        return [*(p for c in self.coded for p in c.parts), *self.newest, *self.scratch.buffers]

    def check(self, key: Tensor, value: Tensor) -> None:
        for name, kept, new in zip(("key", "value"), self.newest, (key, value), strict=False):
            check_alike(name, kept, new)

    def make_room(self, slots: int) -> None:
        if slots <= self.room:
            return
        for coded in self.coded:
            for index, old in enumerate(coded.parts):
                coded.parts[index] = empty(old, max(slots, 2 * self.room))
                coded.parts[index][:, : self.room] = old
        self.room = max(slots, 2 * self.room)

    def write(self, slots: Slots, key: Tensor, value: Tensor, *, append: bool) -> None:
        if append and self.newest:
            for coded, finished in zip(self.coded, self.newest, strict=True):
                for part, codes in zip(coded.parts, coded.encode(finished), strict=True):
                    put(part, self.slots, codes)
        self.newest, self.slots = [key.clone(), value.clone()], slots

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        outs = [x[:, :filled] for x in self.scratch.pair(self.newest, self.room)]
        for coded, newest, out in zip(self.coded, self.newest, outs, strict=True):
            coded.decode(slice(filled), out)
            put(out, self.slots, newest)
        return outs[0], outs[1]

    def free(self) -> None:
        self.scratch.buffers = []


def quantised(codec: str) -> Callable[[Tensor, Tensor, int], Storage]:
    """`storage` of one `RollingKVCache`: `int8` or `int4`."""
    scratch = Scratch()

    def make(key: Tensor, value: Tensor, room: int) -> Storage:
        return Quantised(codec, scratch, key, value, room)

    return make
