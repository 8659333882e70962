"""Which weights a projector was trained between."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

FIRST = 16  # values of each tensor that are read


def fingerprint(transformer: nn.Module) -> str:
    """Hash of a transformer's class, the names and shapes of its weights and the first values of
    each, rounded to bf16 so that loading in another dtype does not matter. Reads no large file.
    """
    digest = hashlib.sha256(type(transformer).__name__.encode())
    for name, weight in sorted(transformer.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        values = weight.detach().flatten()[:FIRST].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
