"""A rolling key/value cache for chunk-by-chunk generation, in a fixed amount of memory.

Every block has one buffer for keys and one for values, laid out `[sink | ring]`: the stream's first
`sink_size` tokens stay where they are, later ones go round in the rest. Attention without a mask
does not care in which order it reads, so buffers are read as they lie and nothing is ever moved.
All bookkeeping is in Python ints. Knows nothing of models or frames.
Letters: B batch, N tokens of a chunk, S tokens attended to, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditcache.kv.storage import KVCacheError, Plain, Slots, Storage


class RollingKVCache:
    """What the blocks of one expert and one branch have seen.

    Calls like the `WanKVCache` proposed to diffusers (pull request 13681): append on a chunk's
    first forward, overwrite on its later ones.

        cache.enable_append_mode()     # or enable_overwrite_mode()
        key, value = cache.update(block, key, value)  # in every block, keys after their rotation

    window_size, sink_size: tokens; the window counts sink, older tokens and the newest chunk.
    window_size -1, 0 or None: without bound; then `capacity` is how many tokens to make room for at
    first. storage: how buffers are kept, see storage.py. Each forward is one chunk: `chunks` counts
    them, for all blocks together, so a block that missed one is an error and not a shifted context.
    """

    def __init__(
        self,
        num_blocks: int,
        window_size: int | None = -1,
        sink_size: int = 0,
        *,
        capacity: int = 0,
        storage: Callable[[Tensor, Tensor, int], Storage] = Plain,
    ):
        self.window = window_size if window_size is not None and window_size > 0 else None
        if num_blocks < 1:
            raise KVCacheError(f"num_blocks: must be >= 1, got {num_blocks}")
        if window_size is not None and window_size < -1:
            raise KVCacheError(f"window_size: must be > 0, or -1 for no bound, got {window_size}")
        if sink_size < 0 or (self.window is not None and sink_size >= self.window):
            raise KVCacheError(
                f"sink_size: must be >= 0 and less than the window of {self.window}, "
                f"got {sink_size}"
            )
        if sink_size and self.window is None:
            raise KVCacheError("sink_size: has no effect without a window; set window_size")
        self.sink, self.capacity, self.storage = sink_size, capacity, storage
        self.block_caches = [BlockCache(self) for _ in range(num_blocks)]
        self.reset()

    def reset(self) -> None:
        """Forget everything, give the memory back, append from now on."""
        self.overwrite_newest = False
        self.chunks = 0
        self.start = self.end = 0  # the newest chunk, in tokens of the stream
        for block in self.block_caches:
            if block.kept is not None:
                block.kept.free()
            block.end, block.kept = 0, None

    def enable_append_mode(self) -> None:
        self.overwrite_newest = False

    def enable_overwrite_mode(self) -> None:
        self.overwrite_newest = True

    def coming(self, length: int) -> range:
        """The tokens of the stream that the next forward, over `length` tokens, will write. Raises
        KVCacheError for a forward that cannot be.
        """
        newest = self.end - self.start
        if length < 1:
            raise KVCacheError("a chunk needs at least one token")
        if not self.overwrite_newest:
            if self.window is not None and self.sink + length > self.window:
                raise KVCacheError(
                    f"a chunk of {length} tokens and a sink of {self.sink} do not fit a window of "
                    f"{self.window}; raise the window or lower the sink"
                )
            return range(self.end, self.end + length)
        if not self.chunks:
            raise KVCacheError("nothing to overwrite yet: append first")
        if length != newest:
            raise KVCacheError(
                f"overwriting with {length} tokens, the newest chunk has {newest}; append instead"
            )
        return range(self.start, self.end)

    def update(self, block_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, N, H, D] of the chunk, in one block -> those to attend to [B, S, H, D],
        in the order of `positions()`.

        What came in is copied. What comes back may be read until this cache's next update. Where
        gradients are recorded, they flow into this chunk's key and value and not into older ones,
        and what comes back is a copy, so that later updates leave backward alone. (Not with
        gradient checkpointing, which would call `update` twice.)
        """
        block, length = self.block_caches[block_idx], key.shape[1]
        if value.shape[:3] != key.shape[:3]:
            raise KVCacheError(f"key is {tuple(key.shape)}, value is {tuple(value.shape)}")
        if self.overwrite_newest or block.end == self.end:
            chunk = self.coming(length)
        else:  # another block has begun this chunk already
            chunk = range(self.start, self.end)
        behind = block.end != (chunk.stop if self.overwrite_newest else chunk.start)
        if behind or length != len(chunk):
            raise KVCacheError(
                f"block {block_idx} holds {block.end} tokens of the stream and is given {length}, "
                f"where chunk {self.chunks - 1} is tokens {self.start} to {self.end}: every block "
                "must see every chunk, all of it (a first forward cannot be skipped); call reset()"
            )
        read = block.write(key, value, chunk, append=not self.overwrite_newest)
        if chunk.stop > self.end:
            self.start, self.end, self.chunks = chunk.start, chunk.stop, self.chunks + 1
        return read

    def filled(self, end: int) -> int:
        """Tokens held once the stream has `end`."""
        return end if self.window is None else min(end, self.window)

    def layout(self, end: int) -> list[range]:
        """Tokens of the stream in the order in which they lie, once it has `end`."""
        if self.window is None or end <= self.window:
            return [range(end)]
        ring = self.window - self.sink
        new = (end - self.sink) % ring  # tokens of the ring's current round
        return [range(self.sink), range(end - new, end), range(end - ring, end - new)]

    def slots(self, tokens: range) -> Slots:
        """Where these tokens of the stream lie, in their order."""
        if self.window is None:
            return [slice(tokens.start, tokens.stop)]
        found, ring, at = [], self.window - self.sink, tokens.start
        while at < tokens.stop:
            slot, room = at, self.sink - at
            if at >= self.sink:
                offset = (at - self.sink) % ring
                slot, room = self.sink + offset, ring - offset
            count = min(room, tokens.stop - at)
            found.append(slice(slot, slot + count))
            at += count
        return found

    def positions(self) -> list[int]:
        """The stream's token in each slot, in the order in which `update` returns them."""
        return [token for tokens in self.layout(self.end) for token in tokens]

    @property
    def evicted(self) -> int:
        """Tokens of the stream that are no longer there."""
        return self.end - self.filled(self.end)

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        kept = {id(x): x for block in self.block_caches if block.kept for x in block.kept.tensors}
        return sum(x.numel() * x.element_size() for x in kept.values())


