"""Keys and values of a whole transformer as one object: extracted, fused, and handed to and from
transformers' caches. Letters: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditcache.bridge.capture import Seen, capture, fuse
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.nets import Net
from ditcache.errors import DitcacheError


@dataclass
class KVCache:
    """keys, values: one [B, H, N, D] per layer; keys before the rotary embedding where they are a
    diffusion transformer's.
    """

    keys: list[Tensor]
    values: list[Tensor]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise ValueError(f"keys, values: {len(self.keys)} layers and {len(self.values)}")
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key.dim() != 4 or key.shape[:3] != value.shape[:3]:
                raise ValueError(
                    f"keys, values: layer {layer} needs [B, H, N, D] of each, got "
                    f"{tuple(key.shape)} and {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def to_dynamic_cache(self) -> Any:
        """transformers' `DynamicCache` of the same tensors."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, layer)
        return cache

    @classmethod
    def from_dynamic_cache(cls, cache: Any) -> KVCache:
        """Of transformers 5: one entry per layer with `keys` and `values` [B, H, N, D]. Their keys
        are those after the rotary embedding.
        """
        layers = list(cache.layers)
        if any(getattr(layer, "keys", None) is None for layer in layers):
            raise DitcacheError("KVCache: this cache has layers that nothing was written to")
        return cls([layer.keys for layer in layers], [layer.values for layer in layers])


@torch.no_grad()
def extract_kv_cache(
    transformer: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    image: Tensor | None = None,
) -> KVCache:
    """One forward's self-attention keys (after their norm, before the rotary embedding) and values.

    latents [B, C, T, H, W] with the condition's channels; timestep [B], 0..1000; text [B, L, D].
    """
    _, found = capture(transformer, Seen(latents, timestep, text, image))
    return KVCache([k.transpose(1, 2) for k, _ in found], [v.transpose(1, 2) for _, v in found])


@torch.no_grad()
def fuse_caches(
    target: KVCache,
    sources: Sequence[tuple[Net, KVCache]] | dict[str, tuple[Net, KVCache]],
    timestep: Tensor,
    fusion: Fusion | None = None,
    frames: int = 1,
) -> KVCache:
    """What a target would attend to with these sources. timestep [B], 0..1000. frames: latent
    frames, where `fusion` treats them differently.
    """
    named = sources if isinstance(sources, dict) else {str(i): x for i, x in enumerate(sources)}
    fusion = fusion or Fusion(fusion_direction="bidirectional")
    keys, values = [], []
    for layer in range(len(target)):
        own = (target.keys[layer].transpose(1, 2), target.values[layer].transpose(1, 2))
        given = {}
        for name, (net, cache) in named.items():
            if layer in net.partners:
                partner = net.partners[layer]
                said = (cache.keys[partner].transpose(1, 2), cache.values[partner].transpose(1, 2))
                given[name] = (net, said)
        key, value = fuse(fusion, layer, own, given, timestep.float() / 1000, frames)
        keys.append(key.transpose(1, 2))
        values.append(value.transpose(1, 2))
    return KVCache(keys, values)
