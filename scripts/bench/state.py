"""How many bytes of tensors an object keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def bytes_of(root: Any) -> int:
    """Storage of all tensors within reach of `root`, each storage once; modules are not entered."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            todo += vars(value).values()
    return sum(storages.values())