class BlockCache:
    """One block's part of a cache."""

    def __init__(self, cache: RollingKVCache):
        self.cache = cache
        self.end = 0  # tokens of the stream it has seen
        self.kept: Storage | None = None

    @property
    def cached_key(self) -> Tensor | None:
        """[B, S, H, D], a copy, oldest first; None while there is nothing."""
        return self.in_order(0)

    @property
    def cached_value(self) -> Tensor | None:
        """Likewise."""
        return self.in_order(1)

    def in_order(self, which: int) -> Tensor | None:
        if self.kept is None:
            return None
        cache, first = self.cache, self.end - self.cache.filled(self.end)
        sink = min(cache.sink, self.end)
        slots = cache.slots(range(sink)) + cache.slots(range(first + sink, self.end))
        lies = self.kept.read(cache.filled(self.end))[which]
        return torch.cat([lies[:, slot] for slot in slots], dim=1)

    def write(
        self, key: Tensor, value: Tensor, chunk: range, *, append: bool
    ) -> tuple[Tensor, Tensor]:
        """Copy the chunk to its slots and return everything to attend to."""
        cache, slots = self.cache, self.cache.slots(chunk)
        filled = cache.filled(chunk.stop)
        if self.kept is None:
            room = cache.window if cache.window is not None else max(cache.capacity, filled)
            self.kept = cache.storage(key.detach(), value.detach(), room)
        self.kept.check(key, value)
        if append:
            self.kept.make_room(filled)
        with torch.no_grad():
            self.kept.write(slots, key.detach(), value.detach(), append=append)
        self.end = chunk.stop
        lies = self.kept.read(filled)
        if not torch.is_grad_enabled():
            return lies
        return laid(lies[0], key, slots), laid(lies[1], value, slots)


def laid(whole: Tensor, own: Tensor, slots: Slots) -> Tensor:
    """A copy of `whole` [B, S, H, D] whose `slots` are `own` itself, for gradients."""
    parts, at = [], 0
    sizes = [slot.stop - slot.start for slot in slots]
    split = zip(slots, own.split(sizes, dim=1), strict=True)
    for slot, part in sorted(split, key=lambda placed: placed[0].start):
        parts += [whole[:, at : slot.start], part]
        at = slot.stop
    return torch.cat([*parts, whole[:, at:]], dim=1)
