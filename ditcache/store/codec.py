"""How a tensor is written down in a tier: as it is, in bf16, or as int8 with a scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor as a tier keeps it. codec: None is the tensor itself. dtype: before and after."""

    parts: dict[str, Tensor]
    dtype: torch.dtype
    codec: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        return self.parts["x"].device

    def with_parts(self, parts: dict[str, Tensor]) -> Packed:
        """The same elsewhere."""
        return Packed(parts, self.dtype, self.codec)


def compact(tensor: Tensor) -> Tensor:
    """The tensor, detached; a copy if it is a view of something larger, whose memory it would hold
    without being counted.
    """
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def pack(tensor: Tensor) -> Packed:
    return Packed({"x": tensor}, tensor.dtype)


def encode(packed: Packed, codec: str | None) -> Packed:
    """What is encoded already stays as it is, so that no error is added on the way down; likewise
    what would not become smaller, and what int8 cannot hold: infinities, NaN, integers.
    """
    tensor = packed.parts["x"]
    if codec is None or packed.codec is not None or not tensor.is_floating_point():
        return packed
    if codec == "bf16" and tensor.element_size() > 2:
        return Packed({"x": tensor.bfloat16()}, packed.dtype, codec)
    if codec == "int8" and tensor.element_size() > 1 and tensor.ndim and tensor.shape[-1] > 4:
        largest = tensor.abs().amax(-1, keepdim=True).float()
        if not bool(largest.isfinite().all()):
            return packed
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return Packed(
            {"x": (tensor / scale).round().clamp(-127, 127).to(torch.int8), "scale": scale},
            packed.dtype,
            codec,
        )
    return packed


def decode(packed: Packed) -> Tensor:
    tensor = packed.parts["x"]
    if packed.codec == "int8":
        tensor = tensor * packed.parts["scale"]
    return tensor.to(packed.dtype)
