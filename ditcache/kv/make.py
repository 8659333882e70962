"""`KVSettings` -> a rolling cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ditcache.kv.codec import quantised
from ditcache.kv.offload import stored
from ditcache.kv.rolling import RollingKVCache
from ditcache.kv.storage import Plain, Storage

if TYPE_CHECKING:
    from ditcache.kv.settings import KVSettings
    from ditcache.store.base import Store


def make_cache(
    num_blocks: int,
    kv: KVSettings,
    unit: int,
    frames: int,
    store: Store | None = None,
    name: tuple[str, str] = ("transformer", "cond"),
) -> RollingKVCache:
    """A cache for one expert and branch of a rollout of `frames` latent frames, of `unit` tokens
    each. Makes no more room than the rollout fills. name: expert and branch, for the store.
    """
    storage: Callable[[Tensor, Tensor, int], Storage] = Plain
    if kv.codec != "none":
        storage = quantised(kv.codec)
    elif kv.offload:
        assert store is not None
        storage = stored(store, name)
    if kv.window is None or kv.window >= frames:
        return RollingKVCache(num_blocks, None, capacity=frames * unit, storage=storage)
    return RollingKVCache(num_blocks, kv.window * unit, kv.sink * unit, storage=storage)
