"""The zoo's members as differences from one base: int8 with a scale per row, so that a fine-tuned
transformer takes half the bytes of its fp16 weights.

A member's folder is a diffusers folder without the parts it shares with the base;
`delta.safetensors` stands where a transformer's weights would. Tensors that the base lacks are
stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".scale"


def encode(weights: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a fine-tuned model -> what is stored. The largest error of a difference is half of
    1/127 of its row's largest.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in base:
            stored[name] = weight.half()
            continue
        delta = weight.float() - widened(base[name], weight.shape)
        rows = delta.flatten(1) if delta.dim() > 1 else delta[None]
        scale = (rows.abs().amax(1) / 127).clamp_min(1e-12)
        stored[name] = (delta / shaped(scale, delta)).round().to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def decode(stored: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fp32 weights again, near enough (see `encode`)."""
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in stored:
            delta = value.float() * shaped(stored[name + SCALE], value)
            weights[name] = widened(base[name], value.shape) + delta
        else:
            weights[name] = value.float()
    return weights


def widened(value: Tensor, shape: torch.Size) -> Tensor:
    """fp32, with zeros for the input channels that the base does not have."""
    if value.shape == shape:
        return value.float()
    wide = torch.zeros(shape)
    wide[:, : value.shape[1]] = value
    return wide


def shaped(scale: Tensor, value: Tensor) -> Tensor:
    """One factor per row [R], or one for a vector, to multiply `value` with."""
    return scale.view(-1, *[1] * (value.dim() - 1)) if value.dim() > 1 else scale
