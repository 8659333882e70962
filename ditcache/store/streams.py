"""Copies between a device and ordinary memory. With CUDA they ride a stream of their own beside the
computation; without, there is nothing to copy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ditcache.store.base import Failed, Pending, Ready
from ditcache.store.codec import Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CPU = torch.device("cpu")


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Download:
    """Device -> pinned memory. Whoever asks for the result waits for it on the CPU."""

    def __init__(self, packed: Packed):
        device = packed.device
        stream = side_stream(device)
        self.started, self.arrived = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.wait_stream(torch.cuda.current_stream(device))  # the tensor may not be there yet
        with torch.cuda.stream(stream):
            self.started.record()
            self.packed = copied(packed, lambda t: torch.empty_like(t, device=CPU, pin_memory=True))
            self.arrived.record()
        self.source: Packed | None = packed  # alive until it has been read

    def done(self) -> bool:
        return self.arrived.query()

    def result(self) -> Packed:
        self.arrived.synchronize()
        self.source = None
        return self.packed

    @property
    def seconds(self) -> float:
        return self.started.elapsed_time(self.arrived) / 1e3


class Upload:
    """Memory -> device. Whoever asks for the result makes the current stream wait, not the CPU."""

    def __init__(self, packed: Packed, device: torch.device):
        self.device, self.source = device, packed
        stream = side_stream(device)
        self.started, self.arrived = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            self.started.record()
            self.packed = copied(packed, lambda t: torch.empty_like(t, device=device))
            self.arrived.record()

    def done(self) -> bool:
        return self.arrived.query()

    def result(self) -> Packed:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        for part in self.packed.parts.values():
            part.record_stream(current)  # its memory belongs to the side stream
        return self.packed

    @property
    def seconds(self) -> float:
        return self.started.elapsed_time(self.arrived) / 1e3


def copied(packed: Packed, empty: Callable[[Tensor], Tensor]) -> Packed:
    """Enqueue the copies. Strides stay: sums over a tensor may depend on them."""
    parts = {name: empty(part) for name, part in packed.parts.items()}
    for name, part in packed.parts.items():
        parts[name].copy_(part, non_blocking=True)
    return packed.with_parts(parts)


def to_host(packed: Packed) -> Pending:
    """Start a copy into pinned memory; ordinary memory is there already."""
    if packed.device.type != "cuda":
        return Ready(packed.with_parts({n: p.cpu() for n, p in packed.parts.items()}))
    try:
        return Download(packed)
    except RuntimeError as error:  # no memory left to pin
        return Failed(str(error))


def to_device(packed: Packed, device: torch.device) -> Pending:
    """Start a copy to `device`."""
    if packed.device == device:
        return Ready(packed)
    if device.type != "cuda":
        return Ready(packed.with_parts({n: p.to(device) for n, p in packed.parts.items()}))
    try:
        return Upload(packed, device)
    except RuntimeError as error:  # no memory left on the device
        return Failed(str(error))
