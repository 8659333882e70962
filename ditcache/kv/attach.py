"""Puts a rolling cache under a transformer's self-attention, and takes it away again.

Uses diffusers' own ways in: an attention processor per block and a forward hook on
`transformer.rope`. Nothing of diffusers is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ditcache.kv.rolling import RollingKVCache
from ditcache.kv.rope import at_rows, frame_rows, hidden_frames, tokens_per_frame
from ditcache.kv.storage import KVCacheError
from ditcache.models.attention import KeyValue, Rotary, open_self_attention, rotate

POSITIONS = ("absolute", "relative")


@dataclass
class KVAttention:
    """What the next forwards attend to; set between them.

    cache: None attends to the forward's own tokens, as without any of this. frame_offset: latent
    frame of the video at which the chunk begins; None: as many as the cache has seen. Relative
    positions need none: they count from the start of the window.
    """

    cache: RollingKVCache | None
    positions: str = "absolute"
    frame_offset: int | None = None
    window_rotary: Rotary | None = field(default=None, init=False)

    def place(self, rope: nn.Module, args: tuple[Tensor], rotary: Rotary) -> Rotary | None:
        """Forward hook of `transformer.rope`: the chunk's tables, at its place in the video."""
        if self.cache is None:
            return at_rows(rope, rotary, *self.own_rows(rope, args[0], self.frame_offset or 0))
        cache, frames = self.cache, hidden_frames(rope, args[0])
        unit = tokens_per_frame(rotary, frames)
        coming = cache.coming(frames * unit)
        if self.positions == "absolute":
            offset = coming.start // unit if self.frame_offset is None else self.frame_offset
            return at_rows(rope, rotary, *self.own_rows(rope, args[0], offset))
        if any(size % unit for size in (cache.window or 0, cache.sink, coming.start)):
            raise KVCacheError(f"relative positions need whole frames, of {unit} tokens each")
        own = frame_rows(rope, frames, 0)
        if own != [range(frames)]:
            raise KVCacheError("relative positions do not go with ChronoEdit's two distant frames")
        gone = coming.stop - cache.filled(coming.stop)
        lies = [
            range((part.start - shift) // unit, (part.stop - shift) // unit)
            for part in cache.layout(coming.stop)
            for shift in [gone if part.start >= cache.sink else 0]
        ]
        self.window_rotary = at_rows(rope, rotary, frames, lies)
        return at_rows(rope, rotary, *self.own_rows(rope, args[0], (coming.start - gone) // unit))

    def own_rows(self, rope: nn.Module, hidden: Tensor, offset: int) -> tuple[int, list[range]]:
        frames = hidden_frames(rope, hidden)
        return frames, frame_rows(rope, frames, offset)

    def key_value(self, block: int) -> KeyValue:
        """For `open_self_attention`."""

        def attend_to(key: Tensor, value: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
            if self.cache is None:
                return rotate(key, rotary), value
            if self.positions == "absolute":
                return self.cache.update(block, rotate(key, rotary), value)
            assert self.window_rotary is not None
            key, value = self.cache.update(block, key, value)
            return rotate(key, self.window_rotary), value

        return attend_to


@contextmanager
def kv_attention(
    transformer: nn.Module,
    cache: RollingKVCache | None = None,
    *,
    positions: str = "absolute",
    frame_offset: int | None = None,
) -> Iterator[KVAttention]:
    """Within, `transformer`'s self-attention reads and writes `cache`; afterwards, also after an
    exception, it is what it was, bit for bit.

        with kv_attention(transformer, cache) as kv:
            cache.enable_append_mode()
            velocity = transformer(latents, timestep, text, return_dict=False)[0]

    positions: `absolute` rotates keys by their frame in the video, as models were trained, up to
    the end of their table. `relative` keeps keys unrotated and rotates them when read, by their
    place in the window: no limit, and with a sink another result by design, as the sink stays next
    to the window. cache, frame_offset: can be set between forwards, see `KVAttention`. Raises
    DitcacheError for a transformer without self-attention like Wan's.
    """
    if positions not in POSITIONS:
        raise KVCacheError(f"positions: must be absolute or relative, got '{positions}'")
    kv = KVAttention(cache, positions, frame_offset)
    with open_self_attention(transformer, kv.key_value):
        handle = transformer.get_submodule("rope").register_forward_hook(kv.place)
        try:
            yield kv
        finally:
            handle.remove()
