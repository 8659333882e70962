"""The device store against a plain dictionary, under random sequences of operations."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.store.base import Key
from ditcache.store.device import DeviceStore

KEYS = st.builds(
    Key,
    st.integers(0, 2),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["cond", "uncond"]),
    st.integers(0, 2),
    st.sampled_from(["0", "1"]),
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(1, 9)),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("drop"), KEYS, st.integers(0, 5)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_behaves_like_a_dictionary(operations):
    store, model, peak = DeviceStore(), {}, 0
    for operation, key, number in operations:
        if operation == "put":
            tensor = torch.full((number,), float(number))
            store.put(key, tensor)
            model[key] = tensor
        elif operation == "get":
            assert store.get(key) is model.get(key)
        else:
            store.drop(*key[:number])
            model = {k: t for k, t in model.items() if k[:number] != key[:number]}
        held = sum(tensor.nbytes for tensor in model.values())
        peak = max(peak, held)
        assert store.nbytes() == store.stats()["bytes"] == held
        assert store.stats()["bytes_peak"] == peak
        assert store.nbytes(*key[:3]) == sum(t.nbytes for k, t in model.items() if k[:3] == key[:3])
    assert store.stats()["entries"] == len(model)


def test_counters_start_anew():
    store, key = DeviceStore(), Key(1, "a", "cond", 0, "0")
    store.get(key)
    store.put(key, torch.ones(4))
    store.get(key)
    assert store.stats() == {"entries": 1, "bytes": 16, "bytes_peak": 16, "hits": 1, "misses": 1}
    store.reset_counters()
    assert store.stats() == {"entries": 1, "bytes": 16, "bytes_peak": 16, "hits": 0, "misses": 0}
