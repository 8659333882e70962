"""The name of a unit's output: a hash of all that it follows from.

Two runs with the same name have the same output, whatever their prompts are: at the first step the
uncond branch of every video that starts from the same noise, for one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ditcache.cache.streams import Work


def weights_of(blocks: list[nn.Module]) -> str | None:
    """Hash over every parameter's and buffer's name, shape and sums, adapters included; None where
    weights are not at hand (offloaded).
    """
    digest = hashlib.sha256()
    for number, block in enumerate(blocks):
        for name, tensor in block.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                return None
            values = tensor.detach().double()
            sums = [float(values.sum()), float(values.abs().sum()), float((values**3).sum())]
            digest.update(f"{number} {name} {tensor.dtype} {list(tensor.shape)} {sums}".encode())
    return digest.hexdigest()


def name_of(work: Work, weights: str) -> str:
    """weights: of the unit's blocks. Reads all that they are called with."""
    device = work.joined.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    digest = hashlib.sha256(f"1 {weights} {where} {torch.__version__}".encode())
    for value in leaves_of((work.joined, work.args, work.kwargs)):
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
            continue
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        flat = value.detach().contiguous().cpu().view(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def leaves_of(value: Any) -> Iterator[Any]:
    """Tensors, numbers and texts in tuples, lists and dictionaries, in a fixed order."""
    if isinstance(value, dict):
        value = sorted(value.items())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves_of(part)
    else:
        yield value
