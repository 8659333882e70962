"""The tiers in memory: the device that made a tensor, and the host's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ditcache.store import streams
from ditcache.store.base import Pending, Ready, Tier
from ditcache.store.codec import Packed


@dataclass
class DeviceTier(Tier):
    """Tensors stay where they are: on the GPU or, on a machine without, in ordinary memory."""

    name = "gpu"
    memory = True

    def place(self, device: torch.device) -> torch.device:
        return device

    def write(self, packed: Packed) -> Pending:
        return Ready(packed)

    def read(self, handle: Packed, device: torch.device) -> Pending:
        return streams.to_device(handle, device)


@dataclass
class HostTier(Tier):
    """The host's memory, pinned where it is copied from a CUDA device."""

    name = "cpu"
    memory = True

    def place(self, device: torch.device) -> torch.device:
        return streams.CPU

    def write(self, packed: Packed) -> Pending:
        return streams.to_host(packed)

    def read(self, handle: Packed, device: torch.device) -> Pending:
        return streams.to_device(handle, device)
