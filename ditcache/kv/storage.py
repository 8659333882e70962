"""How one block's keys and values are kept. Letters: B batch, N tokens, H heads, D head size."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Slots: TypeAlias = list[slice]  # where a chunk's tokens go, in their order


class KVCacheError(ValueError, RuntimeError):
    """A call that the cache cannot follow. Both kinds, because callers of diffusers' proposed cache
    expect RuntimeError.
    """


class Storage(Protocol):
    """Room for the keys and values of one block."""

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds on to; what is shared between blocks is the same object."""

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raises KVCacheError for a chunk unlike those before."""

    def make_room(self, slots: int) -> None:
        """So many slots will be filled."""

    def write(self, slots: Slots, key: Tensor, value: Tensor, *, append: bool) -> None:
        """Copy the newest chunk; append: it is a new one, the one before will not change."""

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, filled, H, D] as they lie, to be read before the next write."""

    def free(self) -> None:
        """Give back what is shared or elsewhere; it is not used any more."""


class Plain:
    """A buffer each, in the dtype that came first. Grows by doubling where there is no window."""

    def __init__(self, key: Tensor, value: Tensor, room: int):
        self.kept = [empty(x, room) for x in (key, value)]

    @property
    def tensors(self) -> list[Tensor]:
        return self.kept

    def check(self, key: Tensor, value: Tensor) -> None:
        for name, kept, new in (("key", self.kept[0], key), ("value", self.kept[1], value)):
            check_alike(name, kept, new)

    def make_room(self, slots: int) -> None:
        for index, old in enumerate(self.kept):
            if slots > old.shape[1]:
                self.kept[index] = empty(old, max(slots, 2 * old.shape[1]))
                self.kept[index][:, : old.shape[1]] = old

    def write(self, slots: Slots, key: Tensor, value: Tensor, *, append: bool) -> None:
        for kept, new in zip(self.kept, (key, value), strict=True):
            put(kept, slots, new)

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        return self.kept[0][:, :filled], self.kept[1][:, :filled]

    def free(self) -> None:
        pass


def empty(like: Tensor, room: int) -> Tensor:
    """A buffer [B, room, ...], an ordinary tensor also within inference mode."""
    with torch.inference_mode(False):
        return torch.empty(
            (like.shape[0], room, *like.shape[2:]), dtype=like.dtype, device=like.device
        )


def put(buffer: Tensor, slots: Slots, new: Tensor) -> None:
    at = 0
    for slot in slots:
        count = slot.stop - slot.start
        buffer[:, slot] = new[:, at : at + count]
        at += count


def check_alike(name: str, kept: Tensor, new: Tensor) -> None:
    """Raises KVCacheError where a chunk does not continue what is kept."""
    for what, had, has in (
        ("batch and heads", (kept.shape[0], *kept.shape[2:]), (new.shape[0], *new.shape[2:])),
        ("dtype", kept.dtype, new.dtype),
        ("device", kept.device, new.device),
    ):
        if had != has:
            message = f"{name}: the cache holds {what} {had}, got {has}; call reset() first"
            raise KVCacheError(message)
