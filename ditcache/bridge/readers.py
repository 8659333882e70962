"""One source in one branch of a bridge at work: what it said when it was last asked, by either
driver. Letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditcache.bridge.capture import Seen, capture
from ditcache.bridge.nets import KeyValues
from ditcache.models.attention import Rotary, SelfAttention, rotated
from ditcache.store.base import Key

if TYPE_CHECKING:
    from ditcache.bridge.run import Bridge


class Reader:
    """One source in one branch: keys and values from when it was last asked.

    last: step and sigma of that. seen: what it was asked, from which anything lost is made again.
    """

    def __init__(self, bridge: Bridge, key: tuple[str, str], source: nn.Module, wanted: list[int]):
        self.bridge, self.key, self.source, self.wanted = bridge, key, source, wanted
        self.last: tuple[int, float] | None = None
        self.seen: Seen | None = None
        self.shape: torch.Size | None = None

    def refresh(self, seen: Seen) -> None:
        """The source is to look at this from now on."""
        self.seen = replace(seen, latents=seen.latents.clone())

    def forget(self) -> None:
        self.seen = self.last = None

    def get(self, layer: int) -> KeyValues:
        raise NotImplementedError


class StreamReader(Reader):
    """Runs the source's blocks one by one, each when the target gets there. Keeps a layer only if a
    later step may read it again.
    """

    def refresh(self, seen: Seen) -> None:
        super().refresh(seen)
        assert self.seen is not None
        self.kept: dict[int, KeyValues] = {}
        self.walk = walk(self.source, self.seen)

    def forget(self) -> None:
        super().forget()
        self.kept = {}

    def get(self, layer: int) -> KeyValues:
        while layer not in self.kept:
            index, keys_values = next(self.walk)
            self.bridge.blocks += 1
            if index in self.wanted:
                self.kept[index] = keys_values
        reused = self.bridge.fusion.refresh_every != 1 or self.bridge.fusion.branches != "both"
        return self.kept[layer] if reused else self.kept.pop(layer)


class StoreReader(Reader):
    """Runs the source's whole forward and keeps what it needs of it in the run's store. What the
    store has lost is computed again from the same inputs.
    """

    def refresh(self, seen: Seen) -> None:
        super().refresh(seen)
        self.bridge.store.drop(*self.prefix)
        self.pending = True

    @property
    def prefix(self) -> tuple[int, str, str]:
        return (self.bridge.generation, *self.key)

    def get(self, layer: int) -> KeyValues:
        store = self.bridge.store
        if self.pending:
            self.pending = False
            return self.compute(layer)
        ahead = [x for x in self.wanted if x >= layer]
        store.prefetch(Key(*self.prefix, x, slot) for x in ahead for slot in ("key", "value"))
        key, value = (store.get(Key(*self.prefix, layer, slot)) for slot in ("key", "value"))
        if key is None or value is None:
            self.bridge.recomputed += 1
            return self.compute(layer)
        return key, value

    def compute(self, layer: int) -> KeyValues:
        assert self.seen is not None
        _, found = capture(self.source, self.seen)
        self.bridge.blocks += len(found)
        for index in self.wanted:
            for slot, tensor in zip(("key", "value"), found[index], strict=True):
                self.bridge.store.put(Key(*self.prefix, index, slot), tensor)
        return found[layer]


@torch.no_grad()
def walk(transformer: Any, seen: Seen) -> Iterator[tuple[int, KeyValues]]:
    """(block, its keys and values) one after the other: the transformer's forward as far as it is
    asked for. Bit for bit what `capture` finds.
    """
    rotary = transformer.rope(seen.latents)
    hidden = transformer.patch_embedding(seen.latents).flatten(2).transpose(1, 2).contiguous()
    _, modulation, text, image = transformer.condition_embedder(
        seen.timestep, seen.text, seen.image, timestep_seq_len=None
    )
    modulation = modulation.unflatten(1, (6, -1))
    if image is not None:
        text = torch.cat([image, text], 1)
    for index, block in enumerate(transformer.blocks):
        hidden, keys_values = open_block(block, hidden, text, modulation, rotary)
        yield index, keys_values


@torch.no_grad()
def open_block(
    block: Any, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary
) -> tuple[Tensor, KeyValues]:
    """One block's output, and its keys and values; its processor is back in place afterwards."""
    found: list[KeyValues] = []

    def look(key: Tensor, value: Tensor, rotary: Rotary) -> KeyValues:
        found.append((key, value))
        return rotated(key, value, rotary)

    before = block.attn1.processor
    try:
        block.attn1.set_processor(SelfAttention(look))
        hidden = block(hidden, text, modulation, rotary)
    finally:
        block.attn1.set_processor(before)
    return hidden, found[0]
