"""The rolling cache against a plain list of chunks, bit for bit, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.errors import DitcacheError
from ditcache.kv.codec import quantised
from ditcache.kv.offload import stored
from ditcache.kv.rolling import RollingKVCache
from ditcache.kv.size import kv_bytes
from ditcache.kv.storage import KVCacheError
from ditcache.store.tiered import TieredStore

BLOCKS = 2


def chunk(length: int, seed: int = 0, block: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + block)
    return tuple(torch.randn(1, length, 2, 4, generator=generator) for _ in range(2))


def update(cache, length, seed):
    """One forward through all blocks."""
    return [cache.update(block, *chunk(length, seed, block)) for block in range(BLOCKS)]


class Listed:
    """The same by the rule: every token of the stream in a list, looked up when read."""

    def __init__(self, window, sink):
        self.window, self.sink, self.tokens = window, sink, []

    def append(self, new):
        self.tokens += list(new.unbind(1))

    def overwrite(self, new):
        self.tokens[-new.shape[1] :] = list(new.unbind(1))

    def held(self):
        end = len(self.tokens)
        if self.window is None or end <= self.window:
            return list(range(end))
        return [*range(self.sink), *range(end - (self.window - self.sink), end)]

    def read(self, order):
        return torch.stack([self.tokens[token] for token in order], dim=1)


plans = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=9)


@settings(max_examples=120, deadline=None)
@given(
    window=st.none() | st.integers(1, 14), sink=st.integers(0, 6), plan=plans, grad=st.booleans()
)
def test_bit_equal_to_a_list(window, sink, plan, grad):
    """plan: per chunk its length and how often it is overwritten."""
    sink = 0 if window is None else min(sink, window - 1)
    cache = RollingKVCache(BLOCKS, window, sink)
    lists = [[Listed(window, sink) for _ in range(2)] for _ in range(BLOCKS)]
    seed = 0
    with torch.set_grad_enabled(grad):
        for length, more in plan:
            length = length if window is None else min(length, window - sink)
            for again in range(1 + more):
                cache.enable_overwrite_mode() if again else cache.enable_append_mode()
                seed += 1
                for block, read in enumerate(update(cache, length, seed)):
                    for which, new in enumerate(chunk(length, seed, block)):
                        own = lists[block][which]
                        own.overwrite(new) if again else own.append(new)
                        assert torch.equal(read[which], own.read(cache.positions()))
                        kept = cache.block_caches[block]
                        logical = (kept.cached_key, kept.cached_value)[which]
                        assert torch.equal(logical, own.read(own.held()))
                assert sorted(cache.positions()) == own.held()
                assert cache.evicted == len(own.tokens) - len(own.held())
    assert cache.chunks == len(plan) and cache.end == len(own.tokens)


def test_memory_is_made_once_and_given_back():
    cache = RollingKVCache(BLOCKS, 8, 2)
    assert cache.nbytes == 0
    update(cache, 3, 0)
    first = [x.data_ptr() for block in cache.block_caches for x in block.kept.tensors]
    expected = BLOCKS * 2 * 8 * 8 * 4
    for seed in range(1, 9):
        update(cache, 3, seed)
        assert cache.nbytes == expected
    assert first == [x.data_ptr() for block in cache.block_caches for x in block.kept.tensors]
    cache.reset()
    assert cache.nbytes == 0 and all(block.kept is None for block in cache.block_caches)


def test_without_a_window_it_grows_or_is_made_in_advance():
    growing, known = RollingKVCache(BLOCKS), RollingKVCache(BLOCKS, capacity=30)
    sizes = []
    for seed in range(10):
        for one, other in zip(update(growing, 3, seed), update(known, 3, seed), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        sizes.append(growing.nbytes)
        assert known.nbytes == BLOCKS * 2 * 30 * 8 * 4
    assert len(set(sizes)) == 5  # 3, 6, 12, 24, 48 tokens


def test_what_came_in_is_copied():
    for window in (-1, 3, 6):
        cache = RollingKVCache(1, window)
        key, value = chunk(3)
        cache.update(0, key, value)
        kept = cache.block_caches[0].cached_key
        key.zero_(), value.zero_()
        assert torch.equal(cache.block_caches[0].cached_key, kept)
        cache.enable_overwrite_mode()
        cache.update(0, *chunk(3, 1))
        assert not key.any() and not value.any()
        kept.zero_()
        assert torch.equal(cache.block_caches[0].cached_key, chunk(3, 1)[0])


def test_one_append_after_another_is_one_chunk_each():
    """As callers do who set append mode once: each forward is a chunk, for all blocks together."""
    cache = RollingKVCache(BLOCKS)
    for seed in range(4):
        update(cache, 2, seed)
        assert (cache.chunks, cache.start, cache.end) == (seed + 1, 2 * seed, 2 * seed + 2)


def test_a_block_that_missed_a_chunk_is_an_error_and_not_a_shifted_context():
    for overwrite in (True, False):
        cache = RollingKVCache(BLOCKS)
        update(cache, 2, 0)
        cache.update(0, *chunk(2, 1))  # block 1 is skipped on this append
        if overwrite:
            cache.enable_overwrite_mode()
            with pytest.raises(
                KVCacheError, match=r"block 1 holds 2 tokens.*chunk 1 is tokens 2 to 4"
            ):
                update(cache, 2, 2)
        else:
            cache.update(0, *chunk(2, 2))
            with pytest.raises(KVCacheError, match="every block must see every chunk"):
                cache.update(1, *chunk(2, 2))
        assert torch.equal(cache.block_caches[1].cached_key, chunk(2, 0, 1)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ((0,), "num_blocks: must be >= 1, got 0"),
        ((1, -2), "window_size: must be > 0, or -1 for no bound, got -2"),
        ((1, 4, 4), "sink_size: must be >= 0 and less than the window of 4, got 4"),
        ((1, 4, -1), "sink_size: must be >= 0"),
        ((1, -1, 2), "sink_size: has no effect without a window"),
    ],
)
def test_sizes_that_cannot_be(build, message):
    with pytest.raises(KVCacheError, match=message):
        RollingKVCache(*build)


def test_calls_that_cannot_be():
    cache = RollingKVCache(1, 6, 3)
    with pytest.raises(
        ValueError, match="a chunk of 4 tokens and a sink of 3 do not fit a window of 6"
    ):
        cache.update(0, *chunk(4))
    cache.enable_overwrite_mode()
    with pytest.raises(RuntimeError, match="nothing to overwrite yet: append first"):
        cache.update(0, *chunk(2))
    cache.enable_append_mode()
    assert cache.chunks == cache.end == 0 and cache.block_caches[0].cached_key is None
    cache.update(0, *chunk(2))
    cache.enable_overwrite_mode()
    for length in (1, 3):
        with pytest.raises(
            ValueError, match=f"overwriting with {length} tokens, the newest chunk has 2"
        ):
            cache.update(0, *chunk(length))
    cache.enable_append_mode()
    key, value = chunk(2, 1)
    with pytest.raises(
        ValueError, match=r"key: the cache holds dtype torch\.float32, got torch\.float64"
    ):
        cache.update(0, key.double(), value.double())
    with pytest.raises(ValueError, match="the cache holds batch and heads"):
        cache.update(0, key[:, :, :1], value[:, :, :1])
    with pytest.raises(ValueError, match="needs at least one token"):
        cache.update(0, key[:, :0], value[:, :0])
    assert (cache.chunks, cache.end) == (1, 2)


def test_backward_through_a_forward_that_reads_the_cache():
    """Gradients reach the chunk's own key and value, not older ones, and writing to the cache after
    the forward does not break backward.
    """
    for window, sink in ((-1, 0), (8, 0), (6, 2), (5, 1)):
        cache = RollingKVCache(1, window, sink)
        for seed in range(4):
            cache.enable_append_mode()
            with torch.no_grad():
                cache.update(0, *chunk(3, seed))
        query = torch.randn(1, 3, 2, 4, requires_grad=True)
        key, value = (x.requires_grad_() for x in chunk(3, 9))
        cache.enable_overwrite_mode()
        keys, values = cache.update(0, key, value)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        )
        with torch.no_grad():  # the clean pass, and the next chunk
            cache.update(0, *chunk(3, 10))
            cache.enable_append_mode()
            cache.update(0, *chunk(3, 11))
        out.square().sum().backward()
        assert query.grad.any() and key.grad.any() and value.grad.any()
        assert not any(x.requires_grad for x in cache.block_caches[0].kept.tensors)
        assert torch.equal(cache.block_caches[0].cached_key[:, -3:], chunk(3, 11)[0])


def test_gradients_are_those_of_plain_concatenation():
    cache = RollingKVCache(1, 6, 1)
    with torch.no_grad():
        for seed in range(3):
            cache.update(0, *chunk(2, seed))
    key, value = (x.requires_grad_() for x in chunk(2, 7))
    keys, values = cache.update(0, key, value)
    weights = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0))
    (keys * weights + values**2).sum().backward()
    order = cache.positions()
    assert torch.equal(key.grad, weights[:, [order.index(6), order.index(7)]])
    assert torch.equal(value.grad, 2 * value.detach())


def test_inference_mode_and_back():
    cache = RollingKVCache(1, 4)
    with torch.inference_mode():
        cache.update(0, *chunk(2))
    with torch.no_grad():
        cache.update(0, *chunk(2, 1))
    cache.enable_overwrite_mode()
    keys, _ = cache.update(0, *chunk(2, 2))
    assert torch.equal(keys, torch.cat([chunk(2)[0], chunk(2, 2)[0]], dim=1))


KINDS = ["int8", "int4", "stored"]


def storage_of(kind, tmp_path=None):
    if kind != "stored":
        return quantised(kind), None
    store = TieredStore(gpu=0, cpu="64KiB", disk="1MiB")
    store.open(tmp_path)
    return stored(store, ("transformer", "cond")), store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (7, 0), (7, 2), (6, 3)])
def test_other_storages_are_the_plain_one_coded(kind, window, sink, tmp_path):
    """In every slot: what has not been finished is exact, the rest within the codec's step, and a
    store is exact.
    """
    storage, store = storage_of(kind, tmp_path)
    plain, other = RollingKVCache(2, window, sink), RollingKVCache(2, window, sink, storage=storage)
    step = {"int8": 1 / 127, "int4": 1 / 15, "stored": 0}[kind]
    for index in range(8):
        length = 1 + index % 3
        for again in (0, 1):
            for cache in (plain, other):
                cache.enable_overwrite_mode() if again else cache.enable_append_mode()
            for block in range(2):
                new = chunk(length, 10 * index + again, block)
                for exact, coded in zip(
                    plain.update(block, *new), other.update(block, *new), strict=True
                ):
                    assert exact.shape == coded.shape
                    error = (exact - coded).abs().amax(-1) / exact.abs().amax(-1)
                    assert error.max() <= step, (kind, error.max())
                    assert (error > 0).any() == (step > 0 and index > 0)
                    fresh = [i for i, p in enumerate(plain.positions()) if p >= plain.start]
                    assert not error[:, fresh].any()
    if store is not None:
        assert sum(t["bytes"] for t in store.stats()["tiers"].values()) > 0
        other.reset()
        assert sum(t["bytes"] for t in store.stats()["tiers"].values()) == 0
        store.close()
    other.reset()
    assert other.nbytes == 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_bytes_are_those_of_the_formula(codec):
    """Codes and scales of the whole window; besides them the newest chunk and one block's buffer."""
    blocks, heads, size, window, length = 6, 4, 128, 32, 8
    cache = RollingKVCache(blocks, window, storage=quantised(codec))
    for _ in range(6):
        for block in range(blocks):
            cache.update(block, *(torch.randn(1, length, heads, size).bfloat16() for _ in range(2)))
    codes = kv_bytes(blocks, heads, size, window, 2, codec)
    newest = kv_bytes(blocks, heads, size, length, 2, "none")
    buffers = kv_bytes(1, heads, size, window, 2, "none")
    assert cache.nbytes == codes + newest + buffers
    factor = kv_bytes(blocks, heads, size, window, 2, "none") / codes
    assert factor == pytest.approx({"int8": 1.97, "int4": 3.56}[codec], abs=0.005)


def test_a_store_that_loses_something_is_an_error(tmp_path):
    with TieredStore(gpu=0, cpu=400, disk=0) as store:
        cache = RollingKVCache(1, storage=stored(store, ("transformer", "cond")))
        with pytest.raises(DitcacheError, match=r"kv\.offload: the store lost .* raise store\.cpu"):
            for seed in range(4):
                cache.update(0, *chunk(3, seed))
